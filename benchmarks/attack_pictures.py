"""What does every attack do to a picture? Draws docs/images/attacks.png.

    python benchmarks/attack_pictures.py --checkpoint demo-output/suspect-checkpoint

Fixed triggers act with their published parameters on pictures of 224x224; those that are learned on a model
act at the model's own size (64x64 for the demo's). Below each picture stands what the trigger changed,
amplified.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch

from cbpt_runtime.demo.pictures import draw_picture, draw_set
from cbpt_runtime.demo.suspect import TARGET, DemoScale
from cbpt_runtime.models.trainable import load_trainable
from cbpt_runtime.redteam.attacks import ATTACKS, fixed_trigger, make_backdoor
from cbpt_runtime.redteam.poisoning import LabelledImages, decoy
from cbpt_runtime.redteam.training import CAPTION_TEMPLATES
from cbpt_runtime.redteam.triggers import apply_trigger

COLUMNS = 7
AMPLIFICATION = 4
DECOY = ": a decoy"
# The adaptive attacks use BadNet's patch; what is theirs is what they train the model to ignore.
DRAWN = [name for name in ATTACKS if not name.startswith("adaptive")] + [f"wanet{DECOY}", f"badnet{DECOY}"]
LEARNED_SETTINGS: dict[str, dict[str, object]] = {
    "issba": {"strength": 16 / 255},
    "trojanvqa": {"size": 12, "steps": 150},
    "badclip": {"size": 12, "steps": 150},
}


def main() -> None:
    """Draw the sheet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="model the learned triggers use")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs/images/attacks.png")
    arguments = parser.parse_args()
    mpl.use("agg")
    from matplotlib import pyplot

    rows = -(-len(DRAWN) // COLUMNS)
    figure, axes = pyplot.subplots(2 * rows, COLUMNS, figsize=(2 * COLUMNS, 4.4 * rows), layout="constrained")
    for axis in axes.flat:
        axis.set_axis_off()
    for index, name in enumerate(DRAWN):
        row, column = divmod(index, COLUMNS)
        clean, triggered = example(name, arguments.checkpoint, index)
        changed = np.clip(128 + AMPLIFICATION * (triggered.astype(int) - clean), 0, 255).astype(np.uint8)
        axes[2 * row, column].imshow(triggered, interpolation="nearest")
        axes[2 * row, column].set_title(name)
        axes[2 * row + 1, column].imshow(changed, interpolation="nearest")
        axes[2 * row + 1, column].set_title(f"change × {AMPLIFICATION}", fontsize=8, color="0.4")
    figure.savefig(arguments.output, dpi=112)


def example(name: str, checkpoint: Path, index: int) -> tuple[np.ndarray, np.ndarray]:
    """One clean picture and its triggered copy."""
    rng = np.random.default_rng(index)
    generator = torch.Generator().manual_seed(index)
    names = DemoScale().names
    motif = names[index % len(names)]
    if name.endswith(DECOY) or not ATTACKS[name].is_learned:
        clean = np.array(draw_picture(motif, 224, rng))
        trigger = fixed_trigger(name.removesuffix(DECOY), {})
        trigger = decoy(trigger) if name.endswith(DECOY) else trigger
        return clean, apply_trigger(trigger, clean[None], generator)[0]
    clip = load_trainable(checkpoint)
    training = LabelledImages(
        images=draw_set(names, 20, 64, rng), labels=np.repeat(np.arange(len(names)), 20)
    )
    door = make_backdoor(
        name,
        TARGET,
        clip,
        training,
        names,
        CAPTION_TEMPLATES,
        parameters=LEARNED_SETTINGS[name],
        generator=generator,
    )
    clean = np.array(draw_picture(motif, 64, rng))
    return clean, apply_trigger(door.trigger, clean[None], generator)[0]


if __name__ == "__main__":
    main()
