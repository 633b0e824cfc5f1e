"""Checks of the parameters an attack is given."""

from __future__ import annotations

from cbpt_runtime.errors import ConfigError


def check_choice(what: str, value: object, valid: tuple[str, ...]) -> None:
    """Raise ConfigError that lists the valid values unless this is one of them."""
    if value not in valid:
        raise ConfigError(expected=f"a valid {what}", got=repr(value), fix=f"Valid are: {', '.join(valid)}.")
