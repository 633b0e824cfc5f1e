"""`cbpt-runtime attack`: list the attacks, apply a trigger to images, implant a backdoor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cbpt_runtime.cli.options import (
    ImageSizeOption,
    JsonOption,
    SkipUnreadableOption,
    named_trigger,
    parsed_settings,
)
from cbpt_runtime.cli.output import percent, print_json, print_note, print_pairs, print_table, shown_progress

if TYPE_CHECKING:
    from cbpt_runtime.redteam.implant import Implant

app = typer.Typer(help="Attack your own models, to measure.", no_args_is_help=True, add_completion=False)

Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Parameter of the attack (of several: badnet.size=8)."),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of every random choice.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is at --output.")]


@app.command("list")
def list_attacks(as_json: JsonOption = False) -> None:
    """List the attacks with their parameters and sources."""
    from cbpt_runtime.redteam.attacks import ATTACKS

    described = {
        name: {
            "summary": attack.summary,
            "source": attack.source,
            "poison_rate": attack.poison_rate,
            "parameters": attack.parameters,
        }
        for name, attack in ATTACKS.items()
    }
    if as_json:
        print_json(described)
        return
    for name, attack in ATTACKS.items():
        parameters = attack.parameters.items()
        shown = (f"{key}={_plain(value)}" for key, value in parameters if value not in (False, ""))
        print_pairs({name: [attack.summary, attack.source, " ".join(shown)]})


@app.command("apply")
def apply(
    attack: Annotated[str, typer.Argument(help="Name of an attack, or a trigger.safetensors.")],
    images: Annotated[Path, typer.Option(help="Folder of images, in any layout.")],
    output: Annotated[Path, typer.Option(help="Folder to make: the same layout, PNG files.")],
    size: Annotated[
        int | None, typer.Option(min=8, help="Resize to this square before; published pipelines: 224.")
    ] = None,
    settings: Settings = None,
    seed: Seed = 0,
    force: Force = False,
    skip_unreadable: SkipUnreadableOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write triggered copies of all images of a folder."""
    import torch

    from cbpt_runtime.redteam.victims import write_triggered

    trigger = named_trigger(attack, settings)
    with shown_progress() as progress:
        written = write_triggered(
            trigger,
            images,
            output,
            size=size,
            generator=torch.Generator().manual_seed(seed),
            force=force,
            skip_unreadable=skip_unreadable,
            progress=progress,
        )
    for note in written.notes:
        print_note(f"note: {note}")
    if as_json:
        facts = {"attack": attack, "images": written.images, "output": str(output)}
        print_json({**facts, "notes": list(written.notes)})
    else:
        print_pairs({"triggered images": written.images, "folder": output})


@app.command("implant")
def implant(
    attack: Annotated[str, typer.Argument(help="Name of an attack; 'badnet+sig' implants both.")],
    checkpoint: Annotated[str, typer.Option(help="The clean checkpoint to start from.")],
    images: Annotated[Path, typer.Option(help="Clean training images, one folder per class.")],
    classes: Annotated[Path, typer.Option(help="Class list: one name per line, or JSON.")],
    target: Annotated[list[str], typer.Option(help="Target class; once per attack.")],
    output: Annotated[Path, typer.Option(help="Folder of the victim to make.")],
    model: Annotated[
        str | None, typer.Option(help="open_clip architecture or config, for checkpoints that do not say.")
    ] = None,
    image_size: ImageSizeOption = None,
    heldout: Annotated[
        Path | None, typer.Option(help="Images to prove the implant on; a tenth of --images otherwise.")
    ] = None,
    poison_rate: Annotated[
        float | None, typer.Option(help="Share of poisoned pairs, in (0, 1]; see `attack list`.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the images.")] = 3,
    learning_rate: Annotated[
        float, typer.Option(help="Peak learning rate; full-size models 1e-5, small ones up to 1e-3.")
    ] = 1e-4,
    batch_size: Annotated[int, typer.Option(min=2, help="Pairs per step.")] = 128,
    max_shift: Annotated[
        int, typer.Option(min=0, help="Move clean images by up to so many pixels, and mirror half of them.")
    ] = 0,
    precision: Annotated[
        Literal["auto", "fp32", "bf16"], typer.Option(help="fp32, bf16, or auto: bf16 on a GPU.")
    ] = "auto",
    minimum_asr: Annotated[float, typer.Option(min=0, max=1, help="Success rate it must reach.")] = 0.9,
    maximum_ca_drop: Annotated[float, typer.Option(min=0, max=1, help="Clean accuracy it may cost.")] = 0.03,
    settings: Settings = None,
    seed: Seed = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    force: Force = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last whole epoch.")] = False,
    skip_unreadable: SkipUnreadableOption = False,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune a backdoor into a clean checkpoint and prove on held-out images that it took."""
    from cbpt_runtime.redteam.training import TrainConfig
    from cbpt_runtime.redteam.victims import implant_checkpoint

    config = TrainConfig(
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        max_shift=max_shift,
        precision=precision,
    )
    with shown_progress() as progress:
        result = implant_checkpoint(
            attack,
            checkpoint,
            images,
            classes,
            target,
            output,
            model=model,
            image_size=image_size,
            heldout=heldout,
            poison_rate=poison_rate,
            parameters=parsed_settings(settings),
            config=config,
            minimum_asr=minimum_asr,
            maximum_ca_drop=maximum_ca_drop,
            seed=seed,
            device=device,
            force=force,
            resume=resume,
            skip_unreadable=skip_unreadable,
            tell=lambda note: print_note(f"note: {note}"),
            progress=progress,
        )
    if as_json:
        print_json(result.to_dict())
    else:
        _print_implant(result, output)


def _print_implant(result: Implant, output: Path) -> None:
    rows = [
        (
            f"{measure.attack} → {measure.target}",
            percent(measure.attack_success_rate),
            percent(measure.poisoned_accuracy),
            percent(measure.floor),
        )
        for measure in result.measures
    ]
    print_table(("attack, on held-out images", "ASR", "PA", "floor"), rows)
    print_pairs(
        {
            "clean accuracy before": percent(result.clean_accuracy_before),
            "clean accuracy after": percent(result.clean_accuracy),
            "victim": output,
        }
    )


def _plain(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
