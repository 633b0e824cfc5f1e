"""The main module of a generator's process: `python -m cbpt_runtime.bench.sender DESCRIPTOR`."""

from __future__ import annotations

import sys
from multiprocessing.connection import Connection

from cbpt_runtime.bench.generator import work

if __name__ == "__main__":
    work(Connection(int(sys.argv[1])))
