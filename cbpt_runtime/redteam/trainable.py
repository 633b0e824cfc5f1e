"""A CLIP model one can still train, and the open_clip folder it is saved to.

The purification side only ever meets frozen encoders; this is the attacker's counterpart.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cbpt_runtime.errors import CheckpointError, OutputError
from cbpt_runtime.redteam.triggers import to_float

CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainableClip:
    """An open_clip model with the configuration that rebuilds it.

    Args:
        model: An open_clip `CLIP` or `CustomTextCLIP`.
        model_config: open_clip's `model_cfg`.
        preprocess_config: open_clip's `preprocess_cfg`.
    """

    model: nn.Module
    model_config: dict[str, Any]
    preprocess_config: dict[str, Any]

    @property
    def device(self) -> torch.device:
        """The device the model is on."""
        return next(self.model.parameters()).device

    @property
    def image_size(self) -> tuple[int, int]:
        """Input height and width in pixels."""
        size = self.preprocess_config.get("size") or self.model_config["vision_cfg"]["image_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return int(height), int(width)

    def encode_images(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Encode pixels in [0, 1]; CLIP's normalisation happens in here; rows have unit norm."""
        mean = pixels.new_tensor(self.preprocess_config.get("mean", CLIP_MEAN))[:, None, None]
        std = pixels.new_tensor(self.preprocess_config.get("std", CLIP_STD))[:, None, None]
        features: Tensor = self.model.encode_image((pixels - mean) / std)  # type: ignore[operator]
        return F.normalize(features.float(), dim=-1)

    def encode_tokens(self, tokens: Int[Tensor, "batch context"]) -> Float[Tensor, "batch dim"]:
        """Encode token ids; rows have unit norm."""
        features: Tensor = self.model.encode_text(tokens)  # type: ignore[operator]
        return F.normalize(features.float(), dim=-1)

    def tokenize(self, texts: Sequence[str]) -> Int[Tensor, "batch context"]:
        """Tokenize with open_clip's tokenizer at this model's context length."""
        from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

        text_config = self.model_config.get("text_cfg", {})
        context_length = int(text_config.get("context_length", 77))
        hf_name = text_config.get("hf_tokenizer_name")
        if hf_name:
            options = text_config.get("tokenizer_kwargs", {})
            tokens: Tensor = HFTokenizer(hf_name, context_length=context_length, **options)(list(texts))
        else:
            tokens = SimpleTokenizer(context_length=context_length)(list(texts))
        return tokens

    @torch.no_grad()
    def class_embeddings(
        self, names: Sequence[str], templates: Sequence[str], *, batch_size: int = 1024
    ) -> Float[Tensor, "classes dim"]:
        """Return the zero-shot head: normalise per template, average, normalise again (as open_clip does)."""
        self.model.eval()
        tokens = self.tokenize([template.format(name) for name in names for template in templates])
        parts = [self.encode_tokens(part.to(self.device)) for part in torch.split(tokens, batch_size)]
        embeddings = torch.cat(parts).view(len(names), len(templates), -1)
        return F.normalize(embeddings.mean(dim=1), dim=-1)

    @torch.no_grad()
    def predict(
        self,
        images: UInt8[np.ndarray, "batch height width 3"],
        head: Float[Tensor, "classes dim"],
        *,
        batch_size: int = 256,
    ) -> Int[np.ndarray, " batch"]:
        """Return the zero-shot class of every image."""
        self.model.eval()
        classes = [
            (
                self.encode_images(to_float(images[start : start + batch_size]).to(self.device)) @ head.T
            ).argmax(1)
            for start in range(0, len(images), batch_size)
        ]
        return torch.cat(classes).cpu().numpy()

    def clone(self) -> TrainableClip:
        """Return an independent copy, so that training leaves the original alone."""
        return TrainableClip(
            model=copy.deepcopy(self.model),
            model_config=copy.deepcopy(self.model_config),
            preprocess_config=copy.deepcopy(self.preprocess_config),
        )


def new_trainable(
    model_config: Mapping[str, Any],
    *,
    seed: int,
    device: str = "cpu",
    preprocess_config: Mapping[str, Any] | None = None,
) -> TrainableClip:
    """Build a model with fresh weights. torch's global generator is left as it was."""
    size = model_config["vision_cfg"]["image_size"]
    height, width = (size, size) if isinstance(size, int) else size
    preprocess = {
        "size": [height, width],
        "mode": "RGB",
        "mean": list(CLIP_MEAN),
        "std": list(CLIP_STD),
        "interpolation": "bicubic",
        "resize_mode": "squash",
        "fill_color": 0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _build_model(model_config)
    return TrainableClip(
        model=model.to(device),
        model_config=copy.deepcopy(dict(model_config)),
        preprocess_config=copy.deepcopy(dict(preprocess_config or preprocess)),
    )


def load_trainable(folder: str | Path, *, device: str = "cpu") -> TrainableClip:
    """Load an open_clip folder for training, in float32.

    Raises:
        CheckpointError: A file is missing, unreadable, or the weights do not fit the configuration.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG_NAME).read_text())
        state = load_file(folder / WEIGHTS_NAME)
        clip = new_trainable(config["model_cfg"], seed=0, preprocess_config=config.get("preprocess_cfg"))
        clip.model.load_state_dict({key: value.float() for key, value in state.items()})
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            expected=f"an open_clip folder with {CONFIG_NAME} and {WEIGHTS_NAME}",
            got=f"{folder}: {type(error).__name__}: {str(error)[:300]}",
            fix="Point to a folder as open_clip writes it.",
        ) from error
    clip.model.to(device)
    return clip


def save_open_clip_folder(
    clip: TrainableClip, path: Path, *, extra_files: Mapping[str, str] | None = None, force: bool = False
) -> None:
    """Write the model as an open_clip folder with fp16 weights; the folder is whole or absent.

    Args:
        clip: The model.
        path: The folder to make.
        extra_files: More text files to put into it, name to content (`attack.json`).
        force: Replace an existing folder.

    Raises:
        OutputError: The folder exists and `force` is not set, or it cannot be written.
    """
    if path.exists() and not force:
        raise OutputError(
            expected="a new folder", got=f"{path} exists", fix="Choose another one or use --force."
        )
    config = {"model_cfg": clip.model_config, "preprocess_cfg": clip.preprocess_config}
    state = {
        key: value.detach().cpu().to(torch.float16 if value.is_floating_point() else value.dtype).contiguous()
        for key, value in clip.model.state_dict().items()
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as temporary:
            whole = Path(temporary) / "folder"
            whole.mkdir()
            (whole / CONFIG_NAME).write_text(json.dumps(config, indent=1) + "\n")
            save_file(state, whole / WEIGHTS_NAME)
            for name, content in (extra_files or {}).items():
                (whole / name).write_text(content)
            if path.exists():
                shutil.rmtree(path)
            whole.rename(path)
    except OSError as error:
        raise OutputError(
            expected="a folder that can be written", got=str(error), fix="Check space and permissions."
        ) from error


def _build_model(model_config: Mapping[str, Any]) -> nn.Module:
    """Build open_clip's class for this configuration, with float32 weights."""
    from open_clip import CLIP, CustomTextCLIP

    settings = copy.deepcopy(dict(model_config))
    custom_text = settings.pop("custom_text", False) or "hf_model_name" in settings.get("text_cfg", {})
    kind = CustomTextCLIP if custom_text else CLIP
    model: nn.Module = kind(**settings)
    return model.float()
