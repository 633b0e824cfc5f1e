"""The golden images of a repository, asked through the wire before a server is called ready."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cbpt_runtime.errors import CbptError, ExportError, ServingError
from cbpt_runtime.export.golden import read_golden
from cbpt_runtime.export.manifest import Repository
from cbpt_runtime.models.preprocess import Preprocess
from cbpt_runtime.serving.blocking import Client
from cbpt_runtime.serving.config import ServeConfig

TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTest:
    """What the self-test saw, all of it right or, for int8 on another processor, near enough.

    Attributes:
        images: Golden images; each was sent as a file and as pixels, over HTTP and over gRPC.
        largest_difference: From the expected probabilities and alarms.
        note: What differs, when int8 was exported on another kind of processor and something does.
    """

    images: int
    largest_difference: float
    note: str | None


def run_selftest(repository: Repository, config: ServeConfig) -> SelfTest:
    """Ask a server for the golden answers: files and pixels, HTTP and gRPC.

    Where the repository was exported to look twice, files are looked at twice and pixels are not.

    Raises:
        ServingError: One is missing or wrong; the text says through which way.
    """
    golden = read_golden(repository.golden)
    pixels = golden.pixels(Preprocess.from_dict(repository.manifest["preprocess"]))
    largest, note = 0.0, None
    for url in (config.http_url, config.grpc_url):
        with Client(url, model=repository.name, timeout_s=TIMEOUT_S) as client:
            for kind in ("files", "pixels"):
                where = f"{url} ({kind})"
                try:
                    found = (
                        client.predict_files(golden.files)
                        if kind == "files"
                        else client.predict_pixels(np.ascontiguousarray(pixels))
                    )
                    checked = golden.check(found, where=where, made_on=repository.made_on)
                    largest, note = max(largest, checked.largest_difference), note or checked.note
                except ExportError as error:
                    raise ServingError(expected=error.expected, got=error.got, fix=error.fix) from error
                except CbptError as error:
                    raise ServingError(
                        expected=f"golden answers from {where}",
                        got=error.got,
                        fix="The server runs but does not answer as it should; it was stopped. "
                        "Check the repository with `cbpt-runtime verify`.",
                    ) from error
    return SelfTest(images=len(golden.files), largest_difference=largest, note=note)
