"""What tests of the operators' files share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import typer.main

from cbpt_runtime.cli.app import app


@pytest.fixture(scope="session")
def parse_serve() -> Callable[[Sequence[str]], dict[str, Any]]:
    """Returns a function that parses arguments as `cbpt-runtime serve` does; unknown flags fail."""
    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]

    def parse(arguments: Sequence[str]) -> dict[str, Any]:
        return dict(serve.make_context("serve", list(arguments)).params)

    return parse
