"""`evaluate` and `classify` of a real Triton, over both protocols, beside the bundle it serves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cbpt_runtime.bundle import Bundle
from cbpt_runtime.evaluation import evaluate_all
from cbpt_runtime.loading import open_classifier
from cbpt_runtime.redteam.image_triggers import BadNet
from cbpt_runtime.serving import RunningServer

from .test_answers import counters


@pytest.fixture(params=["grpc", "http"])
def url(request: pytest.FixtureRequest, server: RunningServer) -> str:
    return str(getattr(server.config, f"{request.param}_url"))


def test_a_server_has_the_rates_of_the_purified_head_and_counts_no_alarms(
    url: str, server: RunningServer, tiny_bundle: Bundle, tiny_image_folder: Path
) -> None:
    before = alarms(server)
    bundle, found = evaluate_all(
        [tiny_bundle, url], tiny_image_folder, target="blue stripes", attack=BadNet(size=8), device="cpu"
    )
    assert (found.kind, found.before, found.digest) == ("url", None, None)
    assert (found.after, found.suspects, found.verdict) == (bundle.after, bundle.suspects, bundle.verdict)
    assert found.alarm.auroc.value == pytest.approx(bundle.alarm.auroc.value, abs=0.02)
    assert any(tiny_bundle.digest in note for note in found.notes)
    assert alarms(server) == before


def alarms(server: RunningServer) -> dict[str, float]:
    """The counters of alarms in the server's metrics."""
    return {name: value for name, value in counters(server).items() if "alarm" in name.partition("{")[0]}


def test_the_command_measures_triggered_images_at_a_server(
    url: str, tiny_image_folder: Path, run: Callable
) -> None:
    images = ("--images", tiny_image_folder, "--triggered", tiny_image_folder, "--target", "blue_stripes")
    done = run("evaluate", url, *images, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert (found["source"], found["before"], found["after"]["attack_success_rate"]["total"]) == (
        url,
        None,
        24,
    )
    refused = run("evaluate", url, *images, "--digest", "0" * 64)
    assert (refused.code, refused.out) == (2, "")


def test_a_server_is_called_like_a_bundle(url: str, tiny_bundle: Bundle, tiny_image_folder: Path) -> None:
    photo = min(tiny_image_folder.rglob("*.png"))
    with open_classifier(url) as classifier:
        there, array = classifier(photo), classifier(classifier.read([photo])[0])
    here = open_classifier(tiny_bundle, device="cpu")(photo)
    for found in (there, array):
        assert [label.name for label in found.labels] == [label.name for label in here.labels]
        assert found.alarm == pytest.approx(here.alarm, abs=1e-4)
