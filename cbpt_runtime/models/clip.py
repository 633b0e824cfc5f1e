"""Frozen encoders: the dual encoder of a suspect checkpoint and its image half."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from cbpt_runtime.errors import CheckpointError, ConfigError, ImageDataError
from cbpt_runtime.models.architecture import load_image_tower, load_model
from cbpt_runtime.models.checkpoint import Checkpoint
from cbpt_runtime.models.config import check_model_config, config_error
from cbpt_runtime.models.data import ClassList
from cbpt_runtime.models.preprocess import Preprocess
from cbpt_runtime.models.text import TextTower
from cbpt_runtime.models.tokenizer import Tokenizer

_TEXT_BATCH = 256


class ImageEncoder:
    """The image tower, frozen, in float32.

    Attributes:
        model_config: open_clip's `model_cfg`.
        preprocess: How images become its input.
        device: Where it lives.
        embed_dim: Length of a feature.
        module: The open_clip image tower itself; takes normalised pixels.
    """

    def __init__(self, module: nn.Module, model_config: Mapping[str, Any], preprocess: Preprocess) -> None:
        self.module = module.eval().requires_grad_(False)
        self.model_config = model_config
        self.preprocess = preprocess
        self.embed_dim: int = model_config["embed_dim"]
        self.device = next(module.parameters()).device
        self._mean = torch.tensor(preprocess.mean, device=self.device).view(1, 3, 1, 1)
        self._std = torch.tensor(preprocess.std, device=self.device).view(1, 3, 1, 1)

    def encode_images(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Unit-norm features of images at the model's input size, differentiable with respect to the pixels.

        Args:
            pixels: RGB in [0, 1]; normalisation with mean and std happens here.

        Raises:
            ImageDataError: Pixels of another shape.
        """
        height, width = self.preprocess.image_size
        if pixels.ndim != 4 or pixels.shape[1:] != (3, height, width):
            raise ImageDataError(
                expected=f"pixels of shape [batch, 3, {height}, {width}]",
                got=str(list(pixels.shape)),
                fix="Prepare images with to_pixels and move the channels to the second place.",
            )
        features: Tensor = self.module(self.normalise(pixels))
        return normalize(features, dim=-1)

    def normalise(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Pixels in [0, 1] as the tower takes them, on its device."""
        return (pixels.to(self.device) - self._mean) / self._std

    def to(self, device: torch.device) -> ImageEncoder:
        """The same encoder on a device; itself where it is there."""
        if device == self.device:
            return self
        return ImageEncoder(copy.deepcopy(self.module).to(device), self.model_config, self.preprocess)

    def state(self) -> dict[str, Tensor]:
        """The tower's weights by name, without the prefix `visual.`."""
        return {name: tensor.detach().cpu() for name, tensor in self.module.state_dict().items()}


class DualEncoder:
    """A CLIP model, frozen, in evaluation mode and float32.

    Attributes:
        model_config: open_clip's `model_cfg`.
        preprocess: How images become its input.
        device: Where it lives.
        embed_dim: Length of a feature.
        logit_scale: The temperature factor, already exponentiated.
        logit_bias: SigLIP's bias, where the model has one.
        image_encoder: The image half.
        text_tower: The text half.
        tokenizer: From text to token rows.
    """

    def __init__(
        self, model: nn.Module, model_config: Mapping[str, Any], preprocess: Preprocess, tokenizer: Tokenizer
    ) -> None:
        model.eval().requires_grad_(False)
        parts: Any = model
        self.model_config = model_config
        self.preprocess = preprocess
        self.image_encoder = ImageEncoder(parts.visual, model_config, preprocess)
        self.text_tower = TextTower.of(model)
        self.tokenizer = tokenizer
        self.device = self.image_encoder.device
        self.embed_dim = self.image_encoder.embed_dim
        self.logit_scale = float(parts.logit_scale.exp())
        self.logit_bias = None if parts.logit_bias is None else float(parts.logit_bias)

    def encode_images(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Unit-norm image features; see `ImageEncoder.encode_images`."""
        return self.image_encoder.encode_images(pixels)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "batch dim"]:
        """Unit-norm text features. Texts of similar length share a batch, so that short ones stay cheap."""
        tokens = self.tokenizer(texts).to(self.device)
        lengths = (tokens != tokens[:, -1:]).sum(dim=1)  # padding repeats the last token
        order = lengths.argsort(stable=True)
        batches = torch.split(order, _TEXT_BATCH)
        features = torch.cat([self.text_tower.encode(tokens[batch]) for batch in batches])
        return normalize(features, dim=-1)[order.argsort()]

    def class_embeddings(self, classes: ClassList) -> Float[Tensor, "classes dim"]:
        """Zero-shot class embeddings as open_clip makes them: the normalised mean over the templates."""
        texts = classes.texts()
        features = self.encode_texts([text for group in texts for text in group])
        groups = torch.split(features, [len(group) for group in texts])
        return normalize(torch.stack([group.mean(dim=0) for group in groups]), dim=-1)

    def with_image_tower(self, module: nn.Module) -> DualEncoder:
        """The same model with another image tower, which is frozen."""
        other = copy.copy(self)
        other.image_encoder = ImageEncoder(module, self.model_config, self.preprocess)
        return other

    def image_tower_state(self) -> dict[str, Tensor]:
        """The image tower's weights by name, without the prefix `visual.`, for `load_image_encoder`."""
        return self.image_encoder.state()


def load_dual_encoder(checkpoint: Checkpoint, *, device: str = "cpu") -> DualEncoder:
    """Builds the frozen dual encoder of a checkpoint.

    Raises:
        CheckpointError: The weights do not fit the architecture or are not finite, or the tokenizer is not at
            hand.
        ConfigError: A device that is not there.
    """
    where = resolve_device(device)
    if checkpoint.anomalies:
        raise CheckpointError(
            expected=f"finite weights that fit the architecture in {checkpoint.source}",
            got="; ".join(checkpoint.anomalies),
            fix="Name the architecture the weights were trained with (--model), or get an undamaged file.",
        )
    config = checkpoint.model_config
    tokenizer = Tokenizer(config["text_cfg"], folder=checkpoint.folder)
    model = load_model(config, checkpoint.state_dict, folder=checkpoint.folder)
    return DualEncoder(model.to(where), config, checkpoint.preprocess, tokenizer)


def load_image_encoder(
    model_config: Mapping[str, Any],
    preprocess: Preprocess,
    state_dict: Mapping[str, Tensor],
    device: str = "cpu",
) -> ImageEncoder:
    """Builds the frozen image encoder from what `DualEncoder.image_tower_state` gave.

    Raises:
        CheckpointError: The weights do not fit the architecture, or the preprocessing makes images of another
            size.
        ConfigError: A device that is not there.
    """
    where = resolve_device(device)
    config = check_model_config(model_config)
    height, width = Preprocess.from_open_clip({}, config["vision_cfg"].get("image_size", 224)).image_size
    if (height, width) != preprocess.image_size:
        raise config_error(
            f"preprocessing for the {width}×{height} pixels of the model",
            f"one for {preprocess.image_size[1]}×{preprocess.image_size[0]}",
        )
    return ImageEncoder(load_image_tower(config, state_dict).to(where), config, preprocess)


def resolve_device(name: str) -> torch.device:
    """The device for 'auto' (CUDA where there is one), 'cpu' or 'cuda'.

    Raises:
        ConfigError: Another name, or 'cuda' where there is none.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(expected="a device out of auto, cpu, cuda", got=name, fix="Choose one of them.")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            expected="a CUDA device",
            got="a machine on which torch sees none",
            fix="Use --device cpu or auto.",
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
