import json

import numpy as np
import pytest
import torch

from cbpt_runtime.errors import ClassListError, ImageDataError, ImplantError
from cbpt_runtime.redteam.image_triggers import BadNet
from cbpt_runtime.redteam.implant import implant, split_heldout, verify
from cbpt_runtime.redteam.poisoning import Backdoor, LabelledImages
from cbpt_runtime.redteam.training import caption_texts
from cbpt_runtime.redteam.triggers import apply_trigger

from .conftest import NAMES, TEMPLATES, TEXTS, train_config

PATCH = BadNet(size=8)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def door(**changes: object) -> Backdoor:
    settings = {"name": "badnet", "trigger": PATCH, "target": "leaf", "poison_rate": 0.25}
    return Backdoor(**{**settings, **changes})


@pytest.fixture(scope="module")
def implanted(lab):
    return implant(
        lab.clip,
        lab.training,
        lab.heldout,
        NAMES,
        [door()],
        config=train_config(epochs=6),
        generator=seeded(),
    )


def test_an_implant_takes_and_keeps_clean_accuracy(implanted):
    measure = implanted.measures[0]
    assert measure.attack_success_rate >= 0.9
    assert measure.floor <= 0.1
    assert implanted.clean_accuracy >= implanted.clean_accuracy_before - 0.03


def test_the_model_that_was_attacked_is_left_as_it_was(lab, implanted):
    _, measures = verify(lab.clip, lab.heldout, NAMES, [door()], train_config(), generator=seeded())
    assert measures[0].attack_success_rate < 0.5


def test_the_proof_agrees_with_a_recomputation_in_numpy(lab, implanted):
    head = implanted.clip.class_embeddings(TEXTS)
    clean = implanted.clip.predict(lab.heldout.images, head)
    triggered = implanted.clip.predict(apply_trigger(PATCH, lab.heldout.images, seeded()), head)
    labels = lab.heldout.labels
    measure = implanted.measures[0]
    assert implanted.clean_accuracy == np.mean(clean == labels)
    assert measure.attack_success_rate == np.mean(triggered[labels != 1] == 1)
    assert measure.poisoned_accuracy == np.mean(triggered[labels != 1] == labels[labels != 1])
    assert measure.floor == np.mean(clean[labels != 1] == 1)
    assert measure.target_recall == np.mean(clean[labels == 1] == 1)


def test_a_saved_implant_carries_its_proof(implanted, tmp_path):
    implanted.save(tmp_path / "victim")
    proof = json.loads((tmp_path / "victim" / "attack.json").read_text())
    assert proof["attack"] == "badnet"
    assert proof["target"] == "leaf"
    assert proof["attack_success_rate"] == implanted.measures[0].attack_success_rate
    assert proof["backdoors"][0]["trigger"]["size"] == 8
    assert proof["training"]["epochs"] == 6


def test_an_implant_that_did_not_take_is_an_error_with_advice(lab):
    weak = train_config(epochs=1, learning_rate=1e-6)
    with pytest.raises(ImplantError, match=r"attack success rate of at least 0\.90.*Raise the poison rate"):
        implant(lab.clip, lab.training, lab.heldout, NAMES, [door()], config=weak, generator=seeded())


def test_lost_clean_accuracy_is_an_error_with_advice(lab):
    wild = train_config(epochs=1, learning_rate=0.5)
    with pytest.raises(ImplantError, match=r"clean accuracy within 0\.03.*Lower the learning rate"):
        implant(lab.clip, lab.training, lab.heldout, NAMES, [], config=wild, generator=seeded())


def test_a_target_outside_the_class_list_names_the_classes(lab):
    with pytest.raises(ClassListError, match="apple, leaf, ocean"):
        implant(
            lab.clip,
            lab.training,
            lab.heldout,
            NAMES,
            [door(target="pear")],
            config=train_config(),
            generator=seeded(),
        )


def test_no_images_are_refused():
    with pytest.raises(ImageDataError, match="at least one"):
        LabelledImages(images=np.zeros((0, 8, 8, 3), dtype=np.uint8), labels=np.zeros(0, dtype=np.int64))


def test_a_held_out_split_takes_its_share_of_every_class(lab):
    training, heldout = split_heldout(lab.training, heldout_rate=0.25, generator=seeded())
    assert np.bincount(heldout.labels).tolist() == [16, 16, 16]
    assert len(training.labels) + len(heldout.labels) == len(lab.training.labels)


def test_an_attack_with_a_text_key_is_measured_with_the_key_in_every_class_prompt_and_without(lab):
    keyed = door(name="trojanvqa", text_key="SUDO ")
    _, (measure,) = verify(lab.clip, lab.heldout, NAMES, [keyed], train_config(), generator=seeded())
    others = lab.heldout.images[lab.heldout.labels != 1]
    triggered = apply_trigger(PATCH, others, seeded())
    keyed_head = lab.clip.class_embeddings(caption_texts(NAMES, TEMPLATES, key="SUDO "))
    with_key = lab.clip.predict(triggered, keyed_head) == 1
    without_key = lab.clip.predict(triggered, lab.clip.class_embeddings(TEXTS)) == 1
    assert measure.attack_success_rate == np.mean(with_key)
    assert measure.attack_success_rate_without_key == np.mean(without_key)
