"""Everything in order: open, check the answers, measure, and what all of it says in one JSON-able object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from cbpt_runtime.bench.config import BenchConfig
from cbpt_runtime.bench.machine import describe_machine, describe_versions
from cbpt_runtime.bench.measuring import TOLERANCE, Subject
from cbpt_runtime.bench.pictures import Pictures, read_pictures
from cbpt_runtime.bench.quality import measure_quality
from cbpt_runtime.bench.scenarios import run_scenario
from cbpt_runtime.bench.targets import Target, open_target
from cbpt_runtime.errors import ConfigError, WorkError
from cbpt_runtime.models.image_files import first_few

KIND = "cbpt-runtime bench"
SCHEMA_VERSION = 1


def bench(
    sources: Sequence[str],
    images: str | Path,
    config: BenchConfig,
    *,
    triggered: str | Path | None = None,
    target_class: str | None = None,
    tell: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> dict[str, Any]:
    """Measure some targets on the same images.

    Args:
        sources: Bundles, ONNX files, repositories, URLs.
        images: Folder of image files; in folders named like the classes, accuracy is measured, too.
        config: What to measure and how long.
        triggered: Triggered images, folder = true class.
        target_class: Target of their attack.
        tell: Told what is being done.
        options: Of `open_target`.

    Returns:
        The content of ``bench.json``; see docs/benchmarking.md.

    Raises:
        InputError: A target, the images or a setting is wrong.
        WorkError: A target answers wrongly, or not at all.
    """
    if (triggered is None) != (target_class is None):
        raise ConfigError(
            expected="triggered images together with their attack's target",
            got="one without the other",
            fix="Give --triggered and --target, or neither.",
        )
    pictures = _read(images, config)
    attacked = None
    if triggered is not None:
        attacked = _read(triggered, config)
    for note in pictures.notes + (() if attacked is None else attacked.notes):
        tell(f"note: {note}")
    machine = describe_machine()
    opened = [open_target(source, **options) for source in sources]
    measured = [_measure(target, pictures, attacked, target_class, config, tell) for target in opened]
    return {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "versions": describe_versions(),
        "config": config.to_dict(),
        "images": pictures.describe(),
        "targets": measured,
    }


def _read(folder: str | Path, config: BenchConfig) -> Pictures:
    return read_pictures(
        folder, most=config.max_images, seed=config.seed, skip_unreadable=config.skip_unreadable
    )


def _measure(
    target: Target,
    pictures: Pictures,
    triggered: Pictures | None,
    target_class: str | None,
    config: BenchConfig,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    tell(f"{target.name}: answers before the timing")
    expected = target.answer(pictures.files)
    count = min(len(pictures.files), 8)
    again = target.answer(pictures.files[:count][::-1])
    difference = again.difference(expected.rows(list(range(count))[::-1]))
    if difference > TOLERANCE:
        raise WorkError(
            expected=f"the same answers to the same images, within {TOLERANCE:g}",
            got=f"{target.name} differs from itself by {difference:.3g}",
            fix="Do not measure it; look at what it runs on.",
        )
    quality = measure_quality(target, pictures, expected, triggered, target_class)
    if quality["unmatched"]:
        tell(f"{target.name}: no clean accuracy, no classes are {first_few(quality['unmatched'])}")
    found: dict[str, Any] = {
        "name": target.name,
        "kind": target.kind,
        "facts": target.facts,
        "quality": quality,
        "checked_before": len(pictures.files) + count,
        "scenarios": {},
    }
    subject = Subject(target=target, pictures=pictures, expected=expected, config=config)
    for scenario in config.scenarios:
        prefix = f"{target.name}: {scenario}: "
        found["scenarios"][scenario] = run_scenario(scenario, subject, partial(_prefixed, tell, prefix))
    return found


def _prefixed(tell: Callable[[str], None], prefix: str, text: str) -> None:
    tell(prefix + text)


def wrong_answers(result: dict[str, Any]) -> int:
    """Answers during the timing that differed from those before it."""
    return sum(
        run["answers"]["wrong"]
        for target in result["targets"]
        for scenario in target["scenarios"].values()
        for run in scenario["runs"]
    )


def add_peer(result: dict[str, Any], images: str | Path, config: BenchConfig) -> None:
    """Put perf_analyzer's closed-loop figures beside our own, for every server in a result.

    Raises:
        ConfigError: No server is in it.
        WorkError: perf_analyzer failed.
    """
    from cbpt_runtime.bench.peer import cross_check

    servers = [target for target in result["targets"] if target["kind"] == "url"]
    if not servers:
        raise ConfigError(
            expected="the URL of a server for perf_analyzer",
            got="only targets that run here",
            fix="Leave --tool out, or name a URL.",
        )
    pictures = _read(images, config)
    for target in servers:
        target["perf_analyzer"] = cross_check(
            target["facts"]["source"],
            target["facts"]["model"],
            pictures.files,
            config.concurrencies,
            duration_s=config.duration_s,
            timeout_s=config.timeout_s,
        )
