"""Surfaces that are folders: checkpoints, bundles and model repositories."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnxruntime
import open_clip
import timm
import torch
from safetensors.torch import save_file

from cbpt_runtime.bundle import BundleContent, Concept, Evidence, Suspect, read_bundle, write_bundle
from cbpt_runtime.classification.bundled import BundleClassifier
from cbpt_runtime.export.profiles import Profile
from cbpt_runtime.export.repository import export_bundle
from cbpt_runtime.export.verify import verify_repository
from cbpt_runtime.loading import inspect_path
from cbpt_runtime.models.architecture import build_model
from cbpt_runtime.models.checkpoint import read_checkpoint
from cbpt_runtime.models.clip import load_dual_encoder
from cbpt_runtime.models.config import check_model_config
from fuzzing import mutations
from fuzzing.surface import FOLDER, LINK, PIPE, Files, Input, Surface, read_files, require

LOADED_BEFORE_WORKERS = (onnxruntime, timm)  # the package imports them where it needs them
CONFIG: dict[str, Any] = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 8, "head_width": 4, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 8, "heads": 2, "layers": 1},
}
PREPROCESS = {"size": 16, "mode": "RGB", "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
_SETTINGS = {
    "model_cfg": CONFIG,
    "preprocess_cfg": {**PREPROCESS, "interpolation": "bicubic", "resize_mode": "squash"},
}
_WHOLE_RATE = 0.02


class Checkpoints(Surface):
    """Checkpoints as `read_checkpoint` and `inspect` take them, small and whole until they are spoiled."""

    name = "checkpoints"
    formats = ("configuration", "safetensors", "archive", "sequence", "training", "object", "torchscript") + (
        ("transformers",) if find_spec("transformers") else ()
    )
    limit_s = 30.0

    def prepare(self, folder: Path) -> None:
        """Write one model in every form."""
        torch.manual_seed(0)
        model = build_model(check_model_config(CONFIG)).eval()
        state = {key: value.clone() for key, value in model.state_dict().items()}
        save_file(state, folder / "safetensors")
        torch.save(state, folder / "archive")
        torch.save(state, folder / "sequence", _use_new_zipfile_serialization=False)
        optimizer = torch.optim.AdamW([model.logit_scale])
        wrapped = {f"module.{key}": value for key, value in state.items()}
        torch.save(
            {"epoch": 1, "state_dict": wrapped, "optimizer": optimizer.state_dict(), "args": {"lr": 1e-3}},
            folder / "training",
        )
        torch.save(model, folder / "object")
        torch.jit.save(torch.jit.script(model.visual.transformer.resblocks[0].mlp), folder / "torchscript")
        if "transformers" in self.formats:
            from transformers import CLIPConfig, CLIPModel

            tower = {
                "hidden_size": 8,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            }
            settings = CLIPConfig(
                text_config={**tower, "vocab_size": 64, "max_position_embeddings": 8},
                vision_config={**tower, "image_size": 16, "patch_size": 8},
                projection_dim=8,
            )
            CLIPModel(settings).save_pretrained(folder / "hf")

    def load(self, folder: Path) -> None:
        """Read them."""
        self.seeds = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        self.pretrained = read_files(folder / "hf") if (folder / "hf").is_dir() else {}

    def make(self, rng: Random, form: str) -> Input:
        """Return a folder with a configuration and weights, one of them spoiled."""
        is_whole = rng.random() < _WHOLE_RATE
        files: Files = {"open_clip_config.json": json.dumps(_SETTINGS).encode()}
        if form == "transformers":
            files = dict(self.pretrained)
            weights, config = "model.safetensors", "config.json"
        else:
            weights, config = "open_clip_model.safetensors", "open_clip_config.json"
            files[weights] = self.seeds["safetensors" if form == "configuration" else form]
        if form not in ("safetensors", "configuration", "transformers"):
            files["weights.pt"] = files.pop(weights)
            weights = "weights.pt"
        content, settings = files[weights], files[config]
        assert isinstance(content, bytes)
        assert isinstance(settings, bytes)
        if form == "configuration" or (form == "transformers" and rng.random() < 0.7):
            if not is_whole:
                files[config] = mutations.json_bytes(rng, mutations.spoil_json(rng, json.loads(settings)))
        elif not is_whole:
            files[weights] = self._spoiled(rng, form, content)
        how = rng.choice(("inspect", "read", "read", "read", "load"))
        return Input(files=files, how=how, is_whole=is_whole and form not in ("torchscript", "transformers"))

    def _spoiled(self, rng: Random, form: str, content: bytes) -> bytes:
        if rng.random() < 0.3:
            return mutations.spoil(rng, content, list(self.seeds.values()))
        if form in ("safetensors", "transformers"):
            return mutations.spoil_safetensors(rng, content)
        if form == "sequence":
            end = len(content) * 2 // 3
            return mutations.spoil(rng, content[:end]) + content[end:]
        return mutations.spoil_archive(rng, content)

    def run(self, made: Input, folder: Path) -> None:
        """Describe it, or read it, or build its encoder, too."""
        if made.how == "inspect":
            json.dumps(inspect_path(folder), allow_nan=False)
            return
        checkpoint = read_checkpoint(folder)
        size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in checkpoint.state_dict.values())
        require(size_bytes <= checkpoint.size_bytes, "tensors no larger than the file")
        if made.how == "load":
            load_dual_encoder(checkpoint)


class _Sealed(Surface):
    """A folder whose files its manifest hashes."""

    formats = ("manifest", "file", "resealed file", "folder")

    def load(self, folder: Path) -> None:
        """Read the whole one."""
        self.files = read_files(folder / "whole")

    def make(self, rng: Random, form: str) -> Input:
        """Return a copy with another manifest, file or folder."""
        files = dict(self.files)
        how = rng.choice(("foreign code", "own code"))
        if rng.random() < _WHOLE_RATE:
            return Input(files=files, how=how, is_whole=True)
        if form == "folder":
            for _ in range(rng.choice((1, 1, 2))):
                self._rearrange(rng, files)
            return Input(files=files, how=how)
        names = ["manifest.json"] if form == "manifest" else [*files]
        name = rng.choice(names)
        content = files[name]
        assert isinstance(content, bytes)
        if name.endswith(".json") and rng.random() < 0.8:
            content = mutations.json_bytes(rng, mutations.spoil_json(rng, json.loads(content)))
        elif name.endswith(".safetensors") and rng.random() < 0.7:
            content = mutations.spoil_safetensors(rng, content)
        else:
            content = mutations.spoil(
                rng, content, [other for other in files.values() if isinstance(other, bytes)]
            )
        files[name] = content
        if form == "resealed file" and name != "manifest.json":
            self._reseal(files, name, content)
        return Input(files=files, how=how)

    def _rearrange(self, rng: Random, files: Files) -> None:
        name, other = rng.choice([*files]), rng.choice([*files])
        match rng.randrange(6):
            case 0:
                del files[name]
            case 1:
                files[name] = rng.choice((PIPE, FOLDER))
            case 2:
                files[name] = LINK + rng.choice(
                    (
                        "/dev/zero",
                        "/dev/null",
                        "/dev/stdin",
                        "/etc/passwd",
                        name,
                        "nowhere",
                        "..",
                        "/proc/self/mem",
                    )
                )
            case 3:
                files[name], files[other] = files[other], files[name]
            case 4:
                extra = rng.choice(
                    ("x", "x/y", "\udcff", "a\nb", ".hidden", "lost+found/x", "claims.jsonl", name + "~")
                )
                clashes = (
                    f"{taken}/".startswith(f"{extra}/") or extra.startswith(f"{taken}/") for taken in files
                )
                if not any(clashes):
                    files[extra] = rng.choice((b"", b"{}", PIPE, FOLDER, LINK + "/dev/zero", LINK + ".."))
            case 5:
                files[name] = b""

    def _reseal(self, files: Files, name: str, content: bytes) -> None:
        manifest = json.loads(files["manifest.json"])
        if name in manifest["files"]:
            sha256 = hashlib.sha256(content).hexdigest()
            manifest["files"][name] = {"sha256": sha256, "size_bytes": len(content)}
            if name.endswith(".onnx") and "graph_sha256" in manifest:
                manifest["graph_sha256"] = sha256
            files["manifest.json"] = json.dumps(manifest).encode()


class Bundles(_Sealed):
    """Bundles as `read_bundle`, `inspect` and `load` take them."""

    name = "bundles"

    def prepare(self, folder: Path) -> None:
        """Write a bundle of a random model."""
        write_tiny_bundle(folder / "whole")

    def run(self, made: Input, folder: Path) -> None:
        """Read it, look at all it says, classify."""
        json.dumps(inspect_path(folder), allow_nan=False)
        bundle = read_bundle(folder)
        json.dumps([bundle.suspect_indices, bundle.encoder, bundle.metrics, bundle.class_folders])
        bundle.triggers()
        bundle.images()
        repr(bundle)
        bundle._repr_html_()
        height, width = bundle.preprocess.image_size
        if height * width <= 2**12:
            answers = BundleClassifier.from_bundle(bundle).predict(np.zeros((1, height, width, 3), np.uint8))
            require(answers.probabilities.shape == (1, len(bundle.class_names)), "a probability per class")


class Repositories(_Sealed):
    """Model repositories as `verify` takes them, golden answers included."""

    name = "repositories"
    limit_mb = 512

    def prepare(self, folder: Path) -> None:
        """Export a bundle of a random model."""
        bundle = write_tiny_bundle(folder / "bundle")
        export_bundle(bundle, folder / "whole", name="shapes", profile=Profile(max_batch=4))

    def run(self, made: Input, folder: Path) -> None:
        """Check it, with foreign code allowed or not."""
        verify_repository(folder, allow_foreign_code=made.how == "foreign code")


def write_tiny_bundle(folder: Path) -> Any:
    """Return a bundle of a random model with three classes."""
    torch.manual_seed(0)
    config = check_model_config(CONFIG)
    encoder = build_model(config).visual.state_dict()
    rng = np.random.default_rng(0)
    heads = rng.standard_normal((2, 3, 8)).astype(np.float32)
    heads /= np.linalg.norm(heads, axis=2, keepdims=True)
    concept = Concept(word="dog", score=5.0, p_value=0.01, family="patch", success=1.0)
    return write_bundle(
        folder,
        content=BundleContent(
            verdict="backdoored",
            model={
                "config": config,
                "preprocess": preprocess_values(),
                "source": "tiny",
                "format": "open_clip-folder",
                "sha256": "0" * 64,
                "dtype": "float32",
            },
            class_names=("cat", "fire truck", "dog"),
            templates=(("a photo of a {}.",),) * 3,
            method={"name": "cbpt", "config": {}, "seed": 0, "parameterization": "prompt"},
            suspects=(Suspect(index=2, name="dog", score=5.0, p_value=0.01, family="patch"),),
            metrics={"heldout_ca_before": 0.75},
            evidence=Evidence(p_value=0.01, words=1000, concepts=(concept, replace(concept, word="tench"))),
            versions={"open_clip": open_clip.__version__},
            class_embeddings=heads[0],
            reference_embeddings=heads[1],
            logit_scale=100.0,
            encoder={name: tensor.numpy() for name, tensor in encoder.items()},
            triggers={"blend.2.pattern": np.ones((3, 16, 16), np.float32)},
        ),
    )


def preprocess_values() -> dict[str, Any]:
    """Preprocessing of the tiny model, as a bundle writes it."""
    from cbpt_runtime.runtime.preprocess import Preprocess

    given = {key: value for key, value in _SETTINGS["preprocess_cfg"].items() if key != "size"}
    return Preprocess.from_open_clip(given, 16).to_dict()
