from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from cbpt_runtime.bench.results import compare
from cbpt_runtime.errors import ConfigError


def result(scale: float = 1.0, *, seed: int = 0, held: float = 100.0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    latencies = (scale * rng.gamma(9.0, 1.0, 400)).tolist()
    runs = {
        "single-stream": [{"loop": "closed", "concurrency": 1, "batch_size": 1, "latencies_ms": latencies}],
        "offline": [
            {"loop": "none", "batch_size": 8, "passes_per_s": (rng.normal(50, 1, 9) / scale).tolist()},
            {"loop": "none", "batch_size": 16, "passes_per_s": [60.0, 61.0]},
        ],
    }
    search = {
        "percentile": 95.0,
        "latency_bound_ms": 100.0,
        "held_per_s": held,
        "failed_per_s": 1.04 * held,
        "trials": [{}] * 5,
    }
    return {
        "machine": {"processor": "x", "instructions": ["avx2"], "usable_cpus": 2, "gpus": []},
        "versions": {"torch": "2.6"},
        "images": {"digest": "d"},
        "targets": [
            {
                "name": "repository",
                "scenarios": {name: {"runs": each} for name, each in runs.items()}
                | {"server": {"runs": [], "search": search}},
            }
        ],
    }


def test_ratios_come_with_intervals_that_contain_them() -> None:
    rows = {row.point: row for row in compare(result(), result(2.0, seed=1, held=52.0)).rows}
    latency, batch = rows["1 at once"], rows["batch 8"]
    assert latency.quantity == "latency_ms_p50"
    assert 1.7 < latency.low < latency.ratio < latency.high < 2.3
    assert batch.ratio == pytest.approx(0.5, rel=0.05)
    assert "batch 16" not in rows  # two passes carry no interval
    searched = rows["highest rate with p95 within 100 ms"]
    assert searched.ratio == pytest.approx(0.52)
    assert searched.low == pytest.approx(0.5)


def test_the_same_run_twice_is_one_within_the_interval() -> None:
    found = compare(result(), result(seed=5))
    assert all(row.low <= 1 <= row.high for row in found.rows)
    assert (found.same_images, found.versions_differ, found.hardware_differs) == (True, {}, {})


def test_different_hardware_is_refused_and_named_unless_it_is_meant() -> None:
    other = result()
    other["machine"]["usable_cpus"] = 64
    with pytest.raises(ConfigError, match=r"usable_cpus: 2 and 64.*--different-hardware"):
        compare(result(), other)
    assert compare(result(), other, across_hardware=True).hardware_differs == {"usable_cpus": (2, 64)}


def test_other_versions_and_images_are_told() -> None:
    other = result()
    other["versions"] = {"torch": "2.7"}
    other["images"] = {"digest": "e"}
    found = compare(result(), other)
    assert found.versions_differ == {"torch": ("2.6", "2.7")}
    assert not found.same_images


def test_several_targets_are_matched_by_name_and_nothing_in_common_is_an_error() -> None:
    both = result()
    both["targets"].append(copy.deepcopy(both["targets"][0]) | {"name": "bundle"})
    other = copy.deepcopy(both)
    other["targets"].reverse()
    assert {row.targets for row in compare(both, other).rows} == {
        ("repository", "repository"),
        ("bundle", "bundle"),
    }
    strangers = result()
    strangers["targets"][0]["scenarios"] = {}
    with pytest.raises(ConfigError, match="in common"):
        compare(result(), strangers)


@pytest.mark.parametrize(
    ("key", "value"),
    [("batch_size", {}), ("target_rate_per_s", "x"), ("latencies_ms", [1.0, "x", [2.0], None])],
)
def test_results_that_somebody_changed_are_refused(key: str, value: object) -> None:
    changed = result()
    run = next(iter(changed["targets"][0]["scenarios"].values()))["runs"][0]
    run[key] = value
    with pytest.raises(ConfigError, match="something else in one of them"):
        compare(changed, changed)
