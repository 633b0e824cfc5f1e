"""Everything in order: open, check the answers, measure speed and accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from cbpt_runtime.bench.generator import Answers
from cbpt_runtime.bench.inputs import BenchConfig, Pictures, read_pictures
from cbpt_runtime.bench.measuring import TOLERANCE, Workload
from cbpt_runtime.bench.records import BenchResult, Measured, Quality, SystemResult
from cbpt_runtime.bench.results import describe_machine, describe_versions
from cbpt_runtime.bench.scenarios import run_scenario
from cbpt_runtime.bench.systems import System, open_system
from cbpt_runtime.bench.triton import cross_check
from cbpt_runtime.errors import ConfigError, ImageDataError, WorkError
from cbpt_runtime.evaluation import metrics
from cbpt_runtime.models.data import class_index
from cbpt_runtime.models.image_files import first_few
from cbpt_runtime.trust import ANYONE, Trust

if TYPE_CHECKING:
    from cbpt_runtime.export.session import Provider


def bench(
    sources: Sequence[str],
    images: str | Path,
    config: BenchConfig,
    *,
    triggered: str | Path | None = None,
    target_class: str | None = None,
    tell: Callable[[str], None] = lambda text: None,
    device: str = "cpu",
    provider: Provider = "cpu",
    threads: int | None = None,
    model: str | None = None,
    trust: Trust = ANYONE,
) -> BenchResult:
    """Measure some systems on the same images; docs/benchmarking.md says how.

    Args:
        sources: Bundles, ONNX files, repositories, URLs.
        images: Folder of image files; in folders named like the classes, accuracy is measured, too.
        config: What to measure and how long.
        triggered: Triggered images, folder = true class.
        target_class: Target of their attack.
        tell: Told what is being done.
        device: As all that follow, of `open_system`.
        provider: Of an ONNX file or repository.
        threads: Of what runs in this process.
        model: Of a server that has several.
        trust: What a bundle or repository has to show.

    Raises:
        InputError: A system, the images or a setting is wrong.
        WorkError: A system answers wrongly, or not at all.
    """
    if (triggered is None) != (target_class is None):
        raise ConfigError(
            expected="triggered images together with their attack's target",
            got="one without the other",
            fix="Give --triggered and --target, or neither.",
        )
    pictures = _read(images, config)
    attacked = None if triggered is None else _read(triggered, config)
    for note in pictures.notes + (() if attacked is None else attacked.notes):
        tell(f"note: {note}")
    machine = describe_machine()
    with ExitStack() as opened:
        systems = [
            open_system(source, device=device, provider=provider, threads=threads, model=model, trust=trust)
            for source in sources
        ]
        for system in systems:
            opened.enter_context(system.classifier)
        _require_servers(systems, config)
        measured = tuple(
            _measure(system, pictures, attacked, target_class, config, tell) for system in systems
        )
    return BenchResult(
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine,
        versions=describe_versions(),
        config=config.to_dict(),
        images=pictures.describe(),
        systems=measured,
    )


def _read(folder: str | Path, config: BenchConfig) -> Pictures:
    return read_pictures(
        folder, most=config.max_images, seed=config.seed, skip_unreadable=config.skip_unreadable
    )


def _require_servers(systems: Sequence[System], config: BenchConfig) -> None:
    """Nothing would be measured of what runs in this process in the server scenario alone."""
    here = [system.name for system in systems if system.url is None]
    if here and set(config.scenarios) == {"server"}:
        raise ConfigError(
            expected="URLs of servers for the server scenario: only those get requests from outside",
            got=", ".join(here),
            fix="Start it with `cbpt-runtime serve` and name its URL, or take another --scenario.",
        )


def _measure(
    system: System,
    pictures: Pictures,
    triggered: Pictures | None,
    target_class: str | None,
    config: BenchConfig,
    tell: Callable[[str], None],
) -> SystemResult:
    tell(f"{system.name}: answers before the timing")
    expected = system.answer(pictures.files)
    count = min(len(pictures.files), 8)
    again = system.answer(pictures.files[:count][::-1])
    difference = again.difference(expected.rows(range(count)[::-1]))
    if difference > TOLERANCE:
        raise WorkError(
            expected=f"the same answers to the same images, within {TOLERANCE:g}",
            got=f"{system.name} differs from itself by {difference:.3g}",
            fix="Do not measure it; look at what it runs on.",
        )
    quality = measure_quality(system, pictures, expected, triggered, target_class)
    if quality.unmatched:
        tell(f"{system.name}: no clean accuracy, no classes are {first_few(quality.unmatched)}")
    work = Workload(system=system, pictures=pictures, expected=expected, config=config)
    scenarios: dict[str, Measured] = {}
    for scenario in config.scenarios:
        if scenario == "server" and system.url is None:
            tell(f"{system.name}: server: left out, for it is none; name the URL of one")
            continue

        def tell_more(text: str, prefix: str = f"{system.name}: {scenario}: ") -> None:
            tell(prefix + text)

        scenarios[scenario] = run_scenario(scenario, work, tell_more)
    return SystemResult(
        name=system.name,
        kind=system.classifier.kind,
        facts=system.facts,
        quality=quality,
        checked_before=len(pictures.files) + count,
        scenarios=scenarios,
    )


def measure_quality(
    system: System,
    pictures: Pictures,
    answers: Answers,
    triggered: Pictures | None,
    target_class: str | None,
) -> Quality:
    """CA over labelled images, ASR over triggered ones, of exactly what is measured.

    Raises:
        ClassListError: The attack's target is not a class.
        ImageDataError: The triggered images do not lie in folders named like classes.
    """
    labels, unmatched = _labels(system, pictures)
    quality = Quality(
        clean_accuracy=None if unmatched else metrics.accuracy(answers.labels, labels),
        attack_success_rate=None,
        stated=system.stated,
        unmatched=unmatched,
    )
    if triggered is None or target_class is None:
        return quality
    wanted = class_index(system.classifier.class_names, target_class, where=system.name)
    truth, others = _labels(system, triggered)
    if others:
        raise ImageDataError(
            expected=f"triggered images in folders named like the classes of {system.name}",
            got=f"others in {triggered.folder}: {first_few(others)}",
            fix="One folder per true class, as for --images.",
        )
    called = system.answer(triggered.files).labels
    return replace(quality, attack_success_rate=metrics.attack_success(called, truth, wanted))


def _labels(system: System, pictures: Pictures) -> tuple[Int[np.ndarray, " images"], tuple[str, ...]]:
    """Return true classes, -1 where there is none; and the folders of these images."""
    found = pictures.labels(system.classifier.class_names, system.classifier.class_folders)
    missing = {
        Path(name).parent.as_posix()
        for name, label in zip(pictures.names, found, strict=True)
        if label is None
    }
    return np.array([-1 if label is None else label for label in found]), tuple(sorted(missing))


def with_perf_analyzer(result: BenchResult, images: str | Path, config: BenchConfig) -> BenchResult:
    """Return the same with perf_analyzer's closed-loop figures beside our own, for every server.

    Raises:
        ConfigError: No server is in it.
        WorkError: perf_analyzer failed.
    """
    if all(system.kind != "url" for system in result.systems):
        raise ConfigError(
            expected="the URL of a server for perf_analyzer",
            got="only systems that run here",
            fix="Leave --tool out, or name a URL.",
        )
    files = _read(images, config).files

    def checked(system: SystemResult) -> SystemResult:
        if system.kind != "url":
            return system
        found = cross_check(
            system.facts["source"],
            system.facts["model"],
            files,
            config.concurrencies,
            duration_s=config.duration_s,
            timeout_s=config.timeout_s,
        )
        return replace(system, perf_analyzer=found)

    return replace(result, systems=tuple(map(checked, result.systems)))
