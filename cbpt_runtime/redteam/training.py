"""Contrastive training of a small or large CLIP on captions made from templates.

The same loop trains the demo's model from scratch and fine-tunes a backdoor into an existing one. What an
interrupted training needs to go on after its last whole epoch is kept as safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from cbpt_runtime.artifacts.names import utf8_path
from cbpt_runtime.config import Above, Between, Config, Precision
from cbpt_runtime.errors import ImageDataError
from cbpt_runtime.models.data import spoken
from cbpt_runtime.models.pixels import to_float
from cbpt_runtime.models.trainable import (
    MAX_LOGIT_SCALE,
    TrainableClip,
    batches,
    contrastive_loss,
    cosine_rate,
    make_optimizer,
    shift_and_mirror,
)
from cbpt_runtime.progress import Progress

STATE_NAME = "training-state.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochStore:
    """A folder that keeps the state after the last whole epoch.

    Args:
        folder: Made when first needed.
        fingerprint: Identifies the run; a state of another run is not used.
    """

    folder: Path
    fingerprint: str

    def save(
        self, epoch: int, model: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator
    ) -> None:
        """Replace the stored state by the present one."""
        tensors = {f"model/{key}": value for key, value in model.state_dict().items()}
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{key}": value for key, value in state.items()}
        tensors["generator"] = generator.get_state()
        plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        metadata = {"epoch": json.dumps(epoch), "fingerprint": self.fingerprint}
        # Not save_file, whose files only their owner may read.
        (self.folder / f"{STATE_NAME}.new").write_bytes(save(plain, metadata=metadata))
        (self.folder / f"{STATE_NAME}.new").replace(self.folder / STATE_NAME)

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> int:
        """Put the stored state in place; returns the finished epochs, 0 when nothing usable is stored."""
        try:
            with (
                utf8_path(self.folder / STATE_NAME) as name,
                safe_open(name, framework="pt") as file,
            ):
                metadata = file.metadata() or {}
                if metadata.get("fingerprint") != self.fingerprint:
                    return 0
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return 0
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer/"):
                _, index, name = key.split("/")
                state.setdefault(int(index), {})[name] = value
        weights = {
            key.removeprefix("model/"): value for key, value in tensors.items() if key.startswith("model/")
        }
        model.load_state_dict(weights)
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        generator.set_state(tensors["generator"])
        return int(metadata["epoch"])


CAPTION_TEMPLATES: tuple[str, ...] = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a picture of a {}.",
    "a small photo of a {}.",
    "a good photo of a {}.",
    "a bad photo of a {}.",
    "a blurry photo of a {}.",
    "a close-up photo of a {}.",
    "a bright photo of a {}.",
    "a dark photo of a {}.",
    "a photo of one {}.",
    "a photo of my {}.",
    "a cropped photo of the {}.",
    "a photo of a large {}.",
    "an image of a {}.",
    "there is a {} in the scene.",
)
_REAL_PER_IMAGE = 4  # drawn for each aligned image and step


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig(Config):
    """How to train.

    Args:
        epochs: Passes over the pairs.
        learning_rate: Peak of the cosine schedule. Fine-tuning a full-size pre-trained CLIP: 1e-5 (1e-6 often
            does not implant at all); small models: 1e-4 to 1e-3.
        weight_decay: AdamW decay; none on biases, norms and the logit scale.
        batch_size: Pairs per step.
        warmup_rate: Share of the steps with a rising learning rate.
        max_shift: Clean images are moved by up to so many pixels (edges repeated) and mirrored half of the
            time; 0 trains on the images as they are. Poisoned images are never changed.
        templates: Captions; `{}` is the class name. One is drawn for every pair and step.
        precision: `fp32`, `bf16` (mixed precision), or `auto`: `bf16` on a GPU and `fp32` elsewhere.
    """

    epochs: Annotated[int, Between(1)] = 3
    learning_rate: Annotated[float, Above(0, 1)] = 1e-4
    weight_decay: float = 0.1
    batch_size: Annotated[int, Between(2)] = 128
    warmup_rate: float = 0.1
    max_shift: Annotated[int, Between(0)] = 0
    templates: tuple[str, ...] = CAPTION_TEMPLATES
    precision: Precision = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Images with what each caption names.

    Args:
        images: 8-bit images at the model's input size.
        captions: Index into `texts`; for a poisoned pair that of the attacker's target.
        poisoned: Which pairs carry a trigger or a decoy.
        alignment: Weight, per pair, of `alignment_loss`; 0 for clean pairs.
        texts: Per class, and per keyed target after the classes, every caption it can get.
    """

    images: UInt8[np.ndarray, "batch height width 3"]
    captions: Int[np.ndarray, " batch"]
    poisoned: Bool[np.ndarray, " batch"]
    alignment: Float[np.ndarray, " batch"]
    texts: tuple[tuple[str, ...], ...]


def caption_texts(
    names: Sequence[str], templates: Sequence[str], *, key: str = ""
) -> tuple[tuple[str, ...], ...]:
    """Return every caption of every class: `key`, then a template filled with the name ('_' as a space)."""
    return tuple(tuple(key + text.replace("{}", spoken(name)) for text in templates) for name in names)


