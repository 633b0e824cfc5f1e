"""An image tower with learned inputs at its later layers, as visual prompt tuning puts them there.

Source: Jia et al., "Visual prompt tuning", arXiv:2203.12119, the deep variant. A vision transformer gets
tokens beside its own, anew at every layer; a ModifiedResNet, which has no tokens, gets a map that is added
to the input of every stage (our reading: both are inputs that do not depend on the image).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from cbpt_runtime.errors import CheckpointError, ConfigError

PROMPTS, TOWER = "visual_prompts.", "tower."
"""Prefixes of the names of a prompted tower's tensors, by which a bundle shows that it holds one."""

_STAGES = ("layer1", "layer2", "layer3", "layer4", "attnpool")


class PromptedTower(nn.Module):
    """An open_clip `VisionTransformer` or `ModifiedResNet` with prompts at its last layers.

    Args:
        tower: The image tower.
        prompts: One tensor per prompted layer, the last one for the last layer: [tokens, width] for a
            transformer, [channels, height, width] for a ResNet.
    """

    def __init__(self, tower: nn.Module, prompts: Sequence[Tensor]) -> None:
        super().__init__()
        self.tower = tower
        self.visual_prompts = nn.ParameterList([nn.Parameter(prompt) for prompt in prompts])

    def forward(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Features, not normalised, of normalised pixels."""
        return run_tower(self.tower, pixels, list(self.visual_prompts))[0]


def initial_prompts(
    tower: nn.Module, image_size: tuple[int, int], *, tokens: int, first_layer: int | None, seed: int
) -> list[Tensor]:
    """Small Gaussian prompts for every layer from one on.

    Args:
        tower: The tower they are for.
        image_size: Height and width of its input.
        tokens: Tokens per layer of a transformer.
        first_layer: Layers before it get none; a quarter of the layers if None.
        seed: Of the random numbers.

    Raises:
        ConfigError: A tower of another kind, or a first layer it does not have.
    """
    depth = _depth(tower)
    first = round(depth / 4) if first_layer is None else first_layer
    if first >= depth:
        raise ConfigError(
            expected=f"a first layer below {depth}, the layers of this tower",
            got=str(first),
            fix="Choose a smaller `first_layer`.",
        )
    device = next(tower.parameters()).device
    with torch.no_grad():
        shapes = _input_shapes(tower, torch.zeros(1, 3, *image_size, device=device))
    generator = torch.Generator().manual_seed(seed)
    if isinstance(tower, VisionTransformer):
        shapes = [(tokens, shape[-1]) for shape in shapes]
    return [0.02 * torch.randn(shape, generator=generator).to(device) for shape in shapes[first:]]


def run_tower(
    tower: nn.Module,
    pixels: Float[Tensor, "batch 3 height width"],
    prompts: Sequence[Tensor],
    *,
    marks: int = 0,
) -> tuple[Float[Tensor, "batch dim"], list[Tensor]]:
    """Features of a tower with prompts at its last layers, and how it got there.

    Args:
        tower: Vision transformer or ModifiedResNet.
        pixels: Normalised.
        prompts: As `PromptedTower` has them; empty runs the tower as it is.
        marks: How many of the last layers to tell of.

    Returns:
        Features, not normalised, and after each of the last layers one vector per image: the class token, the
        mean over the places of a stage, or the pooled output.
    """
    if isinstance(tower, VisionTransformer):
        return _run_transformer(tower, pixels, prompts, marks)
    return _run_resnet(tower, pixels, prompts, marks)


def _run_transformer(
    tower: Any, pixels: Tensor, prompts: Sequence[Tensor], marks: int
) -> tuple[Tensor, list[Tensor]]:
    x = tower._embeds(pixels)
    blocks = tower.transformer.resblocks
    first, seen, beside = len(blocks) - len(prompts), [], 0
    for number, block in enumerate(blocks):
        if number >= first:
            prompt = prompts[number - first].expand(x.shape[0], -1, -1)
            x = torch.cat([x[:, :1], prompt, x[:, 1 + beside :]], dim=1)
            beside = prompt.shape[1]
        x = block(x) if tower.transformer.batch_first else block(x.transpose(0, 1)).transpose(0, 1)
        if number >= len(blocks) - marks:
            seen.append(x[:, 0])
    pooled, _ = tower._pool(torch.cat([x[:, :1], x[:, 1 + beside :]], dim=1))
    return (pooled if tower.proj is None else pooled @ tower.proj), seen


def _run_resnet(
    tower: Any, pixels: Tensor, prompts: Sequence[Tensor], marks: int
) -> tuple[Tensor, list[Tensor]]:
    x, seen = tower.stem(pixels), []
    first = len(_STAGES) - len(prompts)
    for number, name in enumerate(_STAGES):
        if number >= first:
            x = x + prompts[number - first]
        x = getattr(tower, name)(x)
        if number >= len(_STAGES) - marks:
            seen.append(x.flatten(2).mean(dim=2) if x.ndim == 4 else x)
    return x, seen


def _input_shapes(tower: Any, pixels: Tensor) -> list[tuple[int, ...]]:
    """Shape of the input of every layer, without the batch."""
    if isinstance(tower, VisionTransformer):
        return [tuple(tower._embeds(pixels).shape[1:])] * len(tower.transformer.resblocks)
    x, shapes = tower.stem(pixels), []
    for name in _STAGES:
        shapes.append(tuple(x.shape[1:]))
        x = getattr(tower, name)(x)
    return shapes


def _depth(tower: nn.Module) -> int:
    if isinstance(tower, VisionTransformer):
        return len(tower.transformer.resblocks)
    if isinstance(tower, ModifiedResNet):
        return len(_STAGES)
    raise ConfigError(
        expected="an open_clip vision transformer or ModifiedResNet to put visual prompts into",
        got=type(tower).__name__,
        fix="Choose another method for this architecture.",
    )


def split_prompts(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Tensors of a tower, prompted or not, as those of the tower alone and its prompts in order.

    Raises:
        CheckpointError: Prompts that are not numbered from zero on.
    """
    prompts = {key.removeprefix(PROMPTS): value for key, value in tensors.items() if key.startswith(PROMPTS)}
    if not prompts:
        return dict(tensors), []
    if set(prompts) != {str(number) for number in range(len(prompts))}:
        raise CheckpointError(
            expected="visual prompts numbered from 0 on",
            got=", ".join(sorted(prompts)),
            fix="Get an undamaged file.",
        )
    rest = {key.removeprefix(TOWER): value for key, value in tensors.items() if key.startswith(TOWER)}
    return rest, [prompts[str(number)].float() for number in range(len(prompts))]
