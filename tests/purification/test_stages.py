from __future__ import annotations

from pathlib import Path

import torch

from cbpt_runtime.purification.stages import StageStore


def test_a_finished_stage_comes_back_as_it_was(tmp_path: Path) -> None:
    store = StageStore(tmp_path / "partial", "a")
    store.save("search", {"x": torch.arange(3.0)}, {"scores": [1.5, 2.0]})
    left = StageStore(tmp_path / "partial", "a").load("search")
    assert left is not None
    assert torch.equal(left[0]["x"], torch.arange(3.0))
    assert left[1] == {"scores": [1.5, 2.0]}


def test_stages_of_another_run_missing_and_damaged_ones_are_not_loaded(tmp_path: Path) -> None:
    store = StageStore(tmp_path, "a")
    store.save("search", {}, {})
    assert StageStore(tmp_path, "b").load("search") is None
    assert store.load("tune") is None
    (tmp_path / "search.safetensors").write_bytes(b"half")
    assert store.load("search") is None
