"""One exported repository of the tiny bundle."""

from __future__ import annotations

from pathlib import Path

import pytest

from cbpt_runtime.bundle import Bundle
from cbpt_runtime.export.profiles import Profile
from cbpt_runtime.export.repository import export_bundle


@pytest.fixture(scope="session")
def tiny_served(
    tiny_bundle: Bundle, tiny_image_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A repository of the tiny bundle. Read only."""
    output = tmp_path_factory.mktemp("bench") / "repository"
    profile = Profile(max_batch=8, threads=1)
    export_bundle(tiny_bundle, output, name="shapes", profile=profile, calibration=tiny_image_folder)
    return output
