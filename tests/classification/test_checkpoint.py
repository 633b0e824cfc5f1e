from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cbpt_runtime.bundle import Bundle
from cbpt_runtime.classification.checkpoint import DESCRIBING, UNRELATED, bdetclip
from cbpt_runtime.errors import ConfigError
from cbpt_runtime.evaluation import evaluate, evaluate_all
from cbpt_runtime.evaluation.metrics import auroc
from cbpt_runtime.evaluation.tables import table_rows
from cbpt_runtime.models.class_lists import read_class_list
from cbpt_runtime.models.clip import DualEncoder
from cbpt_runtime.redteam.image_triggers import BadNet

NAMES = ("red_square", "green disc")


def test_the_score_is_the_published_sum_with_its_sign_turned(tiny_encoder: DualEncoder) -> None:
    features = np.random.default_rng(0).standard_normal((4, tiny_encoder.embed_dim)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    expected = np.zeros(4)
    for name in NAMES:
        for templates, sign in ((DESCRIBING, 1), (UNRELATED, -1)):
            texts = [template.replace("{}", name.replace("_", " ")) for template in templates]
            mean = tiny_encoder.encode_texts(texts).numpy().mean(axis=0)
            expected += sign * features @ (mean / np.linalg.norm(mean))
    np.testing.assert_allclose(bdetclip(tiny_encoder, NAMES)(features), -expected, atol=1e-5)


def test_a_checkpoint_is_measured_with_the_detector_as_a_bundle_with_its_alarm(
    tiny_bundle: Bundle, tiny_checkpoint_folder: Path, tiny_image_folder: Path
) -> None:
    alarm, detector = evaluate_all(
        [tiny_bundle, tiny_checkpoint_folder],
        tiny_image_folder,
        target="blue stripes",
        attack=BadNet(size=8),
        detector="bdetclip",
    )
    assert (alarm.detector, detector.detector) == ("alarm", "bdetclip")
    assert detector.alarm is not None
    assert detector.clean is not None
    assert detector.triggered is not None
    attacks = detector.triggered.alarm[detector.triggered.labels != 2]
    assert detector.alarm.auroc.value == auroc(attacks, detector.clean.alarm)
    assert detector.alarm.auroc.low <= detector.alarm.auroc.value <= detector.alarm.auroc.high
    columns, rows = table_rows([alarm, detector])
    assert [row[1] for row in rows] == ["before", "after", "zero-shot, bdetclip"]
    assert rows[2][columns.index("detection AUROC")].startswith(f"{detector.alarm.auroc.value:.4f} [")


def test_a_checkpoint_without_a_detector_has_no_alarm(
    tiny_checkpoint_folder: Path, tiny_image_folder: Path, tiny_class_file: Path
) -> None:
    found = evaluate(tiny_checkpoint_folder, tiny_image_folder, classes=read_class_list(tiny_class_file))
    assert (found.alarm, found.detector) == (None, None)


def test_bundles_alone_cannot_be_measured_with_the_detector(
    tiny_bundle: Bundle, tiny_image_folder: Path
) -> None:
    with pytest.raises(ConfigError, match="whose text tower bdetclip needs"):
        evaluate(tiny_bundle, tiny_image_folder, detector="bdetclip")
