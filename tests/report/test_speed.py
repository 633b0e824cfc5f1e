"""The page of a bench run, in text and in a real browser."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from cbpt_runtime.bench import samples
from cbpt_runtime.bench.records import (
    BenchResult,
    Checked,
    HeadTiming,
    Measured,
    Quality,
    Run,
    Search,
    Senders,
    Stages,
    Stated,
    SystemResult,
    Trial,
)
from cbpt_runtime.bench.results import compare, read_results
from cbpt_runtime.evaluation.metrics import Rate
from cbpt_runtime.report import write_page
from cbpt_runtime.report.speed import draw_plots, render_bench, stages_ms, write_results

if TYPE_CHECKING:
    from playwright.sync_api import Page

TRIAL = Trial(rate_per_s=80.0, held=True)


def make_run(scale: float = 1.0, **changes: Any) -> Run:
    latencies = scale * np.random.default_rng(0).gamma(9.0, 1.0, 240)
    settings: dict[str, Any] = {
        "loop": "closed",
        "concurrency": 1,
        "batch_size": 1,
        "throughput_per_s": 100 / scale,
        "achieved_rate_per_s": 100 / scale,
        "outcomes": {"answered": 240, "busy": 2},
        "latency_ms": samples.summary(latencies),
        "latencies_ms": tuple(latencies.tolist()),
        "answers": Checked(checked=60, wrong=0, largest_difference=0.0),
        "generator": Senders(processes=1, cpu_share=0.07),
    }
    return Run(**(settings | changes))


def offline_run(batch_size: int, stages: Stages) -> Run:
    return Run(
        loop="none",
        batch_size=batch_size,
        throughput_per_s=100.0,
        answers=Checked(checked=60, wrong=0, largest_difference=0.0),
        generator=Senders(),
        passes_per_s=(1.0,) * 5,
        stages=stages,
    )


@pytest.fixture(scope="module")
def result() -> BenchResult:
    """What a run finds, with two systems and a name that must be escaped."""
    stages = Stages(
        decode_ms_per_image=1.0,
        compute_ms_per_image=6.0,
        decode_ms_per_batch=2.0,
        compute_ms_per_batch=9.0,
        mean_batch_size=1.5,
    )
    search = Search(
        percentile=95.0, latency_bound_ms=100.0, held_per_s=80.0, failed_per_s=84.0, trials=(TRIAL,)
    )
    opened = make_run(
        2,
        loop="open",
        concurrency=None,
        target_rate_per_s=80.0,
        offered_rate_per_s=80.0,
        kept_up=True,
        held=True,
    )
    heads = tuple(
        HeadTiming(classes=count, latency_ms=ms, latencies_ms=(ms,), size_bytes=1)
        for count, ms in ((10, 1.0), (10_000, 2.0))
    )
    scenarios = {
        "single-stream": Measured(runs=(make_run(stages=stages),)),
        "server": Measured(runs=(opened,), search=search),
        "sweep": Measured(runs=tuple(make_run(concurrency=number) for number in (1, 4))),
        "offline": Measured(runs=tuple(offline_run(size, stages) for size in (1, 8)), classes=heads),
    }
    systems = tuple(
        SystemResult(
            name=name,
            kind="repository",
            facts={"engine": "onnxruntime in process", "provider": "CPUExecutionProvider"},
            quality=Quality(
                clean_accuracy=Rate(rate=0.45, count=45, total=100, low=0.4, high=0.5),
                attack_success_rate=None,
                stated=Stated(where="the gate", attack_success_rate=0.01),
                unmatched=(),
            ),
            checked_before=44,
            scenarios=scenarios,
        )
        for name in ("first", "<script>alert(1)</script>")
    )
    return BenchResult(
        finished="2026-11-29T12:00:00+00:00",
        machine={"processor": "a processor", "usable_cpus": 2, "gpus": [], "instructions": []},
        versions={"torch": "2.6"},
        config={"latency_bound_ms": 100.0},
        images={"count": 36, "digest": "d", "megapixels": {"min": 0.1, "median": 0.2, "max": 2.0}},
        systems=systems,
    )


def test_what_is_written_is_read_back_and_compared(result: BenchResult, tmp_path: Path) -> None:
    write_results(result, tmp_path / "out", force=False)
    found = read_results(tmp_path / "out")
    assert found == json.loads(json.dumps(result.to_dict()))
    (offline, _) = found["targets"][0]["scenarios"]["offline"]["runs"]
    assert not {"outcomes", "latencies_ms", "concurrency", "triton"} & set(offline)
    assert found["targets"][0]["quality"]["attack_success_rate"] is None
    rows = compare(found, found).rows
    searched = "highest rate with p95 within 100 ms"
    assert {row.point for row in rows} == {"1 at once", "4 at once", "batch 1", "batch 8", searched}
    assert {row.ratio for row in rows} == {1.0}


def test_the_page_says_how_fast_and_how_good(result: BenchResult) -> None:
    page = render_bench(result)
    assert "80 answers per second, p95 within 100 ms" in page
    assert "CA 45.0 % of 100, ASR 1.0 % stated" in page
    assert "onnxruntime" in page
    assert "<script" not in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)


def test_every_plot_is_drawn_in_both_formats_and_told_in_words(result: BenchResult) -> None:
    plots = draw_plots(result)
    names = ["latency-distribution", "throughput-latency", "scaling-batch", "scaling-classes"]
    assert [plot.name for plot in plots] == names
    for plot in plots:
        assert plot.svg.lstrip().startswith(b"<?xml")
        assert plot.png.startswith(b"\x89PNG")
        assert re.search(r"\d", plot.alt)


def test_tritons_parts_are_told_apart() -> None:
    step = {"total_ms": 9.0, "queue_ms": 1.0, "compute_input_ms": 0.25, "compute_output_ms": 0.5}
    run = make_run(
        triton={
            "clip": {},
            "clip_preprocess": step | {"compute_infer_ms": 3.0, "mean_batch_size": 1.0},
            "clip_classifier": step | {"compute_infer_ms": 5.0, "mean_batch_size": 2.0},
            "clip_alarm": step | {"compute_infer_ms": 0.1, "mean_batch_size": 1.0},
        }
    )
    assert stages_ms(run) == {"decode": 3.0, "queue": 2.0, "transfer": 1.5, "compute": 5.0}
    assert run.mean_batch_size == 2.0


@pytest.fixture
def shown(result: BenchResult, tmp_path: Path, browser_page: Page) -> Page:
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
