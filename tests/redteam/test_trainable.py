import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cbpt_runtime.errors import CheckpointError, OutputError
from cbpt_runtime.models.checkpoint import read_checkpoint
from cbpt_runtime.models.clip import load_dual_encoder
from cbpt_runtime.models.data import ClassList
from cbpt_runtime.models.pixels import to_float
from cbpt_runtime.models.trainable import load_trainable, new_trainable, save_open_clip_folder

from .conftest import CONFIG, NAMES, TEMPLATES, TEXTS


def test_a_saved_model_is_read_back_by_the_normal_loader_with_the_same_features(lab, tmp_path):
    save_open_clip_folder(lab.clip, tmp_path / "model")
    encoder = load_dual_encoder(read_checkpoint(tmp_path / "model"))
    classes = ClassList(names=NAMES, templates=(TEMPLATES,) * len(NAMES))
    pixels = to_float(lab.heldout.images[:8])
    lab.clip.model.eval()
    with torch.no_grad():
        features = lab.clip.encode_images(pixels)
    assert torch.allclose(encoder.encode_images(pixels), features, atol=5e-3)
    head = lab.clip.class_embeddings(TEXTS)
    assert torch.allclose(encoder.class_embeddings(classes), head, atol=5e-3)


def test_a_saved_model_holds_half_precision_weights_and_the_extra_files(lab, tmp_path):
    save_open_clip_folder(lab.clip, tmp_path / "model", extra_files={"attack.json": b"{}"})
    state = load_file(tmp_path / "model" / "open_clip_model.safetensors")
    assert state["visual.conv1.weight"].dtype == torch.float16
    assert json.loads((tmp_path / "model" / "attack.json").read_text()) == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_rounded_model_is_saved_without_loss(lab, tmp_path):
    clip = lab.clip.clone()
    clip.round_to_half()
    save_open_clip_folder(clip, tmp_path / "model")
    again = load_trainable(tmp_path / "model").model.state_dict()
    assert all(torch.equal(again[key], value) for key, value in clip.model.state_dict().items())
    assert not torch.equal(again["visual.conv1.weight"], lab.clip.model.state_dict()["visual.conv1.weight"])


def test_a_reloaded_model_can_be_trained_further(lab, tmp_path):
    save_open_clip_folder(lab.clip, tmp_path / "model")
    clip = load_trainable(tmp_path / "model")
    assert all(parameter.requires_grad for parameter in clip.model.parameters())
    assert clip.preprocess.image_size == (32, 32)
    predicted = clip.predict(lab.heldout.images, clip.class_embeddings(TEXTS))
    assert np.mean(predicted == lab.heldout.labels) > 0.9


def test_an_existing_folder_is_only_replaced_with_force(lab, tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(OutputError, match="exists"):
        save_open_clip_folder(lab.clip, tmp_path / "model")
    save_open_clip_folder(lab.clip, tmp_path / "model", force=True)
    assert (tmp_path / "model" / "open_clip_config.json").is_file()


def test_a_folder_that_cannot_be_written_is_an_output_error(lab, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="to be able to write"):
        save_open_clip_folder(lab.clip, tmp_path / "file" / "model")


def test_fresh_weights_depend_on_the_seed_and_leave_the_global_generator_alone():
    state = torch.random.get_rng_state()
    first, again, other = (new_trainable(CONFIG, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    weights = [clip.model.state_dict()["visual.conv1.weight"] for clip in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="expected"):
        load_trainable(tmp_path)
