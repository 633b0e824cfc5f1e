"""What operators look at, against a real server: metric names and labels, the counters, the page."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from cbpt_runtime.bundle import Bundle
from cbpt_runtime.serving import Client, RunningServer
from cbpt_runtime.serving.page import UiServer

if TYPE_CHECKING:
    from playwright.sync_api import Page

RECORDED = Path(__file__).parents[1] / "server" / "metrics.txt"
# What Prometheus and its service discovery add to every sample, and a metric of its own.
ADDED_LABELS = {"job", "instance", "namespace", "pod"}
PROMETHEUS_OWN = {"up"}
# Only where there is a GPU.
OPTIONAL = {"nv_gpu", "nv_energy", "nv_pinned_memory_pool"}

Samples = dict[str, list[dict[str, str]]]


def read_metrics(server: RunningServer) -> tuple[Samples, dict[tuple[str, str], float]]:
    """Label sets by metric name, and values of the counters of this package by name and model or target."""
    with urllib.request.urlopen(server.config.metrics_url, timeout=10) as response:
        text = response.read().decode()
    samples: Samples = {}
    values = {}
    for line in text.splitlines():
        found = re.fullmatch(r"([a-z_]+)(?:\{(.*)\})? (\S+)", line)
        if found is not None:
            labels = dict(re.findall(r'([a-z_]+)="([^"]*)"', found[2] or ""))
            samples.setdefault(found[1], []).append(labels)
            if found[1].startswith("cbpt_"):
                values[found[1], labels.get("target", labels["model"])] = float(found[3])
    return samples, values


def test_every_query_finds_its_metrics_and_labels(server: RunningServer, operator_queries: list[Any]) -> None:
    samples, _ = read_metrics(server)
    problems = []
    for query in operator_queries:
        for name, labels in query.selected.items():
            if name in PROMETHEUS_OWN:
                continue
            found = samples.get(name, [])
            if not any(labels - ADDED_LABELS <= set(sample) for sample in found):
                problems.append(f"{query.source}: {name} with {sorted(labels)}")
    assert not problems


def test_the_recorded_names_are_those_of_a_live_server(server: RunningServer) -> None:
    live, recorded = set(read_metrics(server)[0]), set(RECORDED.read_text().split())
    differ = {name for name in live ^ recorded if not name.startswith(tuple(OPTIONAL))}
    assert not differ


def test_refusals_and_quantiles_have_the_labels_the_alerts_use(server: RunningServer) -> None:
    samples, _ = read_metrics(server)
    reasons = {sample["reason"] for sample in samples["nv_inference_request_failure"]}
    assert reasons >= {"REJECTED", "BACKEND", "OTHER"}
    quantiles = {sample.get("quantile") for sample in samples["nv_inference_queue_summary_us"]}
    assert quantiles >= {"0.5", "0.99"}
    models = {sample["model"] for sample in samples["nv_inference_queue_duration_us"]}
    assert models == {"shapes", "shapes_preprocess", "shapes_classifier", "shapes_alarm"}


def test_images_and_alarms_are_counted_as_they_were_answered(server: RunningServer, drawn: Any) -> None:
    _, before = read_metrics(server)
    with Client(server.config.grpc_url, model="shapes") as client:
        alarms = np.concatenate(
            [client.predict_files(drawn.files[start : start + 8]).alarm for start in range(0, 40, 8)]
        )
    _, after = read_metrics(server)
    difference = {key: after[key] - before[key] for key in after}
    assert difference["cbpt_images_total", "shapes"] == 40
    assert difference["cbpt_alarm_total", "Blue Stripes"] == (alarms >= 0.5).sum()


def test_the_page_shows_what_the_bundle_says(
    server: RunningServer, tiny_bundle: Bundle, drawn: Any, browser_page: Page
) -> None:
    with UiServer(server.config.http_url, "shapes") as page:
        browser_page.goto(page.url)
        browser_page.get_by_text("ready", exact=True).wait_for()
        alarms = drawn.expected.alarm
        for index in {0, int(alarms.argmax()), int(alarms.argmin())}:
            upload = {"name": f"{index}.jpg", "mimeType": "image/jpeg", "buffer": drawn.files[index]}
            browser_page.set_input_files("#file", upload)
            browser_page.get_by_text(f"{index}.jpg").wait_for()
            browser_page.locator("#answer:not([aria-busy])").wait_for()
            shown = browser_page.locator("#classes tr").all_inner_texts()
            expected = drawn.expected.probabilities[index]
            best = tiny_bundle.class_names[int(expected.argmax())]
            assert " ".join(shown[0].split()) == f"{best} {100 * expected.max():.1f} %"
            assert float(browser_page.locator("#alarm-value").inner_text()) == pytest.approx(
                alarms[index], abs=6e-4
            )
            is_raised = browser_page.locator("#alarm").get_attribute("class") == "raised"
            assert is_raised == (alarms[index] >= 0.5)


def test_the_page_shows_the_servers_reason(server: RunningServer, browser_page: Page) -> None:
    with UiServer(server.config.http_url, "shapes") as page:
        browser_page.goto(page.url)
        upload = {"name": "x.jpg", "mimeType": "image/jpeg", "buffer": b"not an image"}
        browser_page.set_input_files("#file", upload)
        browser_page.locator("#error").wait_for()
        assert "expected a whole, readable image" in browser_page.locator("#error").inner_text()


def test_the_page_says_when_the_server_is_gone(
    serve: Callable[..., AbstractContextManager[RunningServer]], browser_page: Page
) -> None:
    with serve() as own:
        page = UiServer(own.config.http_url, "shapes").start()
        browser_page.goto(page.url)
        browser_page.get_by_text("ready", exact=True).wait_for()
    browser_page.get_by_text("not ready").wait_for()
    page.stop()
