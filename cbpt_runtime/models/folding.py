"""The same image tower, quicker to run forwards and backwards: what inversion spends its time on."""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from cbpt_runtime.models.clip import ImageEncoder

_TRIED_IMAGES = 4
_TOLERANCE = 1e-4  # of unit features


class _InFloat32(nn.Module):
    """A layer that autocast leaves alone."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*out"]:
        with torch.autocast(x.device.type, enabled=False):
            result: Tensor = self.layer(x.float())
        return result


def folded(encoder: ImageEncoder) -> ImageEncoder:
    """Return an encoder with the same features whose frozen batch norms are part of the convolutions.

    On CPUs, grouped convolutions with a stride stay in float32 under autocast: their bfloat16 backward pass
    is many times slower. A tower is returned as it is if it has no batch norms, or if its features would
    change, because not all of them stand right behind their convolution.
    """
    if not any(isinstance(part, nn.BatchNorm2d) for part in encoder.module.modules()):
        return encoder
    module = copy.deepcopy(encoder.module)
    try:
        _fold(module)
        found = ImageEncoder(module, encoder.model_config, encoder.preprocess)
        height, width = encoder.preprocess.image_size
        images = torch.rand(_TRIED_IMAGES, 3, height, width, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            change = (found.encode_images(images) - encoder.encode_images(images)).abs().max()
    except (RuntimeError, AttributeError):  # a tower that looks into its own norms
        return encoder
    if not float(change) < _TOLERANCE:
        return encoder
    if encoder.device.type == "cpu":
        _keep_in_float32(module)
    return found


def _fold(parent: nn.Module) -> None:
    before: tuple[str, nn.Module] = ("", parent)
    for name, part in list(parent.named_children()):
        last_name, last = before
        if isinstance(last, nn.Conv2d) and isinstance(part, nn.BatchNorm2d):
            setattr(parent, last_name, fuse_conv_bn_eval(last, part))
            setattr(parent, name, nn.Sequential(*part.children()))  # timm's norms hold their activation
        else:
            _fold(part)
        before = name, part


def _keep_in_float32(parent: nn.Module) -> None:
    for name, part in list(parent.named_children()):
        if isinstance(part, nn.Conv2d) and part.groups > 1 and max(part.stride) > 1:
            setattr(parent, name, _InFloat32(part))
        else:
            _keep_in_float32(part)
