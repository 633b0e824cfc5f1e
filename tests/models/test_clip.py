from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch

from cbpt_runtime.errors import CheckpointError, ConfigError, ImageDataError
from cbpt_runtime.models.checkpoint import read_checkpoint
from cbpt_runtime.models.clip import DualEncoder, load_dual_encoder, load_image_encoder, resolve_device
from cbpt_runtime.models.data import ClassList, default_templates, find_class_folders, read_images

KINDS = ("vit", "resnet", "custom-text", "timm", "siglip")
NAMES = ("tench", "golden_retriever", "Space shuttle", "maillot, tank suit")


def reference(folder: Path) -> torch.nn.Module:
    """The same folder through open_clip's own loader."""
    model: torch.nn.Module = open_clip.create_model(f"local-dir:{folder}").eval()
    return model


def random_pixels(encoder: DualEncoder, n: int = 3) -> torch.Tensor:
    return torch.rand(n, 3, *encoder.preprocess.image_size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tiny_folder: Callable[..., Path]) -> Path:
    return tiny_folder(request.param)


@pytest.mark.usefixtures("no_network")
def test_image_features_are_open_clips(folder: Path) -> None:
    encoder, model = load_dual_encoder(read_checkpoint(folder)), reference(folder)
    pixels = random_pixels(encoder)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (encoder.preprocess.mean, encoder.preprocess.std))
    with torch.no_grad():
        expected = model.encode_image((pixels - mean) / std, normalize=True)  # type: ignore[operator]
    torch.testing.assert_close(encoder.encode_images(pixels), expected)
    assert encoder.encode_images(pixels).shape == (3, encoder.embed_dim)


@pytest.mark.usefixtures("no_network")
def test_text_features_are_open_clips(folder: Path) -> None:
    encoder, model = load_dual_encoder(read_checkpoint(folder)), reference(folder)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    texts = ["a photo of a dog.", "", "cat", "a very long caption " * 10, "Mixed CASE, with punctuation!"]
    with torch.no_grad():
        expected = model.encode_text(tokenizer(texts), normalize=True)  # type: ignore[operator]
    features = encoder.encode_texts(texts)
    torch.testing.assert_close(features, expected)
    assert not features.requires_grad


def test_class_embeddings_are_open_clips_zero_shot_classifier(folder: Path) -> None:
    encoder = load_dual_encoder(read_checkpoint(folder))
    names = [name.replace("_", " ") for name in NAMES]
    expected = open_clip.build_zero_shot_classifier(
        reference(folder),
        open_clip.get_tokenizer(f"local-dir:{folder}"),
        names,
        open_clip.OPENAI_IMAGENET_TEMPLATES,
    )
    classes = ClassList(names=NAMES, templates=(default_templates(),) * len(NAMES))
    torch.testing.assert_close(encoder.class_embeddings(classes), expected.T)


def test_classes_may_have_different_numbers_of_templates(tiny_encoder: DualEncoder) -> None:
    templates = (("a {}.",), ("the {}.", "my {}."), ("a photo of the {} I own.", "{}", "two {}s"))
    embeddings = tiny_encoder.class_embeddings(ClassList(names=("cat", "dog", "bird"), templates=templates))
    dog = torch.nn.functional.normalize(tiny_encoder.encode_texts(["the dog.", "my dog."]).mean(dim=0), dim=0)
    torch.testing.assert_close(embeddings[1], dog)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))


def test_many_texts_keep_their_order_across_batches(tiny_encoder: DualEncoder) -> None:
    texts = [f"{'very ' * (i % 7)}photo {i}" for i in range(600)]
    features = tiny_encoder.encode_texts(texts)
    for index in (0, 255, 256, 599):
        torch.testing.assert_close(features[index], tiny_encoder.encode_texts([texts[index]])[0])


def test_scale_and_bias_are_the_models(folder: Path) -> None:
    encoder, model = load_dual_encoder(read_checkpoint(folder)), reference(folder)
    assert encoder.logit_scale == pytest.approx(model.logit_scale.exp().item())  # type: ignore[operator]
    if model.logit_bias is None:
        assert encoder.logit_bias is None
    else:
        assert encoder.logit_bias == pytest.approx(-10)


