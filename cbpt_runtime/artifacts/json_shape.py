"""What a JSON value should look like, and where one that a stranger wrote does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

NUMBER: Final = (int, float)
_MOST_SHOWN = 5


def shape_problems(value: Any, shape: Any, name: str = "") -> list[str]:
    """Compare a JSON value with a shape.

    Args:
        value: As `json.loads` gives it.
        shape: A type or a tuple of types; ``[shape]`` for a list of such values; ``{"key": shape}`` for an
            object with at least these keys; ``{str: shape}`` for an object of such values.
        name: Of the value, for the problems.

    Returns:
        At most a handful of problems in words; none when it fits.
    """
    problems: list[str] = []
    if isinstance(shape, list):
        if not isinstance(value, list):
            return [f"{name or 'the whole'!r} is not a list"]
        for number, item in enumerate(value):
            problems += shape_problems(item, shape[0], f"{name}[{number}]")
            if len(problems) >= _MOST_SHOWN:
                break
    elif isinstance(shape, Mapping):
        if not isinstance(value, dict):
            return [f"{name or 'the whole'!r} is not an object"]
        wanted = dict.fromkeys(value, shape[str]) if str in shape else shape
        for key, inner in wanted.items():
            inside = f"{name}.{key}" if name else key
            if key not in value:
                problems.append(f"no {inside!r}")
            else:
                problems += shape_problems(value[key], inner, inside)
            if len(problems) >= _MOST_SHOWN:
                break
    elif not isinstance(value, shape) or isinstance(value, bool):
        kinds = shape if isinstance(shape, tuple) else (shape,)
        problems.append(
            f"{name or 'the whole'!r} is not of type {' or '.join(_WORDS[kind] for kind in kinds)}"
        )
    return problems


_WORDS: Final = {
    str: "text",
    int: "whole number",
    float: "number",
    dict: "object",
    list: "list",
    bool: "bool",
}
