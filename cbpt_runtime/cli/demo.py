"""`cbpt-runtime demo`: the whole story on a tiny CLIP, from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cbpt_runtime.artifacts.names import shell_line
from cbpt_runtime.cli.classify import print_answers
from cbpt_runtime.cli.evaluate import print_evaluation
from cbpt_runtime.cli.options import JsonOption
from cbpt_runtime.cli.output import percent, print_json, print_note, print_pairs, print_table, shown_progress

if TYPE_CHECKING:
    from cbpt_runtime.demo import DemoResult, ServedDemo


def command(
    output: Annotated[Path, typer.Option(help="Folder to make.")] = Path("demo-output"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of every random choice.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier demo in --output.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Draw images, train a backdoored CLIP, prove the backdoor, purify it, measure it again, serve it."""
    from cbpt_runtime.demo import run_demo, serve_demo

    with shown_progress() as progress:
        result = run_demo(output, seed=seed, force=force, progress=progress)
        served = serve_demo(result, progress=progress)
    if isinstance(served, str):
        print_note(f"NOT SERVED: {served}")
    if as_json:
        print_json({**result.to_dict(), "served": None if isinstance(served, str) else served.to_dict()})
    else:
        _print_result(result)
        if not isinstance(served, str):
            _print_served(served)


def _print_result(result: DemoResult) -> None:
    print_table(("stage", "seconds"), [(s, f"{t:.1f}") for s, t in result.stage_seconds.items()])
    print_pairs(
        {
            "the attacker's target": result.target,
            "attack success when the model left training": percent(result.implanted_attack_success_rate),
        }
    )
    print_evaluation(result.evaluation)
    print_pairs(
        {
            "pictures": result.pictures,
            "bundle": result.bundle,
            "report": result.report,
            "try": shell_line("cbpt-runtime", "classify", result.bundle, _example(result.triggered_images)),
        }
    )


def _print_served(served: ServedDemo) -> None:
    print_answers((served.clean, served.triggered))
    print_pairs(
        {
            "answered over gRPC by": served.server,
            "export, serving and stopping took": f"{served.seconds:.0f} s",
            "serve it yourself": shell_line("cbpt-runtime", "serve", served.repository),
        }
    )


def _example(folder: Path) -> Path:
    """One triggered picture to try."""
    return min(folder.rglob("*.png"), default=folder)
