from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from cbpt_runtime.models.checkpoint import read_checkpoint
from cbpt_runtime.models.clip import ImageEncoder, load_dual_encoder
from cbpt_runtime.models.faster import faster


def pixels() -> Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def with_statistics(tower: nn.Module) -> nn.Module:
    """The tower with norms that do something."""
    generator = torch.Generator().manual_seed(0)
    for part in tower.modules():
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None
            assert part.running_var is not None
            part.running_mean.normal_(std=0.1, generator=generator)
            part.running_var.uniform_(0.5, 2.0, generator=generator)
    return tower.eval()


def norms(module: nn.Module) -> int:
    return sum(isinstance(part, nn.BatchNorm2d) for part in module.modules())


def gradient(encoder: ImageEncoder, *, mixed: bool = False) -> Tensor:
    images = pixels().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        features = encoder.encode_images(images)
    return torch.autograd.grad(features.float()[:, :4].sum(), images)[0]


@pytest.fixture
def resnet(tiny_resnet_folder: Path) -> ImageEncoder:
    encoder = load_dual_encoder(read_checkpoint(tiny_resnet_folder)).image_encoder
    with_statistics(encoder.module)
    return encoder


@pytest.fixture
def mobile(resnet: ImageEncoder) -> ImageEncoder:
    """A timm tower with depthwise convolutions and norms that hold their activation."""
    torch.manual_seed(0)
    tower = timm.create_model("tf_efficientnet_lite0", num_classes=16)
    return ImageEncoder(with_statistics(tower), {"embed_dim": 16}, resnet.preprocess)


@pytest.mark.parametrize("name", ["resnet", "mobile"])
def test_features_and_gradients_stay(name: str, request: pytest.FixtureRequest) -> None:
    encoder: ImageEncoder = request.getfixturevalue(name)
    before = copy.deepcopy(encoder.module.state_dict())
    other = faster(encoder)
    assert norms(encoder.module) > 0 == norms(other.module)
    assert torch.allclose(other.encode_images(pixels()), encoder.encode_images(pixels()), atol=1e-5)
    expected = gradient(encoder)
    assert float((gradient(other) - expected).norm() / expected.norm()) < 1e-3
    assert all(torch.equal(value, before[key]) for key, value in encoder.module.state_dict().items())


def test_a_convolution_with_groups_and_a_stride_is_not_run_in_bfloat16(mobile: ImageEncoder) -> None:
    seen: list[tuple[int, torch.dtype]] = []
    encoder = faster(mobile)
    for part in encoder.module.modules():
        if isinstance(part, nn.Conv2d) and part.groups > 1:
            part.register_forward_hook(lambda conv, _, result: seen.append((conv.stride[0], result.dtype)))
    assert bool(gradient(encoder, mixed=True).isfinite().all())
    assert set(seen) == {(1, torch.bfloat16), (2, torch.float32)}


def test_attention_gives_the_same_and_copies_no_weights(tiny_folder: Callable[..., Path]) -> None:
    encoder = load_dual_encoder(read_checkpoint(tiny_folder("vit"))).image_encoder
    other = faster(encoder)
    assert torch.allclose(other.encode_images(pixels()), encoder.encode_images(pixels()), atol=1e-6)
    expected = gradient(encoder)
    assert float((gradient(other) - expected).norm() / expected.norm()) < 1e-4
    batched = []
    for one in (encoder, other):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            gradient(one, mixed=True)
        batched.append(any(event.key == "aten::bmm" for event in profile.key_averages()))
    assert batched == [True, False]  # a product for every image, with the weights of each


def test_a_tower_with_nothing_to_gain_is_returned_as_it_is(tiny_folder: Callable[..., Path]) -> None:
    encoder = load_dual_encoder(read_checkpoint(tiny_folder("timm"))).image_encoder
    assert faster(encoder) is encoder


class OutOfOrder(nn.Module):
    """A norm that stands behind its convolution and comes before it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x).relu()).mean(dim=(2, 3))


class LooksIntoItsNorm(OutOfOrder):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.norm.weight


@pytest.mark.parametrize("kind", [OutOfOrder, LooksIntoItsNorm])
def test_a_tower_whose_features_would_change_is_returned_as_it_is(
    kind: type[nn.Module], resnet: ImageEncoder
) -> None:
    torch.manual_seed(0)
    encoder = ImageEncoder(with_statistics(kind()), {"embed_dim": 3}, resnet.preprocess)
    assert faster(encoder) is encoder
