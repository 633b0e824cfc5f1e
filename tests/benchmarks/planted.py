"""A reader with every fault the fuzz program looks for, run by the program's own workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

from fuzzing.surface import Input, Surface, require
from fuzzing.workers import fuzz

from cbpt_runtime.errors import InputError

FAULTS = (
    "right", "refusal", "whole refused", "traceback", "exit", "empty message", "promise", "hang", "memory",
    "endless memory", "crash", "stray file", "stray home", "changed input", "program", "elsewhere",
    "right again",
)  # fmt: skip


class Broken(Surface):
    """Its formats are its faults."""

    name = "planted"
    formats = FAULTS
    limit_s = 2.0
    limit_mb = 64

    def __init__(self, elsewhere: Path) -> None:
        self.elsewhere = elsewhere

    def make(self, rng: Random, form: str) -> Input:
        return Input(files={"file": b"content"}, how=form, is_whole=form == "whole refused")

    def run(self, made: Input, folder: Path) -> None:
        kept: list[Any] = []
        match made.how:
            case "refusal" | "whole refused":
                raise InputError(expected="a", got="b", fix="c")
            case "traceback":
                raise KeyError("planted")
            case "exit":
                sys.exit(0)
            case "empty message":
                raise InputError(expected="a", got="b", fix="")
            case "promise":
                require(False, "planted")
            case "hang":
                time.sleep(60)
            case "memory":
                kept.append(b"x" * (150 << 20))
            case "endless memory":
                while True:
                    kept.append(b"x" * (8 << 20))
                    time.sleep(0.005)
            case "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "stray file":
                Path("left-behind").write_text("")
            case "stray home":
                (Path.home() / "left-behind").write_text("")
            case "changed input":
                (folder / "file").write_text("other content")
            case "program":
                subprocess.run(["/bin/true"], check=True)
            case "elsewhere":
                self.elsewhere.write_text("")


def main() -> None:
    folder = Path(sys.argv[1])
    surface = Broken(folder / "elsewhere")
    outcome = fuzz(surface, seed=0, inputs=len(FAULTS), scratch=folder / "scratch")
    print(json.dumps(asdict(outcome)))


if __name__ == "__main__":
    main()
