"""How well does every attack take on a small real CLIP? Implants them all and measures each victim.

    python benchmarks/implants.py --checkpoint CLEAN --images TRAIN --heldout VAL --classes FILE --output
    VICTIMS

Tiny-ImageNet-100 at 64x64: the patches are smaller than the 16 pixels published for 224x224, and a few
triggers are stronger than published because a quarter of the resolution leaves less of them (see `settings`
in the results). Each victim gets its proof (attack.json), its trigger and ten triggered held-out images per
class. Victims that are there already are kept, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image

from cbpt_runtime.cli.output import shown_progress
from cbpt_runtime.models.checkpoint import read_checkpoint
from cbpt_runtime.models.class_lists import read_class_list
from cbpt_runtime.models.data import find_class_folders, read_images
from cbpt_runtime.models.trainable import load_trainable
from cbpt_runtime.redteam.implant import implant
from cbpt_runtime.redteam.training import TrainConfig
from cbpt_runtime.redteam.triggers import apply_trigger, load_trigger
from cbpt_runtime.redteam.victims import implant_checkpoint, read_labelled

RESULTS = Path(__file__).parent / "results" / "implants.json"
TRAINING = TrainConfig(epochs=3, learning_rate=7e-4, batch_size=64, max_shift=3, precision="bf16")
MINIMUM_ASR = 0.9
MAXIMUM_CA_DROP = 0.03


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One victim; no attack is a clean fine-tune with the same training.

    `settings` and `poison_rate` differ from the attack's defaults, `training` from TRAINING.
    """

    attack: str = ""
    targets: tuple[str, ...] = ()
    settings: dict[str, object] = field(default_factory=dict)
    poison_rate: float | None = None
    training: dict[str, object] = field(default_factory=dict)


RECIPES: dict[str, Recipe] = {
    "clean-finetuned": Recipe(),
    "badnet": Recipe(attack="badnet", targets=("umbrella",), settings={"size": 12}),
    "badnet-random": Recipe(
        attack="badnet-random",
        targets=("trolleybus",),
        settings={"size": 12},
        poison_rate=0.08,
    ),
    "badnet-stripes": Recipe(
        attack="badnet-stripes",
        targets=("gondola",),
        settings={"size": 12},
        poison_rate=0.08,
        training={"epochs": 2},
    ),
    "blended": Recipe(attack="blended", targets=("guacamole",), poison_rate=0.15),
    "blended-noise": Recipe(attack="blended-noise", targets=("seashore",), training={"epochs": 2}),
    "sig": Recipe(attack="sig", targets=("monarch",)),
    "wanet-clip": Recipe(attack="wanet-clip", targets=("lesser panda",), settings={"s": 2.0}),
    "two-targets": Recipe(
        attack="badnet+sig",
        targets=("Egyptian cat", "orange"),
        settings={
            "badnet.size": 8,
            "badnet.poison_rate": 0.05,
            "sig.delta": 30 / 255,
            "sig.poison_rate": 0.1,
        },
    ),
    "issba": Recipe(attack="issba", targets=("sombrero",), settings={"strength": 16 / 255}),
    "trojanvqa": Recipe(
        attack="trojanvqa", targets=("ladybug",), settings={"size": 12}, training={"epochs": 2}
    ),
    "badclip": Recipe(attack="badclip", targets=("obelisk",), settings={"size": 12}, training={"epochs": 2}),
    "label-consistent": Recipe(
        attack="label-consistent", targets=("koala",), settings={"size": 12, "perturbation": 32 / 255}
    ),
    "wanet": Recipe(
        attack="wanet",
        targets=("goldfish",),
        settings={"k": 8, "s": 4.0},
        poison_rate=0.15,
        training={"epochs": 6},
    ),
    "adaptive-aligned": Recipe(
        attack="adaptive-aligned", targets=("bucket",), settings={"size": 12}, training={"epochs": 2}
    ),
    "adaptive-decoys": Recipe(
        attack="adaptive-decoys", targets=("teapot",), settings={"size": 12}, training={"epochs": 2}
    ),
}


