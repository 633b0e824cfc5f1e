from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from cbpt_runtime.bundle import HEAD, Bundle
from cbpt_runtime.classification.bundled import BundleClassifier
from cbpt_runtime.errors import ClassListError, ConfigError, ImageDataError
from cbpt_runtime.evaluation import evaluate, evaluate_all
from cbpt_runtime.models.class_lists import read_class_list
from cbpt_runtime.models.data import find_class_folders
from cbpt_runtime.redteam.image_triggers import BadNet, BadNetRandom
from cbpt_runtime.redteam.triggers import apply_trigger

TARGET = "blue_stripes"
LOGIT_ROUNDING = 100 * float(np.finfo(np.float32).eps)


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
    classifier = BundleClassifier.from_bundle(bundle)
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
    level = np.sort(alarms[1])[14 - 14]  # 95 % of 14 images are all of them
    # Features in batches of another size differ in their last float32 bit, which the logit scale stretches.
    assert result.alarm.threshold == pytest.approx(level, rel=LOGIT_ROUNDING)
    assert result.alarm.false_alarm_rate.rate == np.mean(alarms[0] >= level * (1 - LOGIT_ROUNDING))


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


def test_a_trigger_put_on_the_fly_measures_what_a_folder_of_its_pictures_does(
    tiny_bundle: Bundle, tiny_image_folder: Path, tmp_path: Path
) -> None:
    trigger = BadNetRandom(size=9)
    generator = torch.Generator().manual_seed(5)
    classifier = BundleClassifier.from_bundle(tiny_bundle)
    folders = find_class_folders(tiny_image_folder, tiny_bundle.class_names)
    files = [file for folder in folders for file in folder]
    for start in range(0, len(files), 64):
        images = apply_trigger(trigger, classifier.read(files[start : start + 64]), generator)
        for file, image in zip(files[start : start + 64], images, strict=True):
            (tmp_path / file.parent.name).mkdir(exist_ok=True)
            Image.fromarray(image).save(tmp_path / file.parent.name / file.name)
    stored = evaluate(tiny_bundle, tiny_image_folder, tmp_path, TARGET, device="cpu")
    applied = evaluate(tiny_bundle, tiny_image_folder, target=TARGET, attack=trigger, seed=5, device="cpu")
    assert (stored.before, stored.after, stored.alarm) == (applied.before, applied.after, applied.alarm)
    assert applied.attack == {
        "kind": "BadNetRandom", "size": 9, "location": "random", "overflow": "clamp", "seed": 5
    }  # fmt: skip
    again = evaluate(tiny_bundle, tiny_image_folder, target=TARGET, attack=trigger, seed=5, device="cpu")
    assert again.to_dict() == applied.to_dict()


def test_a_checkpoint_beside_its_bundle_has_the_rates_of_the_original_head(
    tiny_bundle: Bundle, tiny_checkpoint_folder: Path, tiny_image_folder: Path, tiny_class_file: Path
) -> None:
    pair = evaluate_all([tiny_bundle.path, tiny_checkpoint_folder], tiny_image_folder, target=TARGET)
    assert [found.kind for found in pair] == ["bundle", "checkpoint"]
    assert pair[1].after is None
    assert pair[1].alarm is None
    classes = read_class_list(tiny_class_file, templates=["a photo of a {}."])
    alone = evaluate(tiny_checkpoint_folder, tiny_image_folder, target=TARGET, classes=classes)
    assert alone.before == pair[1].before
    assert alone.digest == pair[1].digest


def test_a_checkpoint_alone_needs_a_class_list(tiny_checkpoint_folder: Path, tiny_image_folder: Path) -> None:
    with pytest.raises(ConfigError, match="--classes"):
        evaluate(tiny_checkpoint_folder, tiny_image_folder)


def test_bundles_of_different_classes_do_not_share_a_table(
    tiny_bundle: Bundle, tiny_image_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "classes.txt").write_text("one\ntwo\n")
    with pytest.raises(ClassListError, match="one class list"):
        evaluate(tiny_bundle, tiny_image_folder, classes=read_class_list(tmp_path / "classes.txt"))


def test_a_folder_and_an_attack_at_once_are_refused(tiny_bundle: Bundle, tiny_image_folder: Path) -> None:
    with pytest.raises(ConfigError, match="--triggered or --attack"):
        evaluate(tiny_bundle, tiny_image_folder, tiny_image_folder, TARGET, attack=BadNet(size=4))
    with pytest.raises(ConfigError, match="--target"):
        evaluate(tiny_bundle, tiny_image_folder, attack=BadNet(size=4))


def test_a_trigger_larger_than_the_model_sees_is_refused(
    tiny_bundle: Bundle, tiny_image_folder: Path
) -> None:
    with pytest.raises(ImageDataError, match="at least 40x40"):
        evaluate(tiny_bundle, tiny_image_folder, target=TARGET, attack=BadNet(size=40), device="cpu")


def test_the_dictionary_is_json_and_adds_up_class_by_class(
    tiny_bundle: Bundle, tiny_image_folder: Path, triggered_folder: Path
) -> None:
    result = evaluate(tiny_bundle, tiny_image_folder, triggered_folder, TARGET, device="cpu")
    plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert sum(row["right_after"] for row in plain["per_class"]) == plain["after"]["clean_accuracy"]["count"]
    assert sum(row["before"] for row in plain["triggered_predictions"]) == plain["triggered_images"] == 14
    assert plain["alarm"]["auroc"]["low"] <= plain["alarm"]["auroc"]["value"]


def test_a_few_pictures_are_kept_to_look_at(tiny_bundle: Bundle, tiny_image_folder: Path) -> None:
    small = evaluate(tiny_bundle, tiny_image_folder, device="cpu", batch_size=5).clean
    large = evaluate(tiny_bundle, tiny_image_folder, device="cpu", batch_size=64).clean
    assert small.shown.tolist() == large.shown.tolist() == [0, 7, 14, 21, 28, 35]
    np.testing.assert_array_equal(small.pictures, large.pictures)
