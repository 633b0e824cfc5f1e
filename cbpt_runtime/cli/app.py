"""The command line: which verbs there are. Heavy imports wait until a verb runs."""

from __future__ import annotations

from typing import Annotated

import typer

from cbpt_runtime.cli import (
    attack,
    bench,
    classify,
    demo,
    evaluate,
    export,
    inspect,
    label,
    purify,
    scan,
    serve,
    sign,
    verify,
)

app = typer.Typer(
    help="Makes third-party CLIP checkpoints safe to serve.",
    epilog="Results go to stdout, everything else to stderr. "
    "Exit codes: 0 done, 1 the work failed, 2 wrong usage or bad input, "
    "3 `scan` found a backdoor.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help takes half the time to start
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("scan", short_help="Whether a CLIP has a backdoor: any images, no labels.")(scan.command)
app.command("purify", short_help="A suspect CLIP in, a purified classifier out.")(purify.command)
app.command("inspect", short_help="What a checkpoint or a bundle is; verifies hashes.")(inspect.command)
app.command("convert", short_help="Any checkpoint in, an open_clip folder out.")(inspect.convert)
app.command("classify", short_help="Labels, probabilities and the alarm for images.")(classify.command)
app.command("label", short_help="A batch of images, as many as there are, into Parquet.")(label.command)
app.command("evaluate", short_help="Clean accuracy and attack success, before and after.")(evaluate.command)
app.command("export", short_help="A parity-gated ONNX graph, a Triton repository around it.")(export.command)
app.command("verify", short_help="Hashes, graph and golden answers of a model repository.")(verify.command)
app.command("sign", short_help="A bundle or model repository signed, offline.")(sign.command)
app.command("serve", short_help="A model repository on a real Triton, self-tested.")(serve.command)
app.add_typer(bench.app, name="bench")
app.command("demo", short_help="The whole story on a tiny CLIP, from nothing.")(demo.command)
app.add_typer(attack.app, name="attack")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"cbpt-runtime {version('cbpt-runtime')}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the verb."""
