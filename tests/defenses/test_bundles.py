"""Every method's bundle keeps the contract, and only what the method tunes has changed."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load as load_arrays

from cbpt_runtime.bundle import ENCODER, HEAD, REPORT, Bundle, read_bundle
from cbpt_runtime.classification.bundled import BundleClassifier
from cbpt_runtime.evaluation import evaluate
from cbpt_runtime.evaluation.tables import table_rows
from cbpt_runtime.export.graph import export_onnx
from cbpt_runtime.export.onnx import OUTPUTS
from cbpt_runtime.export.session import open_session
from cbpt_runtime.export.weights import to_bytes
from cbpt_runtime.models.checkpoint import read_checkpoint
from cbpt_runtime.models.class_lists import read_class_list
from cbpt_runtime.models.clip import load_dual_encoder
from cbpt_runtime.models.visual_prompts import PROMPTS, TOWER
from cbpt_runtime.pipeline import purify_checkpoint
from cbpt_runtime.purification.cbpt import Cbpt
from cbpt_runtime.purification.method import Chain

from .conftest import METHODS, TEMPLATES, quick

PACKAGE = Path(__file__).parents[2] / "cbpt_runtime"
KINDS = ("vit", "resnet")


def tower_of(bundle: Bundle) -> dict[str, np.ndarray]:
    return load_arrays(bundle.read_file(ENCODER))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_a_bundle_that_can_be_read_and_classifies(
    method: str, kind: str, defend: Callable[..., Bundle]
) -> None:
    bundle = read_bundle(defend(method, kind).path)
    assert (bundle.verdict, bundle.suspects, bundle.triggers()) == ("unknown", (), {})
    assert bundle.encoder == ("prompted" if method == "rvpt" else "tuned")
    about = bundle.manifest["method"]
    assert (about["name"], about["seed"], about["tune_images"]) == (method, 0, 12)
    assert about["config"] == json.loads(json.dumps(quick(method).to_dict()))
    assert about["trainable_parameters"] > 0
    assert set(bundle.metrics) == {"heldout_images", "heldout_ca_before", "heldout_ca_after"}
    np.testing.assert_array_equal(bundle.class_embeddings, bundle.reference_embeddings)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    prediction = BundleClassifier.from_bundle(bundle).predict(images)
    assert np.isfinite(prediction.logits).all()
    assert prediction.alarm.tolist() == [0, 0, 0]


def test_the_report_says_that_no_target_was_looked_for(defend: Callable[..., Bundle]) -> None:
    page = defend("cleanclip").read_file(REPORT).decode()
    assert "Image encoder tuned against backdoors" in page
    assert "with the text encoder all class embeddings" in page
    assert "No backdoor found" not in page
    assert "visual prompts were put" in defend("rvpt").read_file(REPORT).decode()


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(
    method: str, defend: Callable[..., Bundle]
) -> None:
    state = torch.get_rng_state()
    first, again = defend(method), defend(method, again=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.read_file(HEAD) == again.read_file(HEAD)
    assert first.read_file(ENCODER) == again.read_file(ENCODER)
    assert first.read_file(ENCODER) != defend(method, seed=1).read_file(ENCODER)


@pytest.mark.parametrize("method", ["ft", "cleanclip", "abd"])
def test_tuning_changes_both_towers(
    method: str, defend: Callable[..., Bundle], tiny_checkpoint_folder: Path, tiny_class_file: Path
) -> None:
    bundle, suspect = defend(method), load_dual_encoder(read_checkpoint(tiny_checkpoint_folder))
    before = suspect.image_tower_state()
    after = tower_of(bundle)
    assert set(after) == set(before)
    assert any((after[name] != tensor.numpy()).any() for name, tensor in before.items())
    classes = read_class_list(tiny_class_file, templates=TEMPLATES)
    assert (bundle.class_embeddings != suspect.class_embeddings(classes).numpy()).any()


@pytest.mark.parametrize("kind", KINDS)
def test_visual_prompts_leave_tower_and_head_bit_identical(
    kind: str, defend: Callable[..., Bundle], tiny_folder: Callable[..., Path], tiny_class_file: Path
) -> None:
    bundle, suspect = defend("rvpt", kind), load_dual_encoder(read_checkpoint(tiny_folder(kind)))
    after = tower_of(bundle)
    for name, tensor in suspect.image_tower_state().items():
        np.testing.assert_array_equal(after.pop(TOWER + name), tensor.numpy())
    assert after
    assert all(name.startswith(PROMPTS) for name in after)
    assert bundle.manifest["method"]["trainable_parameters"] == sum(part.size for part in after.values())
    classes = read_class_list(tiny_class_file, templates=TEMPLATES)
    np.testing.assert_array_equal(bundle.class_embeddings, suspect.class_embeddings(classes).numpy())


@pytest.mark.parametrize(("method", "kind"), [("rvpt", "vit"), ("rvpt", "resnet"), ("cleanclip", "resnet")])
def test_the_exported_graph_is_the_tuned_classifier(
    method: str, kind: str, defend: Callable[..., Bundle]
) -> None:
    bundle = defend(method, kind)
    classifier = BundleClassifier.from_bundle(bundle)
    session = open_session(to_bytes(export_onnx(classifier)))
    images = np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    for count in (1, 3):
        got = dict(zip(OUTPUTS, session.run(list(OUTPUTS), {"images": images[:count]}), strict=True))
        expected = classifier.predict(images[:count])
        np.testing.assert_allclose(got["probabilities"], expected.probabilities, atol=1e-4)
        assert got["alarm"].tolist() == [0.0] * count


def test_an_evaluation_shows_one_head_where_only_the_encoder_changed(
    defend: Callable[..., Bundle], tiny_image_folder: Path
) -> None:
    evaluation = evaluate(defend("ft"), tiny_image_folder, target="blue_stripes")
    _, rows = table_rows([evaluation])
    assert [row[1] for row in rows] == ["after"]
    assert evaluation.to_dict()["encoder"] == "tuned"


def test_cbpt_can_follow_another_defence(
    tiny_checkpoint_folder: Path, tiny_class_file: Path, tiny_image_folder: Path, tmp_path: Path
) -> None:
    then = Cbpt(
        search_steps=1,
        search_batch=2,
        inversion_steps=2,
        inversion_batch=2,
        tuning_steps=3,
        suspect_p_value=0.999,
    )
    inputs = (tiny_checkpoint_folder, tiny_class_file, tiny_image_folder)
    bundle = purify_checkpoint(
        *inputs, tmp_path / "both", shots=4, method=Chain(first=quick("rvpt"), then=then), device="cpu"
    )
    alone = purify_checkpoint(*inputs, tmp_path / "alone", shots=4, method=then, device="cpu")
    about = bundle.manifest["method"]
    assert (about["name"], bundle.encoder) == ("rvpt+cbpt", "prompted")
    assert about["config"] == alone.manifest["method"]["config"]
    assert about["defense_config"]["tokens"] == 50
    assert bundle.verdict in ("clean", "backdoored")
    assert bundle.metrics["heldout_ca_before"] == alone.metrics["heldout_ca_before"]
    assert list(bundle.manifest["stage_seconds"])[:2] == ["rvpt", "encode"]
    assert alone.encoder == "untouched"
    assert "encoder" not in alone.manifest["method"]


@pytest.mark.parametrize("room", ["defenses", "purification", "training", "models"])
def test_the_rooms_of_a_defender_never_import_the_red_team(room: str) -> None:
    for path in (PACKAGE / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any("redteam" in name for name in names), path
