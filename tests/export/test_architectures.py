"""Random weights of many architectures through export and gate, at batch 1, 3 and 4."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch

from cbpt_runtime.bundle import Bundle, BundleContent, Suspect, write_bundle
from cbpt_runtime.classification.bundled import BundleClassifier
from cbpt_runtime.export.foreign_graph import foreign_parts
from cbpt_runtime.export.graph import export_onnx
from cbpt_runtime.export.images import draw_gate_images
from cbpt_runtime.export.parity import measure_parity
from cbpt_runtime.models.architecture import build_model
from cbpt_runtime.models.config import check_model_config
from cbpt_runtime.runtime.preprocess import Preprocess

CLASSES = tuple(f"class {number}" for number in range(10))


def check(config: Mapping[str, Any], folder: Path, *, bias: float | None = None) -> None:
    """Builds the image tower with random weights, and passes it through export and gate."""
    bundle = random_bundle(config, folder, bias)
    classifier = BundleClassifier.from_bundle(bundle)
    images = draw_gate_images(bundle)
    images = replace(images, pixels=images.pixels[:4])
    model = export_onnx(classifier)
    assert foreign_parts(model, image_size=bundle.preprocess.image_size, classes=len(CLASSES)) == []
    measure_parity(model, classifier, images, max_batch=4).require()


def random_bundle(config: Mapping[str, Any], folder: Path, bias: float | None) -> Bundle:
    checked = check_model_config(dict(config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tower = build_model({**checked, "text_cfg": tiny_text()}).visual
    size = tower.image_size if isinstance(tower.image_size, tuple) else (tower.image_size,) * 2
    generator = np.random.default_rng(0)
    heads = generator.standard_normal((2, len(CLASSES), checked["embed_dim"])).astype(np.float32)
    heads /= np.linalg.norm(heads, axis=2, keepdims=True)
    content = BundleContent(
        verdict="backdoored",
        model={
            "config": checked,
            "preprocess": Preprocess(image_size=size).to_dict(),
            "source": "random",
            "sha256": "0" * 64,
        },
        class_names=CLASSES,
        templates=(("a photo of a {}.",),) * len(CLASSES),
        method={"name": "cbpt", "config": {}, "seed": 0, "parameterization": "prompt"},
        suspects=(Suspect(index=3, name=CLASSES[3], score=5.0),),
        class_embeddings=heads[0],
        reference_embeddings=heads[1],
        logit_scale=100.0,
        logit_bias=bias,
        encoder={name: tensor.numpy() for name, tensor in tower.state_dict().items()},
    )
    return write_bundle(folder / "bundle", content=content)


def tiny_text() -> dict[str, int]:
    return {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}


@pytest.mark.parametrize("kind", ["resnet", "timm", "siglip"])
def test_every_kind_of_tower_passes(kind: str, tiny_configs: dict[str, Any], tmp_path: Path) -> None:
    check(tiny_configs[kind], tmp_path, bias=-10.0 if kind == "siglip" else None)


@pytest.mark.parametrize("name", ["RN50", "ViT-B-32", "ViT-B-32-quickgelu"])
def test_common_architectures_pass(name: str, tmp_path: Path) -> None:
    check(open_clip.get_model_config(name), tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["ViT-L-14", "convnext_base", "MobileCLIP-S1", "ViT-B-16-SigLIP"])
def test_larger_architectures_pass(name: str, tmp_path: Path) -> None:
    config = open_clip.get_model_config(name)
    check({**config, "text_cfg": tiny_text()}, tmp_path, bias=-10.0 if "SigLIP" in name else None)