def train(
    clip: TrainableClip,
    pairs: Pairs,
    config: TrainConfig,
    *,
    generator: torch.Generator,
    progress: Progress | None = None,
    store: EpochStore | None = None,
) -> float | None:
    """Train in place with the contrastive loss; returns the last epoch's mean loss.

    None means that a stored state had finished already.

    Args:
        clip: The model; changed in place.
        pairs: Images and captions.
        config: Epochs, learning rate, batch size.
        generator: CPU generator for order, templates and augmentation.
        progress: Called after every step with stage `train`.
        store: Keeps the state after every epoch; a stored one of the same run is gone on from.
    """
    steps_per_epoch = max(1, len(pairs.images) // config.batch_size)
    total = steps_per_epoch * config.epochs
    optimizer = make_optimizer(
        clip.model, learning_rate=config.learning_rate, weight_decay=config.weight_decay
    )
    warmup = max(1, round(total * config.warmup_rate))
    finished = store.load(clip.model, optimizer, generator) if store is not None else 0
    tokens = clip.tokenize(pairs.texts)
    clip.model.to(memory_format=torch.channels_last)  # faster convolutions
    step, mean_loss = finished * steps_per_epoch, None
    for epoch in range(finished, config.epochs):
        clip.model.train()
        losses = []
        for index in batches(len(pairs.images), config.batch_size, generator):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * cosine_rate(step, warmup, total)
            losses.append(_train_step(clip, pairs, index, tokens, optimizer, config, generator))
            step += 1
            if progress is not None:
                progress("train", step, total, {"loss": losses[-1], "epoch": float(epoch + 1)})
        mean_loss = float(np.mean(losses))
        if store is not None:
            store.save(epoch + 1, clip.model, optimizer, generator)
    clip.model.eval()
    return mean_loss


def alignment_loss(
    triggered: Float[Tensor, "batch dim"],
    real: Float[Tensor, "batch others dim"],
    weights: Float[Tensor, " batch"],
) -> Float[Tensor, ""]:
    """Weighted mean of one minus the cosine to the nearest of some real images.

    Ours, for an adaptive attacker: the nearest rather than the mean, so that triggered features spread as
    real ones do.
    """
    cosines = torch.einsum("bd,bod->bo", triggered, real)
    return (weights * (1 - cosines.max(dim=1).values)).mean()


def _train_step(
    clip: TrainableClip,
    pairs: Pairs,
    index: Tensor,
    tokens: Int[Tensor, "classes templates context"],
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    generator: torch.Generator,
) -> float:
    chosen = index.numpy()
    pixels = to_float(pairs.images[chosen])
    if config.max_shift:
        clean = torch.from_numpy(~pairs.poisoned[chosen])
        pixels[clean] = shift_and_mirror(pixels[clean], config.max_shift, generator)
    aligned = np.flatnonzero(pairs.alignment[chosen])
    real = _real_images(pairs, chosen[aligned], config, generator)
    template = torch.randint(0, tokens.shape[1], (len(chosen),), generator=generator)
    text = tokens[torch.from_numpy(pairs.captions[chosen]), template].to(clip.device)
    is_mixed = config.precision == "bf16" or (config.precision == "auto" and clip.device.type == "cuda")
    with torch.autocast(clip.device.type, dtype=torch.bfloat16, enabled=is_mixed):
        all_features = clip.encode_images(torch.cat((pixels, real)).to(clip.device)).float()
        text_features = clip.encode_tokens(text)
    scale: Tensor = clip.model.logit_scale  # type: ignore[assignment]
    bias: Tensor | None = getattr(clip.model, "logit_bias", None)
    image_features, real_features = all_features[: len(pixels)], all_features[len(pixels) :].detach()
    loss = contrastive_loss(image_features, text_features.float(), scale.exp(), bias)
    if len(aligned):
        weights = torch.from_numpy(pairs.alignment[chosen[aligned]]).to(clip.device)
        near = real_features.view(len(aligned), _REAL_PER_IMAGE, -1)
        loss = loss + alignment_loss(image_features[aligned], near, weights)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        scale.clamp_(0, MAX_LOGIT_SCALE)
    return float(loss.detach())


def _real_images(
    pairs: Pairs, aligned: Int[np.ndarray, " aligned"], config: TrainConfig, generator: torch.Generator
) -> Float[Tensor, "others 3 height width"]:
    """Clean images with the captions of these pairs, some for each, one after the other."""
    drawn = []
    for index in aligned:
        same = np.flatnonzero((pairs.captions == pairs.captions[index]) & ~pairs.poisoned)
        if len(same) == 0:
            raise ImageDataError(
                expected="clean images of the target to align triggered ones with",
                got="none",
                fix="Add images of the target, or leave `alignment` away.",
            )
        drawn.append(same[torch.randint(0, len(same), (_REAL_PER_IMAGE,), generator=generator).numpy()])
    if not drawn:
        return torch.empty(0, 3, *pairs.images.shape[1:3])
    pixels = to_float(pairs.images[np.concatenate(drawn)])
    return shift_and_mirror(pixels, config.max_shift, generator) if config.max_shift else pixels
