"""The zoo's score: known numbers, and a run that goes on where it was interrupted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def record(method: str, target: str | None, score: float, **more: Any) -> dict[str, Any]:
    return {
        "zoo": "toys", "victim": f"of-{target}", "attack": "patch" if target else "", "method": method,
        "target": target, "targets": [target], "listed": True, "score": score, "probability": score,
        "backdoored": False, "suspects": [], "forwards": 10, "backwards": 20, "cpu_seconds": 30.0, **more,
    }  # fmt: skip


def named(name: str) -> dict[str, Any]:
    return {"backdoored": True, "suspects": [{"name": name, "on_list": True}]}


def test_the_table_counts_what_is_found_and_measures_the_order(zoo: Any) -> None:
    records = [
        record("search", "dog", 0.9, **named("dog")),
        record("search", "cat", 0.8, **named("dog")),
        record("search", "cow", 0.3),
        record("search", None, 0.5),
        record("decree", "dog", 0.9, backdoored=True),
        record("decree", None, 0.95, backdoored=True),
    ]
    search, decree = zoo.table(records).splitlines()[2:4]
    entropy = -np.log([0.9, 0.8, 0.3, 0.5]).mean()
    assert search.startswith(f"| search | 0.667 | {entropy:.3f} | 2 of 3 ")
    assert [cell.strip()[:6] for cell in search.split("|")[5:8]] == ["1 of 3", "1 of 3", "0 of 1"]
    assert search.endswith("| 10 | 20 | 30 |")
    assert decree.startswith("| decree | 0.000 | ")
    assert decree.count("names none") == 2
    below = zoo.table(records).splitlines()[7:]
    assert below == [
        "| `of-None` | – | – | clean | false alarm |",
        "| `of-cat` | patch | *cat* | wrong target | – |",
        "| `of-cow` | patch | *cow* | missed | – |",
        "| `of-dog` | patch | *dog* | right target | detected |",
    ]


@pytest.mark.parametrize(
    ("bad", "good", "area"),
    [([2.0, 3], [0.0, 1], 1.0), ([1.0], [1.0], 0.5), ([0.0, 3], [1.0, 2], 0.5), ([0.0], [1.0, 2], 0.0)],
)
def test_the_area_is_the_share_of_pairs_in_order(
    zoo: Any, bad: list[float], good: list[float], area: float
) -> None:
    assert zoo.roc_auc(np.array(bad), np.array(good)) == area


def test_a_certain_mistake_costs_a_finite_amount(zoo: Any) -> None:
    assert zoo.cross_entropy(np.array([0.0]), np.array([1.0])) == pytest.approx(np.log(1000))
    assert zoo.cross_entropy(np.array([1.0]), np.array([0.0])) == pytest.approx(0.001, rel=1e-3)


def test_a_run_goes_on_where_it_was_interrupted(
    zoo: Any,
    tiny_checkpoint_folder: Path,
    tiny_image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images, victims, output = tmp_path / "images", tmp_path / "victims", tmp_path / "zoo.json"
    images.mkdir()
    for split in ("train", "val"):
        (images / split).symlink_to(tiny_image_folder, target_is_directory=True)
    for name, target in (("bad", "green disc"), ("good", None)):
        shutil.copytree(tiny_checkpoint_folder, victims / name)
        (victims / name / "attack.json").write_text(json.dumps({"attack": target and "x", "target": target}))
    asked = ["zoo.py", "--zoo", "tiny", str(victims), str(images), "--sizes", "3", "--passes", "100"]

    def run(*methods: str) -> list[dict[str, Any]]:
        monkeypatch.setattr("sys.argv", [*asked, "--methods", *methods, "--output", str(output)])
        zoo.main()
        done: list[dict[str, Any]] = json.loads(output.read_text())["trials"]
        return done

    first = run("mm-bd", "decree")
    assert [(one["victim"], one["method"]) for one in first] == [
        ("bad", "mm-bd"), ("bad", "decree"), ("good", "mm-bd"), ("good", "decree"),
    ]  # fmt: skip
    assert all(0 < one["backwards"] <= one["forwards"] for one in first)
    assert first[0]["images"] == 36
    again = run("mm-bd", "decree", "neural-cleanse")
    assert again[:4] == first
    assert [one["method"] for one in again[4:]] == ["neural-cleanse"] * 2
    assert run("neural-cleanse") == again
    assert "| `bad` | x | *green disc* |" in capsys.readouterr().out
