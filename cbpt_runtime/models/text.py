"""The text tower: token rows or token embeddings in, text features out, no more positions than needed.

Under a causal mask the position that is pooled sees nothing after it, so positions behind the last pooled one
of a batch are cut off. The result is the same and a short prompt costs a fraction of the full context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from cbpt_runtime.errors import CheckpointError


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
        """The text tower of an open_clip `CLIP` or `CustomTextCLIP`."""
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
