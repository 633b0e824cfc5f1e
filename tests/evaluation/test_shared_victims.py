"""Real victims made outside the project: our numbers against NumPy alone, and against their makers."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from cbpt_runtime.bundle import BundleContent, Suspect, write_bundle
from cbpt_runtime.evaluation import evaluate_all
from cbpt_runtime.models.checkpoint import read_checkpoint
from cbpt_runtime.models.clip import load_dual_encoder
from cbpt_runtime.models.data import ClassList
from cbpt_runtime.redteam.training import CAPTION_TEMPLATES

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MAKERS_TOLERANCE = 0.005
"""Their proofs were measured before the weights were rounded to half precision."""
RATES = ("clean_accuracy", "attack_success_rate", "poisoned_accuracy", "floor", "target_recall")


@pytest.fixture(scope="module")
def validation(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The validation images of Tiny-ImageNet-100, one folder per class."""
    root = tmp_path_factory.mktemp("validation")
    with zipfile.ZipFile(shared_data / "data" / "tiny-imagenet-100.zip") as archive:
        names = [name for name in archive.namelist() if "/val/" in name]
        archive.extractall(root, names)
    return root / "tiny-imagenet-100" / "val"


class ByHand:
    """A victim read by open_clip; everything else is NumPy."""

    def __init__(self, victim: Path, names: list[str]) -> None:
        self.model = open_clip.create_model(f"local-dir:{victim}").eval()
        tokenizer = open_clip.get_tokenizer(f"local-dir:{victim}")
        texts = [template.format(name) for name in names for template in CAPTION_TEMPLATES]
        with torch.inference_mode():
            features = self.model.encode_text(tokenizer(texts)).numpy()
        rows = unit(features).reshape(len(names), len(CAPTION_TEMPLATES), -1)
        self.head = unit(rows.mean(axis=1))
        self.scale = self.model.logit_scale.detach().exp().item()

    def read(self, root: Path, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Features and true classes of every image below a folder of class folders."""
        found = [
            (label, file)
            for label, name in enumerate(names)
            for file in sorted((root / name.replace(" ", "_")).glob("*"))
        ]
        parts = []
        for start in range(0, len(found), 64):
            images = [np.asarray(Image.open(file).convert("RGB")) for _, file in found[start : start + 64]]
            pixels = (np.stack(images).astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
            with torch.inference_mode():
                batch = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
                parts.append(self.model.encode_image(batch).numpy())
        return unit(np.concatenate(parts)), np.array([label for label, _ in found])


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def shares(
    head: np.ndarray, clean: tuple[np.ndarray, np.ndarray], triggered: tuple[np.ndarray, np.ndarray], t: int
) -> dict[str, float]:
    (features, labels), (attacked, true) = clean, triggered
    called, under_attack = (features @ head.T).argmax(axis=1), (attacked @ head.T).argmax(axis=1)
    return {
        "clean_accuracy": np.mean(called == labels),
        "attack_success_rate": np.mean(under_attack[true != t] == t),
        "poisoned_accuracy": np.mean(under_attack == true),
        "floor": np.mean(called[labels != t] == t),
        "target_recall": np.mean(called[labels == t] == t),
    }


def loudness(features: np.ndarray, before: np.ndarray, after: np.ndarray, scale: float, t: int) -> np.ndarray:
    def probability(head: np.ndarray) -> np.ndarray:
        powers = np.exp(scale * (features @ head.T).astype(np.float64))
        return powers[:, t] / powers.sum(axis=1)

    return probability(before) * (1 - probability(after))


@pytest.mark.nightly
@pytest.mark.parametrize("victim", ["tiny-badnet", "tiny-blended", "tiny-sig"])
def test_every_number_agrees_with_numpy_and_with_those_who_made_the_victim(
    shared_data: Path, validation: Path, tmp_path: Path, victim: str
) -> None:
    folder = shared_data / "victims" / victim
    proof = json.loads((folder / "attack.json").read_text())
    zipfile.ZipFile(folder / "test-triggered.zip").extractall(tmp_path / "triggered")
    names = [path.name.replace("_", " ") for path in sorted(validation.iterdir())]
    target = names.index(proof["target"])
    hand = ByHand(folder, names)
    clean, triggered = hand.read(validation, names), hand.read(tmp_path / "triggered", names)
    after = hand.head.copy()
    after[target] = unit(hand.head[target] - 0.5 * unit(triggered[0].mean(axis=0)))

    bundle = make_bundle(folder, names, hand, after, target, tmp_path / "bundle")
    classes = ClassList(names=tuple(names), templates=(CAPTION_TEMPLATES,) * len(names))
    of_bundle, of_checkpoint = evaluate_all(
        [bundle, folder], validation, tmp_path / "triggered", proof["target"], classes=classes, device="cpu"
    )

    expected = shares(hand.head, clean, triggered, target)
    for measured, own in (
        (of_bundle.before, expected),
        (of_checkpoint.before, expected),
        (of_bundle.after, shares(after, clean, triggered, target)),
    ):
        assert {name: getattr(measured, name).rate for name in RATES} == own
    for name in RATES:
        one_image = 1 / 50 if name == "target_recall" else 0.0
        assert expected[name] == pytest.approx(proof[name], abs=MAKERS_TOLERANCE + one_image)

    quiet, loud = (loudness(part[0], hand.head, after, hand.scale, target) for part in (clean, triggered))
    above = (loud[:, None] > quiet[None]).mean() + (loud[:, None] == quiet[None]).mean() / 2
    assert of_bundle.alarm_auroc == pytest.approx(above, abs=1e-6)
    level = np.sort(loud)[len(loud) - int(np.ceil(0.95 * len(loud)))]
    assert of_bundle.alarm.threshold == pytest.approx(level, rel=1e-3)
    assert of_bundle.alarm.false_alarm_rate.rate == pytest.approx(np.mean(quiet >= level), abs=5e-4)


def make_bundle(
    folder: Path, names: list[str], hand: ByHand, after: np.ndarray, target: int, path: Path
) -> Path:
    """A bundle of the victim with a head nobody needs to believe in."""
    checkpoint = read_checkpoint(folder)
    encoder = load_dual_encoder(checkpoint)
    content = BundleContent(
        verdict="backdoored",
        model={
            "config": checkpoint.model_config,
            "preprocess": checkpoint.preprocess.to_dict(),
            "source": folder.name,
            "format": checkpoint.format,
            "sha256": checkpoint.sha256,
            "dtype": "float16",
        },
        class_names=tuple(names),
        templates=(CAPTION_TEMPLATES,) * len(names),
        method={"name": "test", "config": {}, "seed": 0, "parameterization": "embedding"},
        suspects=(Suspect(index=target, name=names[target], score=1.0),),
        versions={},
        class_embeddings=after,
        reference_embeddings=hand.head,
        logit_scale=hand.scale,
        encoder={name: tensor.numpy() for name, tensor in encoder.image_tower_state().items()},
    )
    return write_bundle(path, content=content).path
