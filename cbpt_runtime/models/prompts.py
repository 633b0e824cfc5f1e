"""Learnable class-wise contexts in front of the class names, through the real text tower."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from cbpt_runtime.errors import CheckpointError, ClassListError, ConfigError
from cbpt_runtime.models.clip import DualEncoder
from cbpt_runtime.models.data import spoken

_PLACEHOLDER = "x"


class PromptEncoder:
    """Turns one context per class, in the text tower's token space, into class embeddings.

    The prompt of class c is `[start] context_c name_c [end]`, where the context holds free vectors instead of
    token embeddings (class-specific contexts, class name at the end: Zhou et al., "Learning to Prompt for
    Vision-Language Models", IJCV 2022). Towers with a causal mask run only up to the last end-of-text
    position, which changes nothing in the result.

    Attributes:
        context_length: Free vectors per class.
        length: Positions the tower runs, out of its full context.
    """

    def __init__(
        self,
        encoder: DualEncoder,
        class_names: Sequence[str],
        *,
        context_length: int = 4,
        init: str = "a photo of a",
    ) -> None:
        """Tokenises the prompts once.

        Args:
            encoder: Supplies text tower and tokenizer.
            class_names: In the order of the head; '_' is read as a space.
            context_length: Free vectors per class.
            init: Text whose token embeddings the contexts start from, repeated or cut to `context_length`.

        Raises:
            CheckpointError: The text tower takes no embeddings.
            ClassListError: No classes, or two prompts that are the same to the tower.
            ConfigError: The context leaves no room for a class name, or `init` has no tokens.
        """
        self._tower = encoder.text_tower
        if not self._tower.takes_embeddings or self._tower.pools_constant:
            raise _not_possible(f"the text tower {self._tower.name}")
        self.context_length = context_length
        self._first = encoder.tokenizer.start
        self._init = init
        room = encoder.tokenizer.context_length - self._first - 2  # a name and the end of text
        if not 1 <= context_length <= room:
            raise ConfigError(
                expected=f"a context length from 1 to {room}",
                got=str(context_length),
                fix="Change the context length.",
            )
        tokens = self._prompt_rows(encoder, class_names)
        self.length = self._tower.needed_length(tokens)
        self._tokens = tokens[:, : self.length]
        with torch.no_grad():
            self._embeddings = self._tower.embed(self._tokens)
            self._initial = self._tower.embed(self._init_tokens(encoder))

    def initial_contexts(self) -> Float[Tensor, "classes context width"]:
        """Return a fresh copy, per class, of the token embeddings of `init`."""
        return self._initial.repeat(len(self._tokens), 1, 1)

    def encode(self, contexts: Float[Tensor, "classes context width"]) -> Float[Tensor, "classes dim"]:
        """Unit-norm class embeddings, differentiable with respect to the contexts."""
        after = self._first + self.context_length
        parts = (self._embeddings[:, : self._first], contexts, self._embeddings[:, after:])
        return normalize(self._tower.encode_embeddings(torch.cat(parts, dim=1), self._tokens), dim=-1)

    def _prompt_rows(self, encoder: DualEncoder, class_names: Sequence[str]) -> Int[Tensor, "classes length"]:
        if not class_names:
            raise ClassListError(expected="one or more class names", got="none", fix="Give the class names.")
        placeholder = " ".join([_PLACEHOLDER] * self.context_length)
        tokens = encoder.tokenizer([f"{placeholder} {spoken(name)}" for name in class_names])
        context = tokens[:, self._first : self._first + self.context_length]
        if not bool((context == context[0, 0]).all()):
            raise _not_possible(f"the tokenizer {encoder.tokenizer.name}")
        if len({tuple(row) for row in tokens.tolist()}) < len(tokens):
            raise ClassListError(
                expected=f"class names that differ within {tokens.shape[1] - self.context_length} tokens",
                got="names that are the same to the text tower",
                fix="Shorten the names or the context.",
            )
        return tokens.to(encoder.device)

    def _init_tokens(self, encoder: DualEncoder) -> Int[Tensor, " context"]:
        """Return the tokens of `init` without start, end and padding: what it adds to an empty text."""
        row, empty = encoder.tokenizer([self._init, ""])
        n_tokens = int((row != row[-1]).sum() - (empty != empty[-1]).sum())
        if n_tokens < 1:
            raise ConfigError(
                expected="words in the initial context", got=repr(self._init), fix="Give some text."
            )
        words: Tensor = row[self._first : self._first + n_tokens]
        repeats = -(-self.context_length // n_tokens)
        return words.repeat(repeats)[: self.context_length].to(encoder.device)


def _not_possible(what: str) -> CheckpointError:
    return CheckpointError(
        expected="a text tower and tokenizer that take free context vectors (open_clip's own)",
        got=what,
        fix="Tune the class embeddings instead: --parameterization embedding.",
    )
