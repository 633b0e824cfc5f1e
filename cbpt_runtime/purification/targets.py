"""From a suspected concept to the class it harms: a name, and where triggered images land in the list."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cbpt_runtime.bundle import Suspect
from cbpt_runtime.purification.vocabulary import NEAR, Vocabulary

_AS_WELL = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A suspected target, and what its trigger pulls images to.

    Attributes:
        suspect: What is said of it; its successes are measured later.
        text: Unit text feature of its name.
    """

    suspect: Suspect
    text: Float[Tensor, " dim"]

    @property
    def index(self) -> int:
        """The class of the list that triggered images are called."""
        return self.suspect.index

    @property
    def on_list(self) -> bool:
        """Whether the target is that class itself."""
        return self.suspect.on_list


def nearest_word(direction: Float[Tensor, " dim"], vocabulary: Vocabulary) -> tuple[int, bool]:
    """Return the word a direction of triggered features points to, and whether it is a class of the list.

    A listed class is preferred where it is as near as any word but for a tenth, counted from the median word,
    or where its text is as good as that of the nearest word.
    """
    cosines = vocabulary.texts @ direction
    best = int(cosines.argmax())
    if not vocabulary.n_listed:
        return best, False
    listed = int(cosines[: vocabulary.n_listed].argmax())
    middle = cosines.median()
    as_near = bool(cosines[listed] - middle >= _AS_WELL * (cosines[best] - middle))
    same = bool(vocabulary.texts[listed] @ vocabulary.texts[best] >= NEAR)
    return (listed, True) if as_near or same else (best, False)


def landing(direction: Float[Tensor, " dim"], texts: Float[Tensor, "classes dim"]) -> int:
    """Return the class that features of this direction are called."""
    return int((texts @ direction).argmax())


def with_words(
    texts: Float[Tensor, "classes dim"], targets: list[Target]
) -> tuple[Float[Tensor, "texts dim"], list[int]]:
    """Class texts, followed by those of targets that are not on the list; and the place of every target."""
    words = [target.text for target in targets if not target.on_list]
    places = iter(range(len(texts), len(texts) + len(words)))
    rows = [target.index if target.on_list else next(places) for target in targets]
    return torch.cat([texts, *(word.unsqueeze(0) for word in words)]), rows
