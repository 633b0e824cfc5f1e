"""Entry point of the command line: runs the verb, and turns errors into text and exit codes."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from cbpt_runtime.artifacts.names import PLAINER
from cbpt_runtime.cli.app import app
from cbpt_runtime.cli.output import print_error
from cbpt_runtime.errors import CbptError


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    0 done, 1 the work failed, 2 wrong usage or bad input, 3 `scan` found a backdoor, 130 Ctrl-C.
    """
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a letter is no reason to fail
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=PLAINER)
    try:
        app(args=arguments, prog_name="cbpt-runtime")
    except CbptError as error:
        print_error(error)
        sys.exit(error.exit_code)
    sys.exit(0)


def _terminate(number: int, _frame: object) -> NoReturn:
    """Leave through the clean-up code, as Ctrl-C does, with the exit code a shell reports for the signal."""
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
