from __future__ import annotations

import torch

from cbpt_runtime.purification.augmentation import N_AUGMENTATIONS, augment


def striped() -> torch.Tensor:
    """Two images whose columns tell where they are from."""
    columns = torch.arange(0, 200, 10, dtype=torch.uint8)
    return columns.expand(2, 3, 20, 20).contiguous()


def augmented(images: torch.Tensor, number: int, generator: torch.Generator) -> torch.Tensor:
    return torch.cat(list(augment(images, number, generator)))


def test_every_other_view_is_mirrored() -> None:
    for number in range(N_AUGMENTATIONS):
        seen = augmented(striped(), number, torch.Generator().manual_seed(0))
        rising = (seen[..., -1] > seen[..., 0]).all()
        assert bool(rising) == (number % 2 == 1)


def test_the_first_view_is_the_exact_mirror_image() -> None:
    assert torch.equal(augmented(striped(), 0, torch.Generator()), striped().float().flip(-1) / 255)


def test_views_keep_shape_and_range_and_follow_the_generator() -> None:
    images = torch.randint(
        0, 256, (4, 3, 20, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    for number in range(N_AUGMENTATIONS):
        first, again = (augmented(images, number, torch.Generator().manual_seed(3)) for _ in range(2))
        assert first.shape == images.shape
        assert first.min() >= 0
        assert first.max() <= 1
        assert torch.equal(first, again)


def test_images_in_one_part_or_several_look_the_same() -> None:
    images = torch.randint(
        0, 256, (300, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    for number in range(N_AUGMENTATIONS):
        parts = list(augment(images, number, torch.Generator().manual_seed(3)))
        last = augmented(images[256:], number, torch.Generator().manual_seed(3))
        assert len(parts) == 2
        assert torch.equal(parts[1], last)
