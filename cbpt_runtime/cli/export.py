"""`cbpt-runtime export`: a bundle in, a Triton model repository out, if the parity gate passes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cbpt_runtime.cli.output import print_json, print_note, print_pairs, print_table
from cbpt_runtime.cli.progress import shown_progress

if TYPE_CHECKING:
    from cbpt_runtime.export.repository import Exported

_SOURCES = {"folder": "the images of --calibration", "drawn": "drawn pictures"}


def command(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    output: Annotated[Path, typer.Option(help="Model repository to make.")],
    name: Annotated[str, typer.Option(help="Name of the served model.")] = "clip",
    precision: Annotated[
        Literal["fp32", "fp16", "int8"] | None,
        typer.Option(help="Of the network. Default: the profile's, fp32. The others need --calibration."),
    ] = None,
    profile: Annotated[
        str, typer.Option(help="Deployment target: cpu, cuda, tensorrt or a TOML file.")
    ] = "cpu",
    max_batch: Annotated[
        int | None, typer.Option(help="Largest batch the server may form. Default: the profile's, 64.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Clean labelled images, one folder per class, for the gate and the golden set."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Bake encoder and heads into one ONNX graph, compare it with PyTorch, write a Triton repository."""
    from cbpt_runtime.export.profiles import read_profile
    from cbpt_runtime.export.repository import export_bundle

    settings = read_profile(profile, precision=precision, max_batch=max_batch)
    with shown_progress() as progress:
        exported = export_bundle(
            bundle, output, name=name, profile=settings, calibration=calibration, progress=progress
        )
    if calibration is None:
        print_note("note: the gate looked at drawn pictures; --calibration makes it look at your images")
    if as_json:
        print_json(
            {"repository": str(exported.path), "name": exported.name, "digest": exported.digest}
            | {"parity": exported.parity}
        )
    else:
        print_exported(exported)


def print_exported(exported: Exported) -> None:
    """Print what the gate saw and where the repository is."""
    print_parity(exported.parity)
    print_pairs(
        {
            "parity": f"passed on {exported.parity['provider']}, {_SOURCES[exported.parity['images']]}",
            "repository": exported.path,
            "digest": exported.digest,
            "next": f"cbpt-runtime verify {exported.path}",
        }
    )


def print_parity(parity: dict[str, Any]) -> None:
    """Print every comparison of a gate."""
    print_table(
        ("PyTorch against onnxruntime", "batch", "images", "largest difference", "tolerance"),
        [
            (
                row["quantity"],
                row["batch_size"],
                row["images"],
                f"{row['largest_difference']:.2g}",
                f"{row['tolerance']:g}",
            )
            for row in parity["comparisons"]
        ],
    )
    if measured := parity.get("precision"):
        print_pairs({name: _number(value) for name, value in measured.items()})
        if measured["speed_up_batch_1"] < 1 and measured["speed_up_batch_8"] < 1:
            print_note("note: this precision is slower than fp32 on this machine")


def _number(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value
