from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from cbpt_runtime.config import Above, Between, Config
from cbpt_runtime.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Some(Config):
    """One field of each kind."""

    whole: Annotated[int, Between(1, 64)] = 1
    share: Annotated[float, Between(0, 1)] = 0.5
    step: Annotated[float, Above(0)] = 0.1
    layer: Annotated[int | None, Between(0)] = None
    sizes: tuple[Annotated[int, Between(1)], ...] = (1, 2)
    kind: Literal["a", "b"] = "a"
    on: bool = True
    name: str = ""


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("whole", 0, "a whole number from 1 to 64"),
        ("whole", 65, "a whole number from 1 to 64"),
        ("whole", 1.0, "a whole number from 1 to 64"),
        ("whole", True, "a whole number from 1 to 64"),
        ("share", 1.01, "a number from 0 to 1"),
        ("share", "0.5", "a number from 0 to 1"),
        ("step", 0, "a number above 0"),
        ("step", math.inf, "a number above 0"),
        ("step", 10**400, "a number above 0"),
        ("step", math.nan, "a number above 0"),
        ("layer", -1, "a whole number of at least 0 or nothing"),
        ("sizes", (3, 0), "a whole number of at least 1"),
        ("kind", "c", "one of a, b"),
        ("on", 1, "true or false"),
    ],
)
def test_a_value_out_of_its_range_is_named_with_what_is_expected(
    field: str, value: object, expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        Some.from_dict({field: value})
    assert caught.value.expected == f"{field} to be {expected}"
    assert caught.value.got == f"{field} = {value!r}"


@pytest.mark.parametrize(
    "values",
    [{"whole": 64, "share": 0}, {"step": 1e-9, "layer": 3}, {"sizes": ()}, {"kind": "b", "on": False}],
)
def test_values_at_the_edge_are_taken_and_travel_as_json(values: dict[str, object]) -> None:
    some = Some.from_dict(values)
    assert Some.from_dict(some.to_dict()) == some
    assert some.to_dict() | values == some.to_dict()


def test_every_bad_value_is_named_at_once_and_an_unknown_key_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"whole to be .*; kind to be .*; got whole = 0; kind = 'c'"):
        Some(whole=0, kind="c")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"keys out of whole, share, .*; got hole"):
        Some.from_dict({"hole": 1})


def test_pytorch_held_to_avx2_is_not_asked_for_bfloat16() -> None:
    program = "import torch; from cbpt_runtime.config import is_mixed as m; c = torch.device('cpu'); "
    program += "print(m('auto', c), m('bf16', c), m('fp32', c))"
    held = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "avx2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert held.stdout.split() == ["False", "True", "False"]
