"""The self-test of int8 on another processor than the gate's: it neither fails nor passes in silence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cbpt_runtime.errors import ServingError
from cbpt_runtime.export.golden import GoldenSet
from cbpt_runtime.runtime.prediction import Prediction
from cbpt_runtime.serving.config import ServeConfig
from cbpt_runtime.serving.triton import startup
from cbpt_runtime.serving.triton.startup import SelfTest, run_selftest


def selftest_of(monkeypatch: pytest.MonkeyPatch, made_on: str | None, moved: float) -> SelfTest:
    """A self-test of a server whose answers are that far from the golden ones."""
    row = {"file": "0.png", "label": "cat", "alarm": 0.0, "probabilities": [0.7, 0.3]}
    golden = GoldenSet(files=(b"",), names=("0.png",), answers={"tolerance": 1e-3, "images": [row]})
    probabilities = np.array([[0.7 - moved, 0.3 + moved]])
    found = Prediction(logits=probabilities, probabilities=probabilities, alarm=np.zeros(1))

    class FakeClient:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def __enter__(self) -> FakeClient:
            return self

        def __exit__(self, *_: object) -> None: ...

        def predict_files(self, _: Any) -> Any:
            return found

        predict_pixels = predict_files

    monkeypatch.setattr(startup, "Client", FakeClient)
    monkeypatch.setattr(startup, "read_golden", lambda _: golden)
    monkeypatch.setattr(GoldenSet, "pixels", lambda *_: np.zeros((1, 2, 2, 3), np.uint8))
    repository: Any = SimpleNamespace(
        golden=None, name="x", manifest=SimpleNamespace(preprocess=None, processor=made_on)
    )
    return run_selftest(repository, ServeConfig())


def test_on_another_processor_what_differs_is_in_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    found = selftest_of(monkeypatch, "another", 0.02)
    assert found.largest_difference == pytest.approx(0.02)
    assert found.note is not None
    assert "probabilities off by 0.02" in found.note


def test_equal_answers_need_no_note(monkeypatch: pytest.MonkeyPatch) -> None:
    assert selftest_of(monkeypatch, "another", 0.0).note is None


def test_too_different_answers_fail_on_every_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ServingError, match="exported on a processor with another, this one has"):
        selftest_of(monkeypatch, "another", 0.3)
    with pytest.raises(ServingError, match=r"within 0\.001"):
        selftest_of(monkeypatch, None, 0.02)


@pytest.mark.parametrize("note", ["int8 answers differ", None])
def test_a_server_that_starts_tells_the_note(
    note: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told: list[str] = []
    steps: list[str] = []
    process = SimpleNamespace(
        log=SimpleNamespace(listen=lambda: None), make_private=lambda: steps.append("private")
    )
    plain = SelfTest(images=4, largest_difference=0.0, note=None)
    monkeypatch.setattr(startup, "private_endpoint", lambda: "endpoint")
    monkeypatch.setattr(startup, "_launch", lambda *_: process)
    monkeypatch.setattr(startup, "_wait_until_ready", lambda *_: "2")
    monkeypatch.setattr(startup, "run_selftest", lambda *_: replace(plain, note=note))
    monkeypatch.setattr(startup, "backend_processes", lambda _: frozenset())
    plan: Any = SimpleNamespace(repository=None, config=None)
    guard: Any = SimpleNamespace(lead_to=steps.append)
    startup.start_server(plan, guard, tmp_path, told.append, lambda: True)
    assert steps == ["private", "endpoint"]
    assert told == ([] if note is None else [f"note: {note}"])
