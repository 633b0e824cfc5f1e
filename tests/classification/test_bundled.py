from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cbpt_runtime.bundle import ENCODER, Bundle
from cbpt_runtime.classification.bundled import BundleClassifier
from cbpt_runtime.errors import BundleError, CheckpointError, ImageDataError
from cbpt_runtime.loading import open_classifier
from cbpt_runtime.models.clip import DualEncoder
from cbpt_runtime.runtime import zero_shot


@pytest.fixture
def classifier(tiny_bundle: Bundle) -> BundleClassifier:
    return BundleClassifier.from_bundle(tiny_bundle)


@pytest.fixture
def image_files(tiny_image_folder: Path) -> list[Path]:
    return sorted(tiny_image_folder.rglob("*.png"))


def test_features_equal_those_of_the_suspect_checkpoint(
    classifier: BundleClassifier, tiny_encoder: DualEncoder, image_files: list[Path]
) -> None:
    images = classifier.read(image_files)
    with torch.no_grad():
        expected = tiny_encoder.encode_images(torch.from_numpy(images).permute(0, 3, 1, 2) / 255).numpy()
    np.testing.assert_allclose(classifier.features(images, batch_size=7), expected, atol=1e-6)


def test_a_prediction_is_what_the_two_heads_say(
    classifier: BundleClassifier, tiny_bundle: Bundle, image_files: list[Path]
) -> None:
    images = classifier.read(image_files[:5])
    features = classifier.features(images)
    prediction = classifier.predict(images)
    scale = tiny_bundle.logit_scale
    np.testing.assert_allclose(
        prediction.logits, scale * features @ tiny_bundle.class_embeddings.T, rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
        prediction.reference_logits,
        scale * features @ tiny_bundle.reference_embeddings.T,
        rtol=1e-5,
        atol=1e-5,
    )
    np.testing.assert_array_equal(
        prediction.alarm, zero_shot.alarm(prediction.reference_logits, prediction.logits, (2,))
    )
    np.testing.assert_array_equal(prediction.labels, prediction.probabilities.argmax(axis=1))


def test_a_classifier_is_called_with_images_of_every_kind(
    tiny_bundle: Bundle, image_files: list[Path]
) -> None:
    classifier, path = open_classifier(tiny_bundle.path, device="cpu"), image_files[0]
    with Image.open(path) as image:
        picture, array = image.convert("RGBA"), np.asarray(image.convert("RGB"))
    expected = classifier.classify([(str(path), path)], top=2)[0]
    assert classifier(path, top=2) == classifier(str(path), top=2) == expected
    found = classifier([path.read_bytes(), picture, array], top=2)
    assert [answer.image for answer in found] == ["image 1", "image 2", "image 3"]
    for answer in found:
        assert [label.name for label in answer.labels] == [label.name for label in expected.labels]
        assert answer.alarm == pytest.approx(expected.alarm, abs=1e-5)
    assert str(expected).startswith(f"{path}: {expected.labels[0].name} ")
    assert "\n" not in str(expected) + repr(classifier) + repr(classifier.bundle)


@pytest.mark.parametrize(
    "array", [np.zeros((8, 8, 3), np.float32), np.zeros((3, 8, 8), np.uint8), np.zeros((0, 8, 3), np.uint8)]
)
def test_an_array_that_is_no_picture_is_named(classifier: BundleClassifier, array: np.ndarray) -> None:
    with pytest.raises(ImageDataError, match=r"image 2: .*\["):
        classifier([np.zeros((8, 8, 3), np.uint8), array])


def test_a_notebook_shows_a_bundle_as_a_table_without_markup_of_its_names(tiny_bundle: Bundle) -> None:
    suspect = {**tiny_bundle.manifest["suspects"][0], "name": "<b>cat</b>"}
    manifest = {**tiny_bundle.manifest, "suspects": [suspect]}
    shown = dataclasses.replace(tiny_bundle, manifest=manifest)._repr_html_()
    assert "&lt;b&gt;cat&lt;/b&gt;" in shown
    assert "<b>" not in shown
    assert tiny_bundle.digest in shown


@pytest.mark.parametrize("p_value", [None, {"a": 1}, "x"])
def test_a_notebook_shows_a_bundle_whose_p_value_is_no_number(tiny_bundle: Bundle, p_value: object) -> None:
    suspect = {**tiny_bundle.manifest["suspects"][0], "p_value": p_value}
    manifest = {**tiny_bundle.manifest, "suspects": [suspect]}
    shown = dataclasses.replace(tiny_bundle, manifest=manifest)._repr_html_()
    assert "suspect: Blue Stripes" in shown
    assert "p = " not in shown


def test_weights_that_are_no_safetensors_are_refused_though_the_manifest_fits(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_bundle.path, tmp_path / "bundle"))
    content = b"\xff" * 100
    (folder / "encoder.safetensors").write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
    manifest["files"]["encoder.safetensors"] = entry
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"expected safetensors in .*encoder\.safetensors"):
        BundleClassifier.from_bundle(folder)


def test_preprocessing_for_another_size_than_the_models_is_refused(tiny_bundle: Bundle) -> None:
    model = tiny_bundle.manifest["model"]
    preprocess = {**model["preprocess"], "image_size": [16, 3]}
    manifest = {**tiny_bundle.manifest, "model": {**model, "preprocess": preprocess}}
    with pytest.raises(CheckpointError, match="for the 32×32 pixels of the model; got one for 3×16"):
        BundleClassifier.from_bundle(dataclasses.replace(tiny_bundle, manifest=manifest))


def test_no_images_give_an_empty_prediction(classifier: BundleClassifier) -> None:
    assert classifier.predict(classifier.read([])).logits.shape == (0, 3)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((1, 32, 32, 3), np.float32),
        np.zeros((1, 3, 32, 32), np.uint8),
        np.zeros((32, 32, 3), np.uint8),
    ],
)
def test_pixels_of_another_kind_are_refused(classifier: BundleClassifier, images: np.ndarray) -> None:
    with pytest.raises(ImageDataError, match=r"uint8 images \[batch, 32, 32, 3\]"):
        classifier.predict(images)


def test_all_unreadable_images_are_named_at_once(classifier: BundleClassifier, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    with pytest.raises(ImageDataError, match=r"broken\.jpg.*missing\.jpg.*image 3"):
        classifier.read([tmp_path / "broken.jpg", str(tmp_path / "missing.jpg"), b""])


def test_a_changed_encoder_is_not_loaded(tiny_bundle: Bundle, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    copy.mkdir()
    for file in tiny_bundle.path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    data = bytearray((copy / ENCODER).read_bytes())
    data[-1] ^= 1
    (copy / ENCODER).write_bytes(data)
    with pytest.raises(BundleError, match=ENCODER):
        BundleClassifier.from_bundle(copy)


def test_answers_list_the_most_likely_labels_first(
    classifier: BundleClassifier, image_files: list[Path]
) -> None:
    sources = [(path.name, path) for path in image_files[:4]] + [("-", image_files[0].read_bytes())]
    answers = classifier.classify(sources, top=2, batch_size=3)
    assert [answer.image for answer in answers] == [name for name, _ in sources]
    assert all(answer.labels[0].probability >= answer.labels[1].probability for answer in answers)
    assert answers[0].labels == answers[-1].labels
    assert len(classifier.classify(sources[:1], top=99)[0].labels) == 3
