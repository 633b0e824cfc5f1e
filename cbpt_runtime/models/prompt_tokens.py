"""What is left of the prompts of a class list as tokens: cut ones, and classes that became equal."""

from __future__ import annotations

from collections import defaultdict

import torch

from cbpt_runtime.errors import ClassListError
from cbpt_runtime.models.data import ClassList
from cbpt_runtime.models.image_files import first_few
from cbpt_runtime.models.tokenizer import Tokenizer

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
    """Groups of classes whose prompts are the same tokens."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for label, own in enumerate(texts):
        rows = torch.unique(tokenizer(own), dim=0)
        groups[rows.numpy().tobytes()].append(label)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def _bare_name(classes: ClassList, label: int) -> str:
    """The name of a class without the folder that tells it from others of the same name."""
    name = classes.names[label]
    return name.removesuffix(f" ({classes.folders[label]})") if classes.folders else name
