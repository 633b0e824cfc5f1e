"""From text to the token rows a text tower takes, with files of this machine only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from jaxtyping import Int
from torch import Tensor

from cbpt_runtime.errors import CheckpointError, ClassListError
from cbpt_runtime.models.data import ClassList
from cbpt_runtime.models.hub import find_local_files
from cbpt_runtime.models.image_files import first_few

_DEFAULT_CONTEXT_LENGTH = 77
_DEFAULT_VOCAB_SIZE = 49408


class Tokenizer:
    """open_clip's byte-pair tokenizer, or a local Hugging Face one where the configuration names it.

    Attributes:
        name: 'open_clip BPE', or the configured Hugging Face name.
        context_length: Tokens per row.
        start: How many tokens (0 or 1) stand before the first word.
    """

    def __init__(self, text_cfg: Mapping[str, Any], *, folder: Path | None = None) -> None:
        """Set up the tokenizer of a checked `text_cfg`.

        Raises:
            CheckpointError: A Hugging Face tokenizer whose files are not on this machine.
        """
        self.context_length: int = text_cfg.get("context_length", _DEFAULT_CONTEXT_LENGTH)
        is_native = text_cfg.get("hf_model_name") is None  # transformers towers size their own vocabulary
        self._vocab_size: float = (
            text_cfg.get("vocab_size", _DEFAULT_VOCAB_SIZE) if is_native else float("inf")
        )
        hub_name = text_cfg.get("hf_tokenizer_name")
        options = dict(text_cfg.get("tokenizer_kwargs") or {})
        self.name: str = hub_name or "open_clip BPE"
        if hub_name:
            self._tokenizer = _local_hub_tokenizer(hub_name, self.context_length, options, text_cfg, folder)
            inner = self._tokenizer.tokenizer
            self.start = int(int(self._tokenizer(["a"])[0, 0]) in (inner.bos_token_id, inner.cls_token_id))
        else:
            options.pop("strip_sep_token", None)
            self._tokenizer = open_clip.SimpleTokenizer(context_length=self.context_length, **options)
            self.start = 1

    def __call__(self, texts: Sequence[str]) -> Int[Tensor, "batch length"]:
        """Tokens of each text, cut or padded to the context length.

        Raises:
            CheckpointError: The text tower knows fewer tokens than the tokenizer.
        """
        rows: Tensor = self._tokenizer(list(texts))
        if len(rows) and int(rows.max()) >= self._vocab_size:
            raise CheckpointError(
                expected=f"a text tower with the tokens of {self.name}",
                got=f"vocab_size {self._vocab_size} and the token {int(rows.max())}",
                fix="Name the tokenizer of the weights: hf_tokenizer_name in the configuration.",
            )
        return rows

    def is_cut(self, texts: Sequence[str]) -> list[bool]:
        """Of each text whether it is longer than the context and loses its end."""
        rows: Tensor = self._tokenizer(list(texts), context_length=self.context_length + 1)
        marks = set(self._tokenizer([""])[0].tolist())  # start, end and padding
        return [token not in marks for token in rows[:, -2].tolist()]


def _local_hub_tokenizer(
    name: str, context_length: int, options: dict[str, Any], text_cfg: Mapping[str, Any], folder: Path | None
) -> Any:
    found = find_local_files(name, "tokenizer_config.json", folder)
    if found is None:
        raise CheckpointError(
            expected=f"the tokenizer {name:.80} beside the checkpoint or in the Hugging Face cache",
            got="neither",
            fix="Put tokenizer.json and tokenizer_config.json into the checkpoint's folder.",
        )
    try:
        return open_clip.tokenizer.HFTokenizer(
            str(found),
            context_length=context_length,
            tokenizer_mode=text_cfg.get("tokenizer_mode"),
            local_files_only=True,
            trust_remote_code=False,
            **options,
        )
    except ImportError as error:
        raise CheckpointError(
            expected=f"the package transformers for the tokenizer {name:.80}",
            got="an environment without it",
            fix="pip install transformers sentencepiece",
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            expected=f"a tokenizer transformers can read in {found}",
            got=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no details'}",
            fix="Compare its files with the publisher's.",
        ) from error


_BATCH = 4096


def prompt_notes(classes: ClassList, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Remarks on prompts that are cut at the context length, and on classes of the same name.

    Raises:
        ClassListError: Classes of different names whose prompts are the same to the text tower.
    """
    texts = classes.texts()
    everything = [text for own in texts for text in own]
    cut = _cut(everything, tokenizer)
    equal = _equal_classes(classes, texts, tokenizer)
    doubled = [group for group in equal if len({_bare_name(classes, label) for label in group}) == 1]
    mixed = [group for group in equal if group not in doubled]
    if mixed:
        named = [" = ".join(classes.names[label] for label in group) for group in mixed]
        reason = (
            f"{len(cut)} of {len(everything)} prompts are longer and were cut" if cut else "equal prompts"
        )
        raise ClassListError(
            expected=f"prompts that tell the classes apart within {tokenizer.context_length} tokens",
            got=f"the same for {first_few(named)} ({reason})",
            fix="Shorten the templates or the names, or put the name ({}) first.",
        )
    notes = []
    if cut:
        notes.append(
            f"{len(cut)} of {len(everything)} prompts are longer than the {tokenizer.context_length} tokens"
            f" of the text tower and were cut, first: {cut[0]:.80}"
        )
    if doubled:
        named = [", ".join(classes.names[label] for label in group) for group in doubled]
        notes.append(
            f"classes of the same name have the same prompts, chance tells them apart: {first_few(named)}"
        )
    return tuple(notes)


def _cut(texts: list[str], tokenizer: Tokenizer) -> list[str]:
    found: list[str] = []
    for start in range(0, len(texts), _BATCH):
        batch = texts[start : start + _BATCH]
        is_cut = tokenizer.is_cut(batch)
        found += [text for text, is_one in zip(batch, is_cut, strict=True) if is_one]
    return found


def _equal_classes(
    classes: ClassList, texts: tuple[tuple[str, ...], ...], tokenizer: Tokenizer
) -> list[tuple[int, ...]]:
    """Find groups of classes whose prompts are the same tokens."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for label, own in enumerate(texts):
        rows = torch.unique(tokenizer(own), dim=0)
        groups[rows.numpy().tobytes()].append(label)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def _bare_name(classes: ClassList, label: int) -> str:
    """Return the name of a class without the folder that tells it from others of the same name."""
    name = classes.names[label]
    return name.removesuffix(f" ({classes.folders[label]})") if classes.folders else name
