"""Frozen encoders: the dual encoder of a suspect checkpoint, its image half and its text tower.

The text tower takes token rows or token embeddings and needs no more positions than it must: under a causal
mask the position that is pooled sees nothing after it, so positions behind the last pooled one of a batch are
cut off. The result is the same and a short prompt costs a fraction of the full context.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from open_clip.transformer import TextTransformer
from torch import Tensor, nn
from torch.nn.functional import normalize

from cbpt_runtime.errors import CheckpointError, ConfigError, ImageDataError
from cbpt_runtime.models.architecture import load_image_tower, load_model
from cbpt_runtime.models.checkpoint import Checkpoint
from cbpt_runtime.models.config import check_model_config, config_error
from cbpt_runtime.models.data import ClassList
from cbpt_runtime.models.tokenizer import Tokenizer
from cbpt_runtime.runtime.preprocess import Preprocess

_TEXT_BATCH = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTower:
    """open_clip's text transformer, wherever the model class keeps its parts.

    `CLIP` keeps them on the model itself, `CustomTextCLIP` under `text`; both run the same computation.
    Towers of another kind (transformers, towers with a class token) only take whole token rows.

    Attributes:
        model: The dual encoder.
        takes_embeddings: Whether `encode_embeddings` works.
        is_causal: Whether each position sees only those before it.
    """

    model: nn.Module
    takes_embeddings: bool
    is_causal: bool

    @classmethod
    def of(cls, model: nn.Module) -> TextTower:
        """Return the text tower of an open_clip `CLIP` or `CustomTextCLIP`."""
        tower = getattr(model, "text", model)
        takes_embeddings = tower is model or (isinstance(tower, TextTransformer) and tower.cls_emb is None)
        is_causal = takes_embeddings and getattr(tower, "attn_mask", None) is not None
        return cls(model=model, takes_embeddings=takes_embeddings, is_causal=is_causal)

    def encode(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch dim"]:
        """Text features, not normalised, of token rows."""
        if not self.takes_embeddings:
            model: Any = self.model
            features: Tensor = model.encode_text(tokens)
            return features
        length = self.needed_length(tokens)
        return self.encode_embeddings(self.embed(tokens[:, :length]), tokens[:, :length])

    def embed(self, tokens: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape width"]:
        """Token embeddings, without positions."""
        embeddings: Tensor = self._tower.token_embedding(tokens)
        return embeddings

    def needed_length(self, tokens: Int[Tensor, "batch length"]) -> int:
        """How many positions can reach a pooled one; the rest can be cut off."""
        if not self.is_causal:
            return tokens.shape[1]
        return int(self._pooled_position(tokens).max()) + 1

    def encode_embeddings(
        self, embeddings: Float[Tensor, "batch length width"], tokens: Int[Tensor, "batch length"]
    ) -> Float[Tensor, "batch dim"]:
        """Text features, not normalised, of token embeddings; `tokens` says which position is pooled.

        Raises:
            CheckpointError: A tower that only takes whole token rows.
        """
        if not self.takes_embeddings:
            raise CheckpointError(
                expected="a text tower that takes token embeddings (open_clip's own transformer)",
                got=self.name,
                fix="Tune the class embeddings instead: --parameterization embedding.",
            )
        tower, length = self._tower, embeddings.shape[1]
        x = embeddings + tower.positional_embedding[:length]
        mask = None if tower.attn_mask is None else tower.attn_mask[:length, :length]
        x = tower.transformer(x, attn_mask=mask)
        x = x[torch.arange(len(x), device=x.device), self._pooled_position(tokens)]
        return self._project(tower.ln_final(x))

    @property
    def _tower(self) -> Any:
        return getattr(self.model, "text", self.model)

    @property
    def name(self) -> str:
        """The class that holds the text tower's parts."""
        return type(self._tower).__name__

    @property
    def pools_constant(self) -> bool:
        """Whether the pooled position sees none of the words, so that all texts have the same features."""
        return self.is_causal and self._pool_type == "first"

    @property
    def _pool_type(self) -> str:
        return str(getattr(self._tower, "text_pool_type" if self._tower is self.model else "pool_type"))

    def _pooled_position(self, tokens: Int[Tensor, "batch length"]) -> Int[Tensor, " batch"]:
        """open_clip's `text_global_pool`, as positions."""
        match self._pool_type:
            case "first":
                return torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
            case "last":
                return torch.full((len(tokens),), tokens.shape[1] - 1, dtype=torch.long, device=tokens.device)
            case "eos":
                eos: int = getattr(self._tower, "text_eos_id" if self._tower is self.model else "eos_id")
                return (tokens == eos).int().argmax(dim=-1)
            case _:  # argmax: the end-of-text token has the highest id
                return tokens.argmax(dim=-1)

    def _project(self, x: Float[Tensor, "batch width"]) -> Float[Tensor, "batch dim"]:
        projection = self._tower.text_projection
        if projection is None:
            return x
        projected: Tensor = projection(x) if isinstance(projection, nn.Linear) else x @ projection
        return projected


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
        """Return the same encoder on a device; itself where it is there."""
        if device == self.device:
            return self
        return ImageEncoder(copy.deepcopy(self.module).to(device), self.model_config, self.preprocess)

    def state(self) -> dict[str, Tensor]:
        """Return the tower's weights by name, without the prefix `visual.`."""
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
        """Return the same model with another image tower, which is frozen."""
        other = copy.copy(self)
        other.image_encoder = ImageEncoder(module, self.model_config, self.preprocess)
        return other

    def image_tower_state(self) -> dict[str, Tensor]:
        """Return the image tower's weights by name, without `visual.`, for `load_image_encoder`."""
        return self.image_encoder.state()


def load_dual_encoder(checkpoint: Checkpoint, *, device: str = "cpu") -> DualEncoder:
    """Build the frozen dual encoder of a checkpoint.

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
    """Build the frozen image encoder from what `DualEncoder.image_tower_state` gave.

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
    """Return the device for 'auto' (CUDA where there is one), 'cpu' or 'cuda'.

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