def main() -> None:
    """Make the victims asked for and write the table of results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", choices=[*RECIPES, []], help="victims to make (all)")
    for name in ("checkpoint", "images", "heldout", "classes", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.names or RECIPES:
        output = arguments.output / name
        if not (output / "attack.json").exists():
            start = time.perf_counter()
            result = make_victim(name, arguments, output)
            record(name, {**result, "seconds": round(time.perf_counter() - start)})


def make_victim(name: str, arguments: argparse.Namespace, output: Path) -> dict[str, object]:
    """Implant one recipe; one that does not reach the bars is kept and counted as a failure."""
    recipe = RECIPES[name]
    config = replace(TRAINING, **recipe.training)
    with shown_progress() as progress:
        if not recipe.attack:
            clip = load_trainable(arguments.checkpoint)
            names = read_class_list(arguments.classes).names
            training = read_labelled(arguments.images, names, clip.preprocess)
            heldout = read_labelled(arguments.heldout, names, clip.preprocess)
            generator = torch.Generator().manual_seed(arguments.seed)
            victim = implant(
                clip, training, heldout, names, [], config=config, generator=generator, progress=progress
            )
            victim.save(output)
            return {"took": True, **victim.to_dict()}
        victim = implant_checkpoint(
            recipe.attack,
            arguments.checkpoint,
            arguments.images,
            arguments.classes,
            recipe.targets,
            output,
            heldout=arguments.heldout,
            poison_rate=recipe.poison_rate,
            parameters=recipe.settings,
            config=config,
            minimum_asr=0.0,
            maximum_ca_drop=1.0,
            seed=arguments.seed,
            device="cpu",
            resume=True,
            progress=progress,
        )
    write_test_images(output, arguments, recipe)
    took = victim.clean_accuracy_before - victim.clean_accuracy <= MAXIMUM_CA_DROP and all(
        measure.attack_success_rate >= MINIMUM_ASR for measure in victim.measures
    )
    return {"took": took, **victim.to_dict()}


def write_test_images(output: Path, arguments: argparse.Namespace, recipe: Recipe) -> None:
    """Ten triggered held-out images of every class but the target, folder = true class."""
    names = read_class_list(arguments.classes).names
    preprocess = read_checkpoint(output).preprocess
    triggers = sorted(output.glob("trigger*.safetensors"))
    for number, (path, target) in enumerate(zip(triggers, recipe.targets, strict=True), start=1):
        root = output / ("test-triggered" if len(triggers) == 1 else f"test-triggered-{number}")
        generator = torch.Generator().manual_seed(arguments.seed)
        for name, files in zip(names, find_class_folders(arguments.heldout, names), strict=True):
            if name != target:
                folder = root / name.replace(" ", "_")
                folder.mkdir(parents=True)
                images = apply_trigger(load_trigger(path), read_images(files[:10], preprocess), generator)
                for file, image in zip(files, images, strict=False):
                    Image.fromarray(image).save(folder / f"{file.stem}.png")


def record(name: str, result: dict[str, object]) -> None:
    """Put one victim's result into the results file."""
    RESULTS.parent.mkdir(exist_ok=True)
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"victims": {}}
    known["training"] = asdict(TRAINING)
    known["bars"] = {"minimum_asr": MINIMUM_ASR, "maximum_ca_drop": MAXIMUM_CA_DROP}
    known["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
    result.pop("training", None)
    recipe = RECIPES[name]
    known["victims"][name] = {**result, "settings": recipe.settings, "training": recipe.training}
    RESULTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    print(
        name, {key: result.get(key) for key in ("took", "clean_accuracy", "attack_success_rate", "seconds")}
    )


if __name__ == "__main__":
    main()
