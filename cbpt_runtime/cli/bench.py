"""`cbpt-runtime bench`: latency and throughput of bundles, graphs and servers, with accuracy beside them."""

from __future__ import annotations

import enum
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cbpt_runtime.cli.options import JsonOption, SkipUnreadableOption
from cbpt_runtime.cli.output import print_json, print_note, print_table
from cbpt_runtime.cli.trust import DigestOption, TrustOption, given_trust

if TYPE_CHECKING:
    from cbpt_runtime.bench.config import BenchConfig

COMPARE = "compare"


class ScenarioName(enum.StrEnum):
    """What is measured; all of them when none is named."""

    SINGLE_STREAM = "single-stream"
    SERVER = "server"
    OFFLINE = "offline"
    SWEEP = "sweep"


class Tool(enum.StrEnum):
    """Other tools whose figures can be put beside ours."""

    PERF_ANALYZER = "perf-analyzer"


def command(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="TARGET…",
            help="Bundle, ONNX file, model repository, or URL of a server. Or: compare A.json B.json.",
        ),
    ],
    images: Annotated[
        Path | None,
        typer.Option(help="Image files to send; in folders named like the classes, CA is measured."),
    ] = None,
    scenario: Annotated[
        list[ScenarioName] | None, typer.Option(help="Repeatable. Default: all four.")
    ] = None,
    rate: Annotated[
        list[float] | None,
        typer.Option(help="Requests per second of the server scenario; repeatable. Default: searched for."),
    ] = None,
    concurrency: Annotated[
        list[int] | None, typer.Option(help="Requests at once in the sweep; repeatable. Default: 1 2 4 8 16.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Images per batch offline; repeatable. Default: 1 2 4 8 16 32.")
    ] = None,
    classes: Annotated[
        list[int] | None, typer.Option(help="Offline, also time the graph with so many classes; repeatable.")
    ] = None,
    duration_s: Annotated[float, typer.Option(help="Of each run.")] = 10.0,
    warmup_s: Annotated[float, typer.Option(help="Before each run; not counted.")] = 1.0,
    latency_bound_ms: Annotated[
        float, typer.Option(help="What the searched rate must stay under...")
    ] = 100.0,
    percentile: Annotated[float, typer.Option(help="...at this percentile: 50, 90, 95 or 99.")] = 95.0,
    timeout_s: Annotated[float, typer.Option(help="After which a request is lost.")] = 10.0,
    clients: Annotated[int, typer.Option(help="Processes that send to a server.")] = 1,
    max_images: Annotated[int, typer.Option(help="Files read from --images.")] = 256,
    triggered: Annotated[
        Path | None, typer.Option(help="Triggered images, folder = true class: ASR; needs --target.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="Target class of the attack.")] = None,
    model: Annotated[str | None, typer.Option(help="Served model, where a server has several.")] = None,
    device: Annotated[str, typer.Option(help="Of a bundle: auto, cpu or cuda.")] = "auto",
    provider: Annotated[str, typer.Option(help="Of a graph: cpu, cuda or tensorrt.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of bundles and graphs. Default: all CPUs.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of arrivals and the order of images.")] = 0,
    tool: Annotated[Tool | None, typer.Option(help="Cross-check a URL with this tool, too.")] = None,
    trust: TrustOption = None,
    digest: DigestOption = None,
    output: Annotated[Path | None, typer.Option(help="Folder for numbers, plots and a page.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the results at --output.")] = False,
    different_hardware: Annotated[
        bool, typer.Option("--different-hardware", help="compare: although the machines differ.")
    ] = False,
    skip_unreadable: SkipUnreadableOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure latency and throughput honestly, and that the answers stay right."""
    if targets[0] == COMPARE:
        _compare(targets[1:], across_hardware=different_hardware, as_json=as_json)
        return
    if images is None:
        raise typer.BadParameter("a folder of image files is needed", param_hint="--images")
    from cbpt_runtime.bench.config import SCENARIOS, BenchConfig

    given = {
        "scenarios": tuple(SCENARIOS[SCENARIOS.index(name.value)] for name in scenario or ()),
        "rates_per_s": tuple(rate or ()),
        "concurrencies": tuple(concurrency or ()),
        "batch_sizes": tuple(batch or ()),
        "class_counts": tuple(classes or ()),
    }
    config = BenchConfig(
        duration_s=duration_s,
        warmup_s=warmup_s,
        latency_bound_ms=latency_bound_ms,
        percentile=percentile,
        timeout_s=timeout_s,
        clients=clients,
        max_images=max_images,
        skip_unreadable=skip_unreadable,
        seed=seed,
        **{name: value for name, value in given.items() if value},  # type: ignore[arg-type]
    )
    options: dict[str, Any] = {"model": model, "device": device, "threads": threads}
    options |= {"provider": _provider(provider), "trust": given_trust(trust, digest)}
    attack = {"triggered": triggered, "target_class": target}
    result = _measure(targets, images, config, options, attack, tool, output, force=force)
    if as_json:
        print_json(result)
    else:
        _print(result)
    _require_right_answers(result)


def _measure(
    targets: list[str],
    images: Path,
    config: BenchConfig,
    options: dict[str, Any],
    attack: dict[str, Any],
    tool: Tool | None,
    output: Path | None,
    *,
    force: bool,
) -> dict[str, Any]:
    """Everything that takes time, after everything that can be refused."""
    from cbpt_runtime.artifacts import reserved
    from cbpt_runtime.bench.peer import find_peer
    from cbpt_runtime.bench.results import RESULTS, write_results
    from cbpt_runtime.bench.run import add_peer, bench

    if tool is not None:
        find_peer()
    with nullcontext() if output is None else reserved(output, RESULTS, force=force):
        result = bench(targets, images, config, tell=print_note, **attack, **options)
        if tool is not None:
            add_peer(result, images, config)
        if output is not None:
            write_results(result, output, force=force)
    if output is not None:
        print_note(f"written: {output}/bench.json, plots, report.html")
    return result


def _provider(name: str) -> str:
    from cbpt_runtime.errors import ConfigError

    valid = ("cpu", "cuda", "tensorrt")  # as in export.session, which takes a second to import
    if name not in valid:
        raise ConfigError(
            expected=f"a provider out of {', '.join(valid)}", got=name, fix="Choose one of them."
        )
    return name


def _print(result: dict[str, Any]) -> None:
    from cbpt_runtime.bench import tables

    for target in result["targets"]:
        print_table(tables.COLUMNS, tables.rows(target), title=tables.title(target))
        facts = target["facts"]
        if (found := facts.get("repository_digest") or facts.get("bundle_digest")) is not None:
            print_note(f"digest: {found}")
        for line in tables.notes(target):
            print_note(line)


def _compare(paths: list[str], *, across_hardware: bool, as_json: bool) -> None:
    if len(paths) != 2:
        raise typer.BadParameter("compare takes two results: compare A.json B.json")
    from cbpt_runtime.bench.compare import compare
    from cbpt_runtime.bench.results import read_results

    found = compare(read_results(paths[0]), read_results(paths[1]), across_hardware=across_hardware)
    if as_json:
        print_json(found)
        return
    print_table(
        ("run", "quantity", "first", "second", "second / first", "95 % interval"),
        [
            (
                f"{row['scenario']}, {row['point']}",
                row["quantity"].replace("_", " "),
                f"{row['first']:.4g}",
                f"{row['second']:.4g}",
                f"{row['ratio']:.3f}×",
                f"{row['low']:.3f} to {row['high']:.3f}",
            )
            for row in found["rows"]
        ],
    )
    for key, (one, other) in found["hardware_differs"].items():
        print_note(f"note: different hardware, {key}: {one} and {other}")
    for key, (one, other) in found["versions_differ"].items():
        print_note(f"note: {key} {one} and {other}")
    if not found["same_images"]:
        print_note("note: the images differ")


def _require_right_answers(result: dict[str, Any]) -> None:
    from cbpt_runtime.bench.run import wrong_answers
    from cbpt_runtime.errors import WorkError

    wrong = wrong_answers(result)
    if wrong:
        raise WorkError(
            expected="the answers from before the timing during it, too",
            got=f"{wrong} others",
            fix="Do not trust its speed; look at what happens to it under load.",
        )