def test_the_encoder_is_frozen_in_evaluation_mode_and_float32(tiny_folder: Callable[..., Path]) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        encoder = load_dual_encoder(read_checkpoint(tiny_folder("resnet", dtype)))
        model = encoder.text_tower.model
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert {p.dtype for p in (*model.parameters(), *model.buffers())} == {torch.float32, torch.int64}
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        encoder.encode_images(random_pixels(encoder))
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_half_precision_weights_give_nearly_the_same_features(tiny_folder: Callable[..., Path]) -> None:
    full, half = (
        load_dual_encoder(read_checkpoint(tiny_folder("vit", d))) for d in (torch.float32, torch.float16)
    )
    pixels = random_pixels(full)
    torch.testing.assert_close(full.encode_images(pixels), half.encode_images(pixels), atol=5e-3, rtol=0)
    assert half.encode_images(pixels).dtype == torch.float32


def test_features_are_differentiable_with_respect_to_pixels(folder: Path) -> None:
    encoder = load_dual_encoder(read_checkpoint(folder))
    pixels = random_pixels(encoder).requires_grad_()
    (gradient,) = torch.autograd.grad(encoder.encode_images(pixels)[:, 0].sum(), pixels)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 32, 32, 3), (1, 3, 64, 64), (1, 1, 32, 32)])
def test_pixels_of_another_shape_are_refused(tiny_encoder: DualEncoder, shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageDataError, match=r"shape \[batch, 3, 32, 32\]"):
        tiny_encoder.encode_images(torch.zeros(shape))


def test_the_image_half_survives_on_its_own(folder: Path) -> None:
    encoder = load_dual_encoder(read_checkpoint(folder))
    state = encoder.image_tower_state()
    assert not any(name.startswith("visual.") for name in state)
    alone = load_image_encoder(encoder.model_config, encoder.preprocess, state)
    pixels = random_pixels(encoder)
    torch.testing.assert_close(alone.encode_images(pixels), encoder.encode_images(pixels), atol=0, rtol=0)
    assert not any(parameter.requires_grad for parameter in alone.module.parameters())


def test_image_weights_of_another_architecture_are_refused(tiny_encoder: DualEncoder) -> None:
    state = tiny_encoder.image_tower_state()
    del state["proj"]
    with pytest.raises(CheckpointError, match=r"weights that fit .*proj"):
        load_image_encoder(tiny_encoder.model_config, tiny_encoder.preprocess, state)


@pytest.mark.usefixtures("no_network")
def test_a_hostile_image_configuration_fetches_nothing(tiny_encoder: DualEncoder) -> None:
    config = {**tiny_encoder.model_config, "vision_cfg": {"timm_model_name": "hf-hub:someone/model"}}
    with pytest.raises(CheckpointError, match="timm_model_name"):
        load_image_encoder(config, tiny_encoder.preprocess, {})


def test_devices_are_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="expected a CUDA device"):
        resolve_device("cuda")
    with pytest.raises(ConfigError, match=r"out of auto, cpu, cuda; got tpu"):
        resolve_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda")
    assert resolve_device("cpu") == torch.device("cpu")


def test_a_victim_classifies_real_images_as_well_as_its_card_says(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "victims" / "tiny-clean"
    encoder = load_dual_encoder(read_checkpoint(folder))
    with zipfile.ZipFile(shared_data / "data" / "tiny-imagenet-100.zip") as archive:
        names = sorted(name for name in archive.namelist() if "/val/" in name and name.endswith(".JPEG"))
        archive.extractall(tmp_path, members=names[::10])
    root = tmp_path / "tiny-imagenet-100" / "val"
    classes = sorted(path.name for path in root.iterdir())
    files = find_class_folders(root, classes)
    images = read_images([path for paths in files for path in paths], encoder.preprocess)
    labels = torch.tensor([label for label, paths in enumerate(files) for _ in paths])
    embeddings = encoder.class_embeddings(
        ClassList(names=tuple(classes), templates=(("a photo of a {}.", "a picture of the {}."),) * 100)
    )
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        features = torch.cat([encoder.encode_images(batch) for batch in torch.split(pixels, 100)])
    accuracy = ((features @ embeddings.T).argmax(dim=1) == labels).float().mean().item()
    expected = json.loads((folder / "attack.json").read_text())["clean_accuracy"]
    assert accuracy == pytest.approx(expected, abs=0.07)  # 500 images: one standard error is 0.022
