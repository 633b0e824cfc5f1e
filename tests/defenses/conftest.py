"""Bundles made by each of the other defences, on tiny random models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cbpt_runtime.bundle import Bundle
from cbpt_runtime.pipeline import METHODS as ALL_METHODS
from cbpt_runtime.pipeline import purify_checkpoint
from cbpt_runtime.purification.method import Method

METHODS = ("ft", "cleanclip", "abd", "rvpt")
TEMPLATES = ("a photo of a {}.", "a drawing of the {}.")


def quick(method: str, **changes: object) -> Method:
    """As few steps as change something."""
    settings: dict[str, object] = {"epochs": 1, "batch_size": 4, "learning_rate": 1e-2, "precision": "fp32"}
    if method == "abd":
        settings["generator_steps"] = 2
    return ALL_METHODS[method](**(settings | changes))


@pytest.fixture(scope="session")
def defend(
    tiny_folder: Callable[..., Path],
    tiny_class_file: Path,
    tiny_image_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Bundle]:
    """`defend(method, kind)`: a bundle. Made once for the same arguments; read only."""
    root, made = tmp_path_factory.mktemp("defended"), {}

    def bundle(method: str, kind: str = "vit", *, again: bool = False, **changes: object) -> Bundle:
        key = (method, kind, *sorted(changes.items()))
        if key not in made or again:
            made[key] = purify_checkpoint(
                tiny_folder(kind),
                tiny_class_file,
                tiny_image_folder,
                root / f"{len(made)}-{method}-{kind}{'-again' if again else ''}",
                templates=TEMPLATES,
                shots=4,
                method=quick(method, **changes),
                device="cpu",
            )
        return made[key]

    return bundle
