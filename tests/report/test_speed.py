"""The page of a bench run, in text and in a real browser."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from cbpt_runtime.bench import samples
from cbpt_runtime.report import write_page
from cbpt_runtime.report.speed import draw_plots, render_bench, stages_ms

if TYPE_CHECKING:
    from playwright.sync_api import Page


def make_run(scale: float, **changes: Any) -> dict[str, Any]:
    latencies = scale * np.random.default_rng(0).gamma(9.0, 1.0, 240)
    return {
        "loop": "closed",
        "concurrency": 1,
        "batch_size": 1,
        "throughput_per_s": 100 / scale,
        "achieved_rate_per_s": 100 / scale,
        "outcomes": {"answered": 240, "busy": 2},
        "latency_ms": samples.summary(latencies),
        "latencies_ms": latencies.tolist(),
        "answers": {"checked": 60, "wrong": 0, "largest_difference": 0.0},
        "generator": {"processes": 1, "cpu_share": 0.07, "is_bottleneck": False},
    } | changes


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    """What a run finds, with two targets and a name that must be escaped."""
    stages = {
        "decode_ms_per_batch": 2.0,
        "compute_ms_per_batch": 9.0,
        "mean_batch_size": 1.5,
    }
    search = {"percentile": 95.0, "latency_bound_ms": 100.0, "held_per_s": 80.0, "failed_per_s": 84.0}
    opened = {
        "loop": "open",
        "target_rate_per_s": 80.0,
        "offered_rate_per_s": 80.0,
        "kept_up": True,
        "held": True,
    }
    offline = [
        make_run(1, loop="none", batch_size=size, passes_per_s=[1.0] * 5, stages=stages) for size in (1, 8)
    ]
    scenarios = {
        "single-stream": {"runs": [make_run(1, stages=stages)]},
        "server": {"runs": [make_run(2, **opened)], "search": search},
        "sweep": {"runs": [make_run(1, concurrency=number) for number in (1, 4)]},
        "offline": {
            "runs": offline,
            "classes": [{"classes": 10, "latency_ms": 1.0}, {"classes": 10_000, "latency_ms": 2.0}],
        },
    }
    accuracy = {"rate": 0.45, "count": 45, "total": 100, "low": 0.4, "high": 0.5}
    targets = [
        {
            "name": name,
            "kind": "repository",
            "facts": {"engine": "onnxruntime in process", "provider": "CPUExecutionProvider"},
            "quality": {
                "clean_accuracy": accuracy,
                "attack_success_rate": None,
                "stated": {"where": "the gate", "attack_success_rate": 0.01},
            },
            "scenarios": scenarios,
        }
        for name in ("first", "<script>alert(1)</script>")
    ]
    return {
        "machine": {"processor": "a processor", "usable_cpus": 2, "gpus": []},
        "versions": {"torch": "2.6"},
        "config": {"latency_bound_ms": 100.0},
        "images": {"count": 36, "megapixels": {"min": 0.1, "median": 0.2, "max": 2.0}},
        "targets": targets,
    }


def test_the_page_says_how_fast_and_how_good(result: dict[str, Any]) -> None:
    page = render_bench(result)
    assert "80 answers per second, p95 within 100 ms" in page
    assert "CA 45.0 % of 100, ASR 1.0 % stated" in page
    assert "onnxruntime" in page
    assert "<script" not in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)


def test_every_plot_is_drawn_in_both_formats_and_told_in_words(result: dict[str, Any]) -> None:
    plots = draw_plots(result)
    names = ["latency-distribution", "throughput-latency", "scaling-batch", "scaling-classes"]
    assert [plot.name for plot in plots] == names
    for plot in plots:
        assert plot.svg.lstrip().startswith(b"<?xml")
        assert plot.png.startswith(b"\x89PNG")
        assert re.search(r"\d", plot.alt)


def test_tritons_parts_are_told_apart() -> None:
    step = {"total_ms": 9.0, "queue_ms": 1.0, "compute_input_ms": 0.25, "compute_output_ms": 0.5}
    found = stages_ms(
        {
            "triton": {
                "clip": {},
                "clip_preprocess": step | {"compute_infer_ms": 3.0, "mean_batch_size": 1.0},
                "clip_classifier": step | {"compute_infer_ms": 5.0, "mean_batch_size": 2.0},
                "clip_alarm": step | {"compute_infer_ms": 0.1, "mean_batch_size": 1.0},
            }
        }
    )
    assert found == {"decode": 3.0, "queue": 2.0, "transfer": 1.5, "compute": 5.0, "mean_batch_size": 2.0}


@pytest.fixture
def shown(result: dict[str, Any], tmp_path: Path, browser_page: Page) -> Page:
    write_page(tmp_path / "report.html", render_bench(result))
    browser_page.goto((tmp_path / "report.html").as_uri())
    browser_page.wait_for_load_state("networkidle")
    return browser_page


def test_in_a_browser_it_is_drawn_fits_a_phone_and_can_be_read_aloud(shown: Page) -> None:
    sizes = shown.eval_on_selector_all("img", "all => all.map(i => [i.naturalWidth, i.alt.length])")
    assert len(sizes) == 4
    assert all(width > 0 and words > 20 for width, words in sizes)
    shown.set_viewport_size({"width": 1280, "height": 800})
    box = shown.locator("header .cards").bounding_box()
    assert box is not None
    assert box["y"] + box["height"] < 800
    levels = shown.eval_on_selector_all("h1, h2, h3", "all => all.map(h => Number(h.tagName[1]))")
    assert all(after <= before + 1 for before, after in pairwise(levels))
    scrolling = "all => all.every(e => e.tabIndex === 0 && e.getAttribute('aria-label'))"
    assert shown.eval_on_selector_all(".wide, .plot", scrolling)
    shown.set_viewport_size({"width": 360, "height": 740})
    shown.eval_on_selector_all("details", "all => all.forEach(d => d.open = true)")
    assert shown.evaluate("document.documentElement.scrollWidth") == 360


def test_its_texts_stand_out_and_it_prints(shown: Page, faint_texts: Callable[[Page], list[str]]) -> None:
    shown.eval_on_selector_all("details", "all => all.forEach(d => d.open = true)")
    assert faint_texts(shown) == []
    assert shown.pdf(format="A4").startswith(b"%PDF")
