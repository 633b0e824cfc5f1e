"""Families of dummy triggers: what inversion may paint on an image.

An attacker's trigger is unknown, so inversion searches small spaces that real triggers live in or near. Each
family is a hard budget, because a tight budget keeps a backdoor apart from a natural universal perturbation
(Moosavi-Dezfooli et al., "Universal adversarial perturbations", CVPR 2017). All work on pixels in [0, 1] at
the model's input size, and on many triggers at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

Parameters = dict[str, Tensor]
_BISECTIONS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TriggerFamily(ABC):
    """A parameterised set of perturbations with a hard budget.

    Attributes:
        step_size: Learning rate that suits its parameters.
        step_multiplier: Search steps it takes, in multiples of what a plain pattern takes.
    """

    step_size: float
    step_multiplier: int = 1

    @abstractmethod
    def initial(self, count: int, image_size: tuple[int, int], generator: torch.Generator) -> Parameters:
        """Draw starting parameters of `count` triggers, on the CPU."""

    @abstractmethod
    def apply(
        self, parameters: Parameters, pixels: Float[Tensor, "triggers batch 3 height width"]
    ) -> Float[Tensor, "triggers batch 3 height width"]:
        """Put each trigger on its own images, in [0, 1], differentiable with respect to the parameters."""

    def apply_one(
        self, parameters: Parameters, index: int, pixels: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Put one of the stacked triggers on images in [0, 1]."""
        one = {name: value[index : index + 1] for name, value in parameters.items()}
        return self.apply(one, pixels.unsqueeze(0))[0]

    def project(self, parameters: Parameters) -> Parameters:
        """Return the nearest parameters inside the budget; themselves, where the formula keeps it."""
        return parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class _Picture(TriggerFamily):
    """A pattern with a value of its own for every pixel and channel."""

    def initial(self, count: int, image_size: tuple[int, int], generator: torch.Generator) -> Parameters:
        """Random starting parameters, on the CPU."""
        return {"pattern": 0.1 * torch.randn(count, 3, *image_size, generator=generator)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Additive(_Picture):
    """One pattern added to every image, bounded per pixel: clip(x + epsilon * tanh(t)).

    Attributes:
        epsilon: l-infinity bound, in pixel units of [0, 1].
    """

    epsilon: float
    step_size: float = 0.1

    def apply(
        self, parameters: Parameters, pixels: Float[Tensor, "triggers batch 3 height width"]
    ) -> Float[Tensor, "triggers batch 3 height width"]:
        """Each trigger on its own images."""
        return (pixels + self.epsilon * torch.tanh(parameters["pattern"]).unsqueeze(1)).clamp(0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Blend(_Picture):
    """One image mixed into every image: (1 - alpha) * x + alpha * sigmoid(4 t).

    Attributes:
        alpha: Share of the mixed-in image, in [0, 1].
    """

    alpha: float
    step_size: float = 0.1

    def apply(
        self, parameters: Parameters, pixels: Float[Tensor, "triggers batch 3 height width"]
    ) -> Float[Tensor, "triggers batch 3 height width"]:
        """Each trigger on its own images."""
        pattern = torch.sigmoid(4 * parameters["pattern"]).unsqueeze(1)
        return (1 - self.alpha) * pixels + self.alpha * pattern


@dataclass(frozen=True, slots=True, kw_only=True)
class _Smooth(TriggerFamily):
    """A pattern of low cosine frequencies added to every image: clip(x + epsilon * tanh(pattern)).

    Attributes:
        epsilon: l-infinity bound, in pixel units of [0, 1].
        frequencies: Lowest cosine frequencies used, per axis; frequency k has k / 2 periods.
    """

    epsilon: float
    frequencies: int
    step_size: float = 0.2

    @abstractmethod
    def coefficients(self) -> tuple[int, ...]:
        """Shape of the coefficients of one trigger."""

    @abstractmethod
    def pattern(
        self,
        coefficients: Float[Tensor, "triggers ..."],
        rows: Float[Tensor, "height frequencies"],
        columns: Float[Tensor, "width frequencies"],
    ) -> Float[Tensor, "triggers channels height width"]:
        """Return what the coefficients stand for, with the cosines of either axis."""

    def initial(self, count: int, image_size: tuple[int, int], generator: torch.Generator) -> Parameters:
        """Random starting coefficients, on the CPU."""
        return {"pattern": 0.1 * torch.randn(count, *self.coefficients(), generator=generator)}

    def apply(
        self, parameters: Parameters, pixels: Float[Tensor, "triggers batch 3 height width"]
    ) -> Float[Tensor, "triggers batch 3 height width"]:
        """Each trigger on its own images."""
        rows, columns = (_cosines(size, self.frequencies, pixels.device) for size in pixels.shape[-2:])
        pattern = torch.tanh(self.pattern(parameters["pattern"], rows, columns))
        return (pixels + self.epsilon * pattern.unsqueeze(1)).clamp(0, 1)


class ColorField(_Smooth):
    """One smooth pattern in colour: C t Cᵀ for every channel, C a cosine basis."""

    __slots__ = ()

    def coefficients(self) -> tuple[int, ...]:
        """One square of coefficients per channel."""
        return 3, self.frequencies, self.frequencies

    def pattern(
        self,
        coefficients: Float[Tensor, "triggers 3 frequencies frequencies"],
        rows: Float[Tensor, "height frequencies"],
        columns: Float[Tensor, "width frequencies"],
    ) -> Float[Tensor, "triggers 3 height width"]:
        """Return a sum of products of cosines."""
        return rows @ coefficients @ columns.T


class Lines(_Smooth):
    """A grey profile down the rows plus one along the columns: C r, the same in every column, plus C s."""

    __slots__ = ()

    def coefficients(self) -> tuple[int, ...]:
        """One profile per axis, for all channels."""
        return 1, 2, self.frequencies

    def pattern(
        self,
        coefficients: Float[Tensor, "triggers 1 2 frequencies"],
        rows: Float[Tensor, "height frequencies"],
        columns: Float[Tensor, "width frequencies"],
    ) -> Float[Tensor, "triggers 1 height width"]:
        """Return the sum of both profiles."""
        down, along = coefficients[:, :, 0] @ rows.T, coefficients[:, :, 1] @ columns.T
        return down.unsqueeze(-1) + along.unsqueeze(-2)


def _cosines(size: int, frequencies: int, device: torch.device) -> Float[Tensor, "size frequencies"]:
    places = (torch.arange(size, device=device) + 0.5) / size
    return torch.cos(torch.pi * places.unsqueeze(1) * torch.arange(frequencies, device=device))


@dataclass(frozen=True, slots=True, kw_only=True)
class Warp(TriggerFamily):
    """Every pixel moves on its own, the same way in every image, as in WaNet at full resolution.

    Source: Nguyen and Tran, "WaNet", ICLR 2021; the free field with a hard bound is ours.

    Attributes:
        reach: Largest move along each axis, in pixels.
    """

    reach: float
    step_size: float = 0.2

    def initial(self, count: int, image_size: tuple[int, int], generator: torch.Generator) -> Parameters:
        """Return a random starting field, on the CPU."""
        return {"field": 0.1 * torch.randn(count, *image_size, 2, generator=generator)}

    def apply(
        self, parameters: Parameters, pixels: Float[Tensor, "triggers batch 3 height width"]
    ) -> Float[Tensor, "triggers batch 3 height width"]:
        """Each trigger on its own images; what lies beyond the border is as the border."""
        count, batch, channels, height, width = pixels.shape
        field = parameters["field"]
        moves = self.reach * torch.tanh(field) * field.new_tensor([2 / width, 2 / height])
        identity = affine_grid(
            torch.eye(2, 3, device=pixels.device).expand(count, 2, 3),
            [count, channels, height, width],
            align_corners=False,
        )
        grid = (identity + moves).repeat_interleave(batch, dim=0)
        moved = grid_sample(pixels.flatten(0, 1), grid, padding_mode="border", align_corners=False)
        return moved.view_as(pixels)


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch(TriggerFamily):
    """A mask and a pattern, as in Neural Cleanse: (1 - m) * x + m * t, with the mean of m bounded.

    Source: Wang et al., "Neural Cleanse", S&P 2019; the hard bound instead of a penalty is ours.

    Attributes:
        area: Largest mean of the mask, as a share of the image in [0, 1].
    """

    area: float
    step_size: float = 0.05
    step_multiplier: int = 2

    def initial(self, count: int, image_size: tuple[int, int], generator: torch.Generator) -> Parameters:
        """Random starting parameters, on the CPU."""
        return {
            "mask": torch.full((count, 1, *image_size), self.area),
            "pattern": torch.rand(count, 3, *image_size, generator=generator),
        }

    def apply(
        self, parameters: Parameters, pixels: Float[Tensor, "triggers batch 3 height width"]
    ) -> Float[Tensor, "triggers batch 3 height width"]:
        """Each trigger on its own images."""
        mask = parameters["mask"].unsqueeze(1)
        return (1 - mask) * pixels + mask * parameters["pattern"].unsqueeze(1)

    def project(self, parameters: Parameters) -> Parameters:
        """Projects a mask of values up to 1 onto {0 <= m <= 1, mean(m) <= area}: shift by bisection, clip."""
        mask = parameters["mask"]
        low = torch.zeros_like(mask[:, :1, :1, :1])
        high = torch.ones_like(low)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            above = (mask - middle).clamp(0, 1).mean(dim=(1, 2, 3), keepdim=True) > self.area
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        within = mask.clamp(0, 1).mean(dim=(1, 2, 3), keepdim=True) <= self.area
        shifted = (mask - torch.where(within, torch.zeros_like(high), high)).clamp(0, 1)
        return {"mask": shifted, "pattern": parameters["pattern"].clamp(0, 1)}


SEARCH_FAMILIES: dict[str, TriggerFamily] = {
    "patch": Patch(area=0.01, step_size=0.3),
    "large-patch": Patch(area=0.03, step_size=0.3),
    "additive": Additive(epsilon=10 / 255),
    "lines": Lines(epsilon=40 / 255, frequencies=16),
    "color-field": ColorField(epsilon=20 / 255, frequencies=8),
    "warp": Warp(reach=1.5),
}
"""Families in which every concept is searched: budgets in which natural perturbations fail on most images."""

INVERSION_FAMILIES: dict[str, TriggerFamily] = {
    "blend": Blend(alpha=0.2),
    "mask": Patch(area=0.15),
    "patch": Patch(area=0.04),
    "small-patch": Patch(area=0.015, step_size=0.15),
}
"""Budgets in which the dummy triggers of suspected classes are inverted, from generous to tight."""
