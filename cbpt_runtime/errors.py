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

from cbpt_runtime.runtime.errors import CbptError as CbptError
from cbpt_runtime.runtime.errors import ConfigError as ConfigError
from cbpt_runtime.runtime.errors import ImageDataError as ImageDataError
from cbpt_runtime.runtime.errors import InputError as InputError


class CheckpointError(InputError):
    """The suspect checkpoint cannot be used."""


class ClassListError(InputError):
    """The class list cannot be used."""


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


def missing_extra(package: str, extra: str, error: ImportError) -> ConfigError:
    """Return the error for an optional package that is not installed.

    Args:
        package: The package, and what for.
        extra: The extra of this package that brings it.
        error: What the import raised.
    """
    return ConfigError(
        expected=package, got=str(error), fix=f"Install it with `pip install 'cbpt-runtime[{extra}]'`."
    )
