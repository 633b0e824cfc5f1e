"""`cbpt-runtime purify`: a suspect checkpoint in, a purified classifier out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cbpt_runtime.cli.options import (
    ClusterOption,
    DeviceOption,
    ImageSizeOption,
    JsonOption,
    ModelOption,
    ReferenceOption,
    SeedOption,
    SkipUnreadableOption,
    TemplateOption,
)
from cbpt_runtime.cli.output import (
    number,
    percent,
    print_json,
    print_note,
    print_pairs,
    print_table,
    shown_progress,
)

if TYPE_CHECKING:
    from cbpt_runtime.bundle import Bundle


def command(
    context: typer.Context,
    checkpoint: Annotated[
        str,
        typer.Option(
            help="Suspect checkpoint: open_clip or transformers folder, .safetensors, .pt/.bin"
            " (FILE#NAME for one of several sets of weights), pretrained tag or hf-hub: id."
        ),
    ],
    classes: Annotated[Path, typer.Option(help="Class names: one per line, or JSON with templates.")],
    images: Annotated[Path, typer.Option(help="A few clean images: one folder per class, or no folders.")],
    output: Annotated[Path, typer.Option(help="Bundle folder to make.")],
    model: ModelOption = None,
    image_size: ImageSizeOption = None,
    template: TemplateOption = None,
    reference: ReferenceOption = None,
    shots: Annotated[int, typer.Option(min=1, help="Images per class used for tuning.")] = 16,
    seed: SeedOption = None,
    device: DeviceOption = "auto",
    cluster: ClusterOption = None,
    method: Annotated[
        Literal["cbpt", "ft", "cleanclip", "abd", "rvpt"],
        typer.Option(help="How: CBPT tunes the class prompts; the others tune the image tower instead."),
    ] = "cbpt",
    parameterization: Annotated[
        Literal["embedding", "prompt"] | None,
        typer.Option(
            help="What cbpt tunes: class embeddings, or contexts in front of names. Default: embedding."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="JSON file with the method's settings; flags given here win.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run: what it finished is kept.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle at --output.")] = False,
    no_images: Annotated[
        bool, typer.Option("--no-images", help="Keep no clean images in the bundle: exports then need some.")
    ] = False,
    skip_unreadable: SkipUnreadableOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find the backdoor of a suspect CLIP, tune it out of the class prompts, write a purified classifier."""
    from cbpt_runtime.pipeline import purify_checkpoint, read_method

    if method != "cbpt":
        source = context.get_parameter_source("cluster")
        if source is not None and source.name == "ENVIRONMENT":
            cluster = None  # RAY_ADDRESS is there for others, too
        _refuse_options_of_cbpt(method, parameterization=parameterization, resume=resume)
    chosen = read_method(method, config, seed=seed, parameterization=parameterization)
    try:
        with shown_progress() as progress:
            bundle = purify_checkpoint(
                checkpoint,
                classes,
                images,
                output,
                model=model,
                image_size=image_size,
                templates=template or None,
                reference=reference,
                shots=shots,
                method=chosen,
                device=device,
                cluster=cluster,
                force=force,
                resume=resume,
                keep_images=not no_images,
                skip_unreadable=skip_unreadable,
                progress=progress,
            )
    except KeyboardInterrupt:
        kept = "; finished stages are kept, continue with --resume" if method == "cbpt" else ""
        print_note(f"interrupted: no bundle was written{kept}")
        raise
    for note in bundle.making.notes:
        print_note(f"note: {note}")
    if as_json:
        print_json(_summary(bundle))
    else:
        print_result(bundle)


def _refuse_options_of_cbpt(method: str, *, parameterization: str | None, resume: bool) -> None:
    from cbpt_runtime.errors import ConfigError

    for option, is_given in (("--parameterization", parameterization is not None), ("--resume", resume)):
        if is_given:
            raise ConfigError(
                expected=f"{option} with --method cbpt",
                got=f"{option} with --method {method}, which has nothing of the kind",
                fix=f"Leave {option} away.",
            )


def print_result(bundle: Bundle) -> None:
    """Print what purification found and did."""
    metrics = bundle.metrics
    if bundle.suspects:
        print_table(
            ("suspected target", "score", "p-value", "trigger family", "dummy-trigger success"),
            [
                (
                    suspect.name,
                    number(suspect.score),
                    number(suspect.p_value),
                    suspect.family or "–",
                    f"{percent(suspect.success_before)} → {percent(suspect.success_after)}",
                )
                for suspect in bundle.suspects
            ],
        )
    print_table(("stage", "seconds"), [(s, f"{t:.1f}") for s, t in bundle.manifest["stage_seconds"].items()])
    before, after = metrics.get("heldout_ca_before"), metrics.get("heldout_ca_after")
    meaning = ": this method looks for no target and has no alarm" if bundle.verdict == "unknown" else ""
    is_labelled = bundle.making.labelled_by != "suspect"
    accuracy = "held-out clean accuracy" if is_labelled else "agreement with the suspect's labels"
    words = None if bundle.prompts is None else bundle.prompts.verdict
    print_pairs(
        {
            "verdict": bundle.verdict + meaning,
            **({} if words is None else {"prompts": words}),
            accuracy: f"{percent(before)} → {percent(after)}",
            "bundle": bundle.path,
            "digest": bundle.digest,
            "report": bundle.path / "report.html",
        }
    )


def _summary(bundle: Bundle) -> dict[str, object]:
    keys = ("verdict", "suspects", "metrics", "stage_seconds")
    head = {"bundle": str(bundle.path), "digest": bundle.digest}
    odd = [] if bundle.prompts is None else list(bundle.prompts.suspects)
    return head | {key: bundle.manifest[key] for key in keys} | {"odd_words": odd}
