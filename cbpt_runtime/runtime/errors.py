"""The errors that code inside Triton raises, and their base; `cbpt_runtime.errors` has the whole tree."""

from __future__ import annotations

_LONGEST = 4_000  # characters


class CbptError(Exception):
    """Base of all errors raised on purpose; the text says expected, got and what to do.

    What a stranger's file calls itself may be blank or endless: blank text is quoted, long text cut.

    Args:
        expected: What would have been right.
        got: What was there instead.
        fix: What the user can do about it.
    """

    exit_code = 1

    def __init__(self, *, expected: str, got: str, fix: str) -> None:
        self.expected = _shown(expected)
        self.got = _shown(got)
        self.fix = fix
        super().__init__(f"expected {self.expected}; got {self.got}. {fix}")

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.expected, self.got, self.fix)


def _shown(text: str) -> str:
    if not text.strip():
        return repr(text)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " …"


def _rebuild(kind: type[CbptError], expected: str, got: str, fix: str) -> CbptError:
    return kind(expected=expected, got=got, fix=fix)


class InputError(CbptError):
    """Wrong usage or bad input."""

    exit_code = 2


class ImageDataError(InputError):
    """An image or an image folder cannot be used."""


class ConfigError(InputError):
    """A configuration value or file cannot be used."""
