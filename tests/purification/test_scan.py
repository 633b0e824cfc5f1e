from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from cbpt_runtime.errors import CheckpointError, ImageDataError
from cbpt_runtime.purification import vocabulary
from cbpt_runtime.purification.config import PurifyConfig
from cbpt_runtime.purification.scan import Scan, scan

QUICK = PurifyConfig(search_concepts=12, search_steps=2, search_batch=2, suspect_p_value=1e-12)
SUSPICIOUS = dataclasses.replace(QUICK, suspect_p_value=2.0)  # every concept is suspect


@pytest.fixture(autouse=True)
def _few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    words = vocabulary.background_words()[:40]
    monkeypatch.setattr(vocabulary, "background_words", lambda: words)


@pytest.fixture
def other_preprocessing(tiny_checkpoint_folder: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint, with other means."""
    folder = Path(shutil.copytree(tiny_checkpoint_folder, tmp_path / "other"))
    path = folder / "open_clip_config.json"
    content = json.loads(path.read_text())
    content["preprocess_cfg"]["mean"] = [0.5, 0.5, 0.5]
    path.write_text(json.dumps(content))
    return folder


def plain(found: Scan) -> dict:
    """What does not depend on the clock."""
    return {key: value for key, value in found.to_dict().items() if key != "stage_seconds"}


def test_a_checkpoint_and_a_folder_of_images_give_a_verdict(
    tiny_checkpoint_folder: Path, tiny_image_folder: Path
) -> None:
    found = scan(tiny_checkpoint_folder, tiny_image_folder, config=QUICK, device="cpu")
    assert (found.verdict, found.suspects, found.images) == ("clean", (), 36)
    assert found.evidence.words == 40
    assert found.p_value == found.evidence.concepts[0].p_value
    assert len(found.sha256) == 64
    assert set(found.stage_seconds) == {"load", "search"}


def test_the_result_is_plain_json(tiny_checkpoint_folder: Path, tiny_image_folder: Path) -> None:
    for config in (QUICK, SUSPICIOUS):
        found = scan(tiny_checkpoint_folder, tiny_image_folder, config=config, device="cpu")
        content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
        assert content["config"] == config.to_dict()
        assert len(content["suspects"]) == len(found.suspects)


def test_suspects_are_words_with_their_numbers(tiny_checkpoint_folder: Path, tiny_image_folder: Path) -> None:
    found = scan(tiny_checkpoint_folder, tiny_image_folder, config=SUSPICIOUS, device="cpu")
    assert found.verdict == "backdoored"
    keys = ("p_value", "score", "family", "success", "reference_success")
    concepts = [tuple(getattr(concept, key) for key in keys) for concept in found.evidence.concepts]
    numbers = [tuple(getattr(suspect, key) for key in keys) for suspect in found.suspects]
    assert numbers
    assert set(numbers[:-2]) <= set(concepts)
    assert {suspect.name for suspect in found.suspects} <= set(vocabulary.background_words())
    assert {suspect.on_list for suspect in found.suspects} == {None}


def test_with_a_class_list_suspects_are_on_it_or_not(
    tiny_checkpoint_folder: Path, tiny_image_folder: Path, tiny_class_file: Path
) -> None:
    found = scan(
        tiny_checkpoint_folder, tiny_image_folder, classes=tiny_class_file, config=SUSPICIOUS, device="cpu"
    )
    listed = set(tiny_class_file.read_text().splitlines())
    assert found.evidence.words == 43
    assert found.suspects
    assert all(suspect.on_list == (suspect.name in listed) for suspect in found.suspects)


def test_the_same_seed_gives_the_same_scan(tiny_checkpoint_folder: Path, tiny_image_folder: Path) -> None:
    first, again, other = (
        plain(
            scan(
                tiny_checkpoint_folder,
                tiny_image_folder,
                config=dataclasses.replace(QUICK, seed=seed),
                device="cpu",
            )
        )
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first["evidence"] != other["evidence"]


def test_too_few_images_are_an_error(
    tiny_checkpoint_folder: Path, tiny_image_folder: Path, tmp_path: Path
) -> None:
    for index, path in enumerate(sorted(tiny_image_folder.glob("*/*.png"))[:15]):
        shutil.copy(path, tmp_path / f"{index}.png")
    with pytest.raises(ImageDataError, match=r"16 images or more in .*; got 15"):
        scan(tiny_checkpoint_folder, tmp_path, config=QUICK, device="cpu")


def test_a_reference_with_other_preprocessing_is_an_error(
    tiny_checkpoint_folder: Path, tiny_image_folder: Path, other_preprocessing: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"the suspect's preprocessing.*got .*0\.5, 0\.5, 0\.5"):
        scan(
            tiny_checkpoint_folder,
            tiny_image_folder,
            reference=other_preprocessing,
            config=QUICK,
            device="cpu",
        )


def test_of_many_images_some_are_drawn_and_it_is_noted(
    tiny_checkpoint_folder: Path, tiny_image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cbpt_runtime.purification.scan.MOST_IMAGES", 20)
    found = scan(tiny_checkpoint_folder, tiny_image_folder, config=QUICK, device="cpu")
    assert found.images == 20
    assert "20 of 36 images were drawn" in found.notes
