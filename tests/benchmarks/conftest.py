"""The benchmarks' own modules, which are programs and no package."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="session")
def rivals() -> Iterator[Any]:
    """`benchmarks/rivals.py`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("rivals")


@pytest.fixture(scope="session")
def zoo() -> Iterator[Any]:
    """`benchmarks/zoo.py`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("zoo")
