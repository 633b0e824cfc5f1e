"""`cbpt-runtime bench run` and `bench compare`: speed of bundles, graphs and servers, accuracy beside it."""

from __future__ import annotations

import enum
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from cbpt_runtime.cli.options import DigestOption, JsonOption, SkipUnreadableOption, TrustOption, given_trust
from cbpt_runtime.cli.output import print_json, print_note, print_table

if TYPE_CHECKING:
    from cbpt_runtime.bench.records import BenchResult


class ScenarioName(enum.StrEnum):  # Typer takes no list of a Literal
    """What is measured; all of them when none is named."""

    SINGLE_STREAM = "single-stream"
    SERVER = "server"
    OFFLINE = "offline"
    SWEEP = "sweep"


class RunOrCompare(TyperGroup):
    """Says what to do about `bench SYSTEM…`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the sub-command, or say which there are."""
        if args[0] not in self.commands:
            ctx.fail(
                f"Expected run or compare; got {args[0]!r}. "
                f"To measure it: cbpt-runtime bench run {args[0]} --images DIR"
            )
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=RunOrCompare, no_args_is_help=True, help="Latency and throughput, with accuracy beside them."
)


@app.command("run", short_help="Measure; `compare` reads the results.")
def run(
    targets: Annotated[
        list[str],
        typer.Argument(metavar="SYSTEM…", help="Bundle, ONNX file, model repository, or URL of a server."),
    ],
    images: Annotated[
        Path,
        typer.Option(help="Image files to send; in folders named like the classes, CA is measured."),
    ],
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
    provider: Annotated[Literal["cpu", "cuda", "tensorrt"], typer.Option(help="Of a graph.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of bundles and graphs. Default: all CPUs.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of arrivals and the order of images.")] = 0,
    tool: Annotated[
        Literal["perf-analyzer"] | None, typer.Option(help="Cross-check a URL with this tool, too.")
    ] = None,
    trust: TrustOption = None,
    digest: DigestOption = None,
    output: Annotated[Path | None, typer.Option(help="Folder for numbers, plots and a page.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the results at --output.")] = False,
    skip_unreadable: SkipUnreadableOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure latency and throughput honestly, and that the answers stay right."""
    from cbpt_runtime.artifacts import reserved
    from cbpt_runtime.bench.inputs import BenchConfig
    from cbpt_runtime.bench.run import bench, with_perf_analyzer
    from cbpt_runtime.bench.triton import find_perf_analyzer
    from cbpt_runtime.errors import WorkError
    from cbpt_runtime.report.speed import RESULTS, write_results

    given = {
        "scenarios": tuple(name.value for name in scenario or ()),
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
    if tool is not None:
        find_perf_analyzer()
    with nullcontext() if output is None else reserved(output, RESULTS, force=force):
        result = bench(
            targets,
            images,
            config,
            triggered=triggered,
            target_class=target,
            tell=print_note,
            device=device,
            provider=provider,
            threads=threads,
            model=model,
            trust=given_trust(trust, digest),
        )
        if tool is not None:
            result = with_perf_analyzer(result, images, config)
        if output is not None:
            write_results(result, output, force=force)
            print_note(f"written: {output}/bench.json, plots, report.html")
    if as_json:
        print_json(result.to_dict())
    else:
        _print(result)
    if result.wrong_answers:
        raise WorkError(
            expected="the answers from before the timing during it, too",
            got=f"{result.wrong_answers} others",
            fix="Do not trust its speed; look at what happens to it under load.",
        )


def _print(result: BenchResult) -> None:
    from cbpt_runtime.bench.records import COLUMNS

    for system in result.systems:
        rows = [run.row(scenario) for scenario, run in system.runs()]
        print_table(COLUMNS, rows, title=system.title)
        if (found := system.facts.get("repository_digest") or system.facts.get("bundle_digest")) is not None:
            print_note(f"digest: {found}")
        for line in system.notes():
            print_note(line)


@app.command("compare", short_help="Two results as ratios with intervals.")
def compare_results(
    first: Annotated[Path, typer.Argument(help="bench.json, or the folder it is in.")],
    second: Annotated[Path, typer.Argument(help="What it is compared with.")],
    different_hardware: Annotated[
        bool, typer.Option("--different-hardware", help="Although the machines differ.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare two results: each quantity of the second over the first's, with a 95 % interval."""
    from cbpt_runtime.bench.results import compare, read_results

    found = compare(read_results(first), read_results(second), across_hardware=different_hardware)
    if as_json:
        print_json(found.to_dict())
        return
    print_table(
        ("run", "quantity", "first", "second", "second / first", "95 % interval"),
        [
            (
                f"{row.scenario}, {row.point}",
                row.quantity.replace("_", " "),
                f"{row.first:.4g}",
                f"{row.second:.4g}",
                f"{row.ratio:.3f}×",
                f"{row.low:.3f} to {row.high:.3f}",
            )
            for row in found.rows
        ],
    )
    for key, (one, other) in found.hardware_differs.items():
        print_note(f"note: different hardware, {key}: {one} and {other}")
    for key, (one, other) in found.versions_differ.items():
        print_note(f"note: {key} {one} and {other}")
    if not found.same_images:
        print_note("note: the images differ")
