"""`cbpt-runtime export`: a bundle in, a Triton model repository out, if the parity gate passes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cbpt_runtime.artifacts.names import shell_line
from cbpt_runtime.cli.options import DigestOption, JsonOption, SkipUnreadableOption, TrustOption, given_trust
from cbpt_runtime.cli.output import percent, print_json, print_note, print_pairs, print_table, shown_progress

if TYPE_CHECKING:
    from cbpt_runtime.export.repository import Exported

_SOURCES = {"folder": "the images given", "bundle": "the bundle's images", "drawn": "drawn pictures"}


def command(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    output: Annotated[Path, typer.Option(help="Model repository to make.")],
    name: Annotated[str, typer.Option(help="Name of the served model.")] = "clip",
    precision: Annotated[
        Literal["fp32", "fp16", "int8"] | None,
        typer.Option(
            help="Of the network. Default: the profile's, fp32. The others are measured on clean images."
        ),
    ] = None,
    profile: Annotated[
        str, typer.Option(help="Deployment target: cpu, cuda, tensorrt or a TOML file.")
    ] = "cpu",
    max_batch: Annotated[
        int | None, typer.Option(help="Largest batch the server may form. Default: the profile's, 64.")
    ] = None,
    second_look: Annotated[
        bool | None,
        typer.Option(
            "--second-look/--no-second-look",
            help="Look again at suspicious images, in the server. Default: the profile's, no.",
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Clean labelled images, one folder per class, instead of the bundle's own."),
    ] = None,
    skip_unreadable: SkipUnreadableOption = False,
    trust: TrustOption = None,
    digest: DigestOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a model repository at --output.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Bake encoder and heads into one ONNX graph, compare it with PyTorch, write a Triton repository."""
    from cbpt_runtime.export.profiles import read_profile
    from cbpt_runtime.export.repository import export_bundle
    from cbpt_runtime.trust import open_bundle

    settings = read_profile(profile, precision=precision, max_batch=max_batch, second_look=second_look)
    with shown_progress() as progress:
        opened = open_bundle(bundle, given_trust(trust, digest))
        exported = export_bundle(
            opened,
            output,
            name=name,
            profile=settings,
            calibration=calibration,
            force=force,
            skip_unreadable=skip_unreadable,
            progress=progress,
        )
    for note in exported.notes:
        print_note(f"note: {note}")
    if exported.parity["images"] == "drawn":
        print_note("note: the gate looked at drawn pictures; --calibration makes it look at your images")
    if as_json:
        print_json(
            {"repository": str(exported.path), "name": exported.name, "digest": exported.digest}
            | {"second_look": settings.second_look}
            | {"bundle_digest": opened.digest, "parity": exported.parity}
        )
    else:
        print_note(f"digest of {bundle}: {opened.digest}")
        print_exported(exported)


def print_exported(exported: Exported) -> None:
    """Print what the gate saw and where the repository is."""
    print_parity(exported.parity)
    print_pairs(
        {
            "parity": f"passed on {exported.parity['provider']}, {_SOURCES[exported.parity['images']]}",
            "second look": _second_look(exported.golden_twice),
            "repository": exported.path,
            "digest": exported.digest,
            "next": shell_line("cbpt-runtime", "verify", exported.path),
        }
    )


def _second_look(golden: int | None) -> str:
    """Whether the server looks twice, and whether its self-test will see that."""
    if golden is None:
        return "off"
    return f"on; {golden or 'no'} golden image{'' if golden == 1 else 's'} looked at twice"


def print_parity(parity: dict[str, Any]) -> None:
    """Print every comparison of a gate, and what a lower precision costs and saves."""
    if "comparisons" in parity:
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
    if "precision" in parity:
        print_precision(parity["precision"])


def print_precision(measured: dict[str, Any]) -> None:
    """Print what fp16 or int8 costs on the held-out images, and what it saves."""
    rows = {"clean accuracy": "accuracy", "worst dummy-trigger success": "dummy_trigger_success"}
    print_table(
        (f"on {measured['heldout_images']} held-out images", "fp32", "now"),
        [(title, percent(measured[f"{key}_fp32"]), percent(measured[key])) for title, key in rows.items()],
    )
    pairs = {"labels as in fp32": percent(measured["labels_equal"])}
    if speed_ups := measured.get("speed_ups"):
        kept, layers = len(measured["layers_kept_in_fp32"]), measured["layers"]
        pairs["layers in fp32"] = f"{kept} of {layers}" if layers else "norms and softmax"
        pairs["size"] = f"{measured['size_ratio']:.2f}× fp32"
        pairs["speed here"] = ", ".join(
            f"{ratio:.2f}× fp32 at batch {size}" for size, ratio in speed_ups.items()
        )
    print_pairs(pairs)
    if speed_ups and max(speed_ups.values()) < 1:
        print_note("note: this precision is slower than fp32 on this machine")
