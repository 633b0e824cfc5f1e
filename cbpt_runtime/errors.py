"""Every error a user can meet, and the exit code the command line gives it.

    CbptError                    exit 1
    ├── InputError               exit 2   wrong usage or bad input
    │   ├── CheckpointError               the suspect checkpoint
    │   ├── ClassListError                the class list
    │   ├── ImageDataError                an image or an image folder
    │   ├── ConfigError                   a configuration value or file
    │   ├── BundleError                   a bundle that is damaged or not a bundle
    │   ├── RepositoryError               a model repository that is damaged or not one
    │   ├── TrustError                    an artefact that is not the trusted one
    │   ├── RequestError                  a request a server refused
    │   └── OutputError                   an output path that cannot be written
    └── WorkError                exit 1   the input was fine, the work failed
        ├── PurificationError             purification did not reach a result
        ├── ImplantError                  a red-team implant did not take
        ├── ExportError                   export or its parity gate failed
        ├── LabelError                    a batch of images was not labelled
        └── ServingError                  a server did not start, did not answer, or answered wrongly

The text of an error has three parts: what was expected, what came, what to do.
"""

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


class CheckpointError(InputError):
    """The suspect checkpoint cannot be used."""


class ClassListError(InputError):
    """The class list cannot be used."""


class ImageDataError(InputError):
    """An image or an image folder cannot be used."""


class ConfigError(InputError):
    """A configuration value or file cannot be used."""


class BundleError(InputError):
    """A folder is not a bundle, or its content does not match its manifest."""


class RepositoryError(InputError):
    """A folder is not a model repository, or its content does not match its manifest."""


class TrustError(InputError):
    """A bundle or model repository without the signature or digest that was asked for."""


class RequestError(InputError):
    """A server refused a request; asking again would not help."""


class OutputError(InputError):
    """An output path exists already, or cannot be written."""


class WorkError(CbptError):
    """The input was fine, the work failed."""


class PurificationError(WorkError):
    """Purification did not reach a usable result."""


class ImplantError(WorkError):
    """A red-team implant did not take."""


class ExportError(WorkError):
    """Export, or the parity gate after it, failed."""


class LabelError(WorkError):
    """Batch classification did not get a row for every image."""


class ServingError(WorkError):
    """A server did not start, did not answer in time, or answered wrongly."""
