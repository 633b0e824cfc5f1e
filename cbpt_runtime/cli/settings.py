"""`--set KEY=VALUE`, and the trigger an attack's name or a file stands for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cbpt_runtime.redteam.triggers import Trigger


def named_trigger(attack: str, settings: list[str] | None) -> Trigger:
    """A trigger by the name of its attack, or from a file."""
    from cbpt_runtime.errors import ConfigError
    from cbpt_runtime.redteam.attacks import fixed_trigger
    from cbpt_runtime.redteam.learned import load_trigger

    path = Path(attack)
    if path.suffix != ".safetensors":
        return fixed_trigger(attack, parsed_settings(settings))
    if settings:
        raise ConfigError(
            expected="a trigger file as it is",
            got="--set with a file",
            fix="Leave --set away, or name an attack.",
        )
    return load_trigger(path)


def parsed_settings(settings: list[str] | None) -> dict[str, object]:
    """Parse KEY=VALUE; values are numbers, true, false, none, or text."""
    import json

    from cbpt_runtime.errors import ConfigError

    parsed: dict[str, object] = {}
    for setting in settings or []:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise ConfigError(expected="--set KEY=VALUE", got=setting, fix="For example --set size=8.")
        try:
            value: object = json.loads({"none": "null"}.get(text.lower(), text.lower()))
        except ValueError:
            value = text
        parsed[key] = value if isinstance(value, (bool, int, float, type(None))) else text
    return parsed
