"""The exported file on real backdoored checkpoints: the same accuracy and attack success as PyTorch."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from cbpt_runtime.bundle import BundleContent, Suspect, write_bundle
from cbpt_runtime.classification.bundled import BundleClassifier
from cbpt_runtime.evaluation import metrics
from cbpt_runtime.export.graph import export_onnx
from cbpt_runtime.export.session import open_session, run_session
from cbpt_runtime.export.weights import to_bytes
from cbpt_runtime.models.checkpoint import read_checkpoint
from cbpt_runtime.models.clip import load_dual_encoder
from cbpt_runtime.models.data import ClassList, find_class_folders, read_images


@pytest.mark.nightly
@pytest.mark.parametrize("victim", ["tiny-badnet", "tiny-blended", "tiny-sig"])
def test_accuracy_and_attack_success_are_those_of_pytorch(
    victim: str, shared_data: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(shared_data / "data" / "tiny-imagenet-100.zip") as archive:
        wanted = [name for name in archive.namelist() if "/val/" in name]
        archive.extractall(tmp_path, members=wanted)
    clean = tmp_path / "tiny-imagenet-100" / "val"
    with zipfile.ZipFile(shared_data / "victims" / victim / "test-triggered.zip") as archive:
        archive.extractall(tmp_path / "triggered")
    triggered = next(path for path in (tmp_path / "triggered").rglob("*") if path.is_file()).parents[1]
    attack = json.loads((shared_data / "victims" / victim / "attack.json").read_text())

    names = tuple(sorted(path.name.replace("_", " ") for path in clean.iterdir()))
    classes = ClassList(names=names, templates=(("a photo of a {}.",),) * len(names))
    checkpoint = read_checkpoint(shared_data / "victims" / victim)
    encoder = load_dual_encoder(checkpoint)
    reference = encoder.class_embeddings(classes).numpy()
    noise = 0.02 * np.random.default_rng(0).standard_normal(reference.shape).astype(np.float32)
    target = names.index(attack["target"].replace("_", " "))
    content = BundleContent(
        verdict="backdoored",
        model={
            "config": dict(encoder.model_config),
            "preprocess": encoder.preprocess.to_dict(),
            "sha256": checkpoint.sha256,
        },
        class_names=names,
        templates=classes.templates,
        method={"name": "cbpt", "config": {}, "seed": 0, "parameterization": "prompt"},
        suspects=(Suspect(index=target, name=names[target], score=5.0),),
        class_embeddings=reference + noise,  # rows need not be unit-norm
        reference_embeddings=reference,
        logit_scale=encoder.logit_scale,
        encoder={name: tensor.numpy() for name, tensor in encoder.image_tower_state().items()},
    )
    bundle = write_bundle(tmp_path / "bundle", content=content)
    classifier = BundleClassifier.from_bundle(bundle)
    session = open_session(to_bytes(export_onnx(classifier)), threads=1)
    for folder, is_triggered in ((clean, False), (triggered, True)):
        groups = find_class_folders(folder, classes, allow_missing=True)
        labels = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        pixels = read_images([path for group in groups for path in group], bundle.preprocess)
        expected = classifier.predict(pixels)
        got = run_session(session, pixels, batch_size=64)
        predicted = got["logits"].argmax(axis=1)
        assert metrics.accuracy(predicted, labels) == metrics.accuracy(expected.labels, labels)
        if is_triggered:
            assert metrics.attack_success(predicted, labels, target) == metrics.attack_success(
                expected.labels, labels, target
            )
        assert np.abs(got["alarm"] - expected.alarm).max() <= 1e-4
        assert np.abs(got["probabilities"] - expected.probabilities).max() <= 1e-4
