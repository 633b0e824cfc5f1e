from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from cbpt_runtime.bundle import HEAD, Bundle
from cbpt_runtime.classifier import ZeroShotClassifier
from cbpt_runtime.errors import ClassListError, ConfigError, ImageDataError
from cbpt_runtime.evaluation import evaluate
from cbpt_runtime.models.data import find_class_folders

TARGET = "blue_stripes"


@pytest.fixture
def triggered_folder(tiny_image_folder: Path, tmp_path: Path) -> Path:
    """Some images of the two classes that are not the target, with a white corner."""
    for folder in sorted(tiny_image_folder.iterdir()):
        if folder.name.casefold() == TARGET:
            continue
        (tmp_path / "triggered" / folder.name).mkdir(parents=True)
        for file in sorted(folder.iterdir())[:7]:
            pixels = np.array(Image.open(file))
            pixels[:6, :6] = 255
            Image.fromarray(pixels).save(tmp_path / "triggered" / folder.name / file.name)
    return tmp_path / "triggered"


def logits_by_hand(bundle: Bundle, root: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels and both heads' logits, from the files on disk with NumPy alone (features aside)."""
    folders = find_class_folders(root, bundle.class_names, allow_missing=True)
    classifier = ZeroShotClassifier.from_bundle(bundle)
    features = classifier.features(classifier.read([file for folder in folders for file in folder]))
    labels = np.array([label for label, folder in enumerate(folders) for _ in folder])
    head = load_file(bundle.path / HEAD)
    scale = head["logit_scale"]
    return (
        labels,
        scale * features @ head["reference_embeddings"].T,
        scale * features @ head["class_embeddings"].T,
    )


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits.astype(np.float64))
    return powers / powers.sum(axis=1, keepdims=True)


def test_all_rates_agree_with_an_independent_recomputation(
    tiny_bundle: Bundle, tiny_image_folder: Path, triggered_folder: Path
) -> None:
    result = evaluate(tiny_bundle, tiny_image_folder, triggered_folder, TARGET, device="cpu", batch_size=5)
    clean_labels, *clean = logits_by_hand(tiny_bundle, tiny_image_folder)
    labels, *triggered = logits_by_hand(tiny_bundle, triggered_folder)
    assert (result.clean_images, result.triggered_images) == (36, 14)
    for rates, clean_logits, logits in zip((result.before, result.after), clean, triggered, strict=True):
        called, clean_called = logits.argmax(axis=1), clean_logits.argmax(axis=1)
        other, clean_other = labels != 2, clean_labels != 2
        assert rates.clean_accuracy.rate == np.mean(clean_called == clean_labels)
        assert rates.floor.rate == np.mean(clean_called[clean_other] == 2)
        assert rates.target_recall.rate == np.mean(clean_called[~clean_other] == 2)
        assert rates.attack_success_rate.rate == np.mean(called[other] == 2)
        assert rates.attack_success_rate_inclusive.rate == np.mean(called == 2)
        assert rates.poisoned_accuracy.rate == np.mean(called == labels)
    alarms = [softmax(before)[:, 2] * (1 - softmax(after)[:, 2]) for before, after in (clean, triggered)]
    pairs = np.sign(alarms[1][:, None] - alarms[0][None, :])
    assert result.alarm_auroc == pytest.approx(((pairs + 1) / 2).mean(), abs=1e-12)


def test_images_of_the_target_count_only_in_the_inclusive_rate(
    tiny_bundle: Bundle, tiny_image_folder: Path
) -> None:
    result = evaluate(tiny_bundle, tiny_image_folder, tiny_image_folder, TARGET, device="cpu")
    assert result.after.attack_success_rate.total == 24
    assert result.after.attack_success_rate_inclusive.total == 36
    assert result.after.attack_success_rate == result.after.floor


def test_clean_images_alone_give_clean_accuracy_alone(tiny_bundle: Bundle, tiny_image_folder: Path) -> None:
    result = evaluate(tiny_bundle.path, tiny_image_folder, device="cpu")
    assert result.after.floor is None
    assert result.after.attack_success_rate is None
    assert result.alarm_auroc is None


def test_a_target_alone_adds_floor_and_recall(tiny_bundle: Bundle, tiny_image_folder: Path) -> None:
    result = evaluate(tiny_bundle, tiny_image_folder, target=TARGET, device="cpu")
    assert result.target == "Blue Stripes"
    assert result.after.floor.total == 24
    assert result.after.poisoned_accuracy is None


def test_triggered_images_without_a_target_are_refused(tiny_bundle: Bundle, tiny_image_folder: Path) -> None:
    with pytest.raises(ConfigError, match="--target"):
        evaluate(tiny_bundle, tiny_image_folder, tiny_image_folder)


def test_an_unknown_target_lists_the_classes(tiny_bundle: Bundle, tiny_image_folder: Path) -> None:
    with pytest.raises(ClassListError, match=r"'dog'.*red_square, green disc, Blue Stripes"):
        evaluate(tiny_bundle, tiny_image_folder, target="dog")


def test_a_clean_folder_must_have_every_class(
    tiny_bundle: Bundle, tiny_image_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_image_folder, tmp_path / "images")
    shutil.rmtree(tmp_path / "images" / "red_square")
    (tmp_path / "images" / "dog").mkdir()
    with pytest.raises(ImageDataError, match="missing: red_square; not in the class list: dog"):
        evaluate(tiny_bundle, tmp_path / "images")
