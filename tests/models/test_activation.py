from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cbpt_runtime.models import activation
from cbpt_runtime.models.activation import UNTRIED, settle_activation
from cbpt_runtime.models.checkpoint import Checkpoint, read_checkpoint
from cbpt_runtime.models.clip import DualEncoder, load_dual_encoder
from cbpt_runtime.models.data import ClassList

CLASSES = ClassList(names=("cat", "dog"), templates=(("a {}",), ("a {}",)))


@pytest.fixture
def nameless(tiny_checkpoint_folder: Path, tmp_path: Path) -> Checkpoint:
    """Weights alone, for which a configuration that does not say the activation was given."""
    config = tmp_path / "config.json"
    config.write_text((tiny_checkpoint_folder / "open_clip_config.json").read_text())
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes((tiny_checkpoint_folder / "open_clip_model.safetensors").read_bytes())
    return read_checkpoint(weights, model=config)


IMAGES = np.zeros((400, 32, 32, 3), np.uint8)
LABELS = np.zeros(400, np.int64)


@pytest.fixture
def knowing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`knowing(quick=, plain=)`: how many of 400 images a model names rightly with either activation."""

    def know(*, quick: int, plain: int) -> None:
        def right(encoder: DualEncoder, *_: object) -> np.ndarray:
            return np.arange(400) < (quick if encoder.model_config.get("quick_gelu") else plain)

        monkeypatch.setattr(activation, "_right", right)

    return know


def test_the_activation_that_is_clearly_better_is_taken(nameless: Checkpoint, knowing: Callable) -> None:
    knowing(quick=240, plain=60)
    found = settle_activation(nameless, CLASSES, IMAGES, LABELS)
    assert found.model_config["quick_gelu"] is True
    assert found.notes[-1] == (
        "QuickGELU taken instead of GELU, which --model says: of 400 clean images right with"
        " QuickGELU 60.0%, GELU 15.0%"
    )


def test_the_activation_that_was_named_and_is_better_stays(nameless: Checkpoint, knowing: Callable) -> None:
    knowing(quick=60, plain=240)
    assert settle_activation(nameless, CLASSES, IMAGES, LABELS) == nameless


def test_images_that_do_not_tell_leave_it_as_named_and_say_so(
    nameless: Checkpoint, knowing: Callable
) -> None:
    knowing(quick=108, plain=100)
    found = settle_activation(nameless, CLASSES, IMAGES, LABELS)
    assert found.model_config == nameless.model_config
    assert found.notes[-1].startswith("GELU or QuickGELU: clean images do not tell")


def test_the_two_are_really_different_models(nameless: Checkpoint) -> None:
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features = [
        load_dual_encoder(
            replace(nameless, model_config={**nameless.model_config, "quick_gelu": quick})
        ).encode_images(pixels)
        for quick in (True, False)
    ]
    assert not torch.allclose(*features, atol=1e-4)


def test_what_is_said_is_not_tried(
    tiny_checkpoint_folder: Path, nameless: Checkpoint, tmp_path: Path
) -> None:
    assert not read_checkpoint(tiny_checkpoint_folder).activation_is_guessed
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_cfg"]["quick_gelu"] = False
    (tmp_path / "said.json").write_text(json.dumps(config))
    weights = tmp_path / "weights.safetensors"
    assert not read_checkpoint(weights, model=tmp_path / "said.json").activation_is_guessed


def test_every_verb_settles_or_says_that_it_did_not(
    run: Callable, nameless: Checkpoint, tiny_class_file: Path, tiny_image_folder: Path, tmp_path: Path
) -> None:
    words = (
        tmp_path / "weights.safetensors",
        "--model",
        tmp_path / "config.json",
        "--images",
        tiny_image_folder,
    )
    said = run("evaluate", *words, "--classes", tiny_class_file, "--template", "a {}", "--json")
    assert any("QuickGELU" in note for note in json.loads(said.out)["notes"])
    quick = tmp_path / "quick.json"
    quick.write_text('{"search_steps": 1, "search_concepts": 8, "inversion_steps": 1}')
    assert UNTRIED in run("scan", *words, "--config", quick).err


def test_an_architecture_by_its_name_is_a_guess(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.pt")
    assert read_checkpoint(tmp_path / "weights.pt", model="RN50").activation_is_guessed
    assert read_checkpoint(tmp_path / "weights.pt", model="RN50-quickgelu").activation_is_guessed
