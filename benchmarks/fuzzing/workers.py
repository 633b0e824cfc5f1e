"""Readers in processes of their own, watched from outside: what they raise, how long, how much, what else.

A worker takes inputs one after the other and leaves their numbers in shared memory, so that the watcher knows
which one it was when the worker hangs, grows or dies. The next worker goes on behind it.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from cbpt_runtime.errors import CbptError
from fuzzing.surface import Input, Surface, write_files

INPUTS_PER_WORKER = 5_000
LONGEST_MESSAGE = 10_000
_POLL_S = 0.02
_GONE, _RECYCLED = 0, 3  # exit codes
_NUMBER, _STARTED, _COUNTS = 0, 1, 2  # places in shared memory
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_FORBIDDEN = (
    "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "pty.spawn",
    "subprocess.Popen", "socket.connect", "socket.getaddrinfo", "socket.bind", "ctypes.dlopen",
)  # fmt: skip
_CHANGES = (
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.symlink",
    "os.link",
    "os.chmod",
    "os.truncate",
)


@dataclass(slots=True, kw_only=True)
class Counts:
    """What became of the inputs of one format."""

    accepted: int = 0
    refused: int = 0


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What became of the inputs of one surface.

    Attributes:
        counts: By format.
        findings: `kind` (traceback, message, broken promise, side effect, stray file, memory, hang, crash),
            `surface`, `format`, `number` and `detail` of each.
        not_repeated: Hangs and memory that a second, lone run of the input did not show.
        seconds: In all.
    """

    counts: dict[str, Counts] = field(default_factory=dict)
    findings: list[dict[str, Any]] = field(default_factory=list)
    not_repeated: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


def make_input(surface: Surface, seed: int, number: int) -> Input:
    """Return the input of a number."""
    rng = Random(f"{seed} {surface.name} {number}")
    return surface.make(rng, surface.formats[number % len(surface.formats)])


def fuzz(surface: Surface, *, seed: int, inputs: int, scratch: Path) -> Outcome:
    """Give a surface its inputs.

    Args:
        surface: Loaded.
        seed: With the surface's name and the number of an input, all it depends on.
        inputs: How many.
        scratch: An empty folder.
    """
    start = time.perf_counter()
    outcome = _watch(surface, seed, range(inputs), scratch)
    outcome.seconds = round(time.perf_counter() - start, 1)
    doubtful = [found for found in outcome.findings if found["kind"] in ("hang", "memory")]
    for found in doubtful:
        again = _watch(surface, seed, range(found["number"], found["number"] + 1), scratch)
        if not again.findings:
            outcome.findings.remove(found)
            outcome.not_repeated.append(found)
    return outcome


def in_child(task: Any, *arguments: Any) -> None:
    """Call something in a process of its own.

    Raises:
        RuntimeError: It failed.
    """
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            task(*arguments)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError("whole inputs could not be made")


def _watch(surface: Surface, seed: int, numbers: range, scratch: Path) -> Outcome:
    """Start workers until all numbers are done."""
    outcome = Outcome()
    size = _COUNTS + 2 * len(surface.formats)
    with mmap.mmap(-1, size * 8) as memory, memoryview(memory).cast("q") as shared:
        log = scratch.parent / f"{scratch.name}.findings"
        log.touch()
        position = numbers.start
        while position < numbers.stop:
            shared[_NUMBER], shared[_STARTED] = position, 0
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            sys.stdout.flush()
            sys.stderr.flush()
            pid = os.fork()
            if pid == 0:
                _work(surface, seed, range(position, numbers.stop), scratch, log, shared)
            ended = _wait(pid, surface, shared)
            if ended is not None:
                kind, detail = ended
                outcome.findings.append(_finding(surface, shared[_NUMBER], kind, detail))
            position = shared[_NUMBER] + 1
        outcome.findings += [json.loads(line) for line in log.read_text().splitlines()]
        log.unlink()
        for index, form in enumerate(surface.formats):
            accepted, refused = shared[_COUNTS + 2 * index], shared[_COUNTS + 2 * index + 1]
            outcome.counts[form] = Counts(accepted=accepted, refused=refused)
    shutil.rmtree(scratch, ignore_errors=True)
    outcome.findings.sort(key=lambda found: found["number"])
    return outcome


def _wait(pid: int, surface: Surface, shared: memoryview) -> tuple[str, str] | None:
    """Wait for a worker, and end it where it hangs or grows; what it did wrong."""
    ended: tuple[str, str] | None = None
    before = _resident_mb(pid)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        started = shared[_STARTED]
        if started and time.monotonic_ns() - started > surface.limit_s * 1e9:
            ended = ("hang", f"more than {surface.limit_s:g} s")
        elif (grown := _resident_mb(pid) - before) > 4 * surface.limit_mb:
            ended = ("memory", f"{grown:,} MiB and growing")
        if ended:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return ended
        time.sleep(_POLL_S)
    if os.WIFSIGNALED(status):
        return "crash", signal.Signals(os.WTERMSIG(status)).name
    code = os.WEXITSTATUS(status)
    return None if code in (_GONE, _RECYCLED) else ("crash", f"exit code {code}")


def _work(surface: Surface, seed: int, numbers: range, scratch: Path, log: Path, shared: memoryview) -> None:
    """Live as a worker; does not return."""
    code = 1
    try:
        work, home = scratch / "work", scratch / "home"
        for folder in (work, home):
            folder.mkdir()
        os.chdir(work)
        os.environ |= {"HOME": str(home), "TMPDIR": str(home), "HF_HUB_OFFLINE": "1"}
        sys.dont_write_bytecode = True
        with log.open("a", encoding="utf-8") as out, Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
            guard = _Guard(scratch)
            limit_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + surface.limit_mb * 1024
            code = _GONE
            for number in numbers:
                shared[_NUMBER] = number
                for kind, detail in _try(surface, seed, number, scratch, guard, shared):
                    out.write(json.dumps(_finding(surface, number, kind, detail)) + "\n")
                    out.flush()
                used_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                if used_kb > limit_kb:
                    more = f"{(used_kb - limit_kb) // 1024 + surface.limit_mb:,} MiB more than before"
                    out.write(json.dumps(_finding(surface, number, "memory", more)) + "\n")
                if used_kb > limit_kb or number - numbers.start >= INPUTS_PER_WORKER:
                    code = _RECYCLED
                    break
    except BaseException:
        code = 1
        traceback.print_exc()
    finally:
        os._exit(code)


def _try(
    surface: Surface, seed: int, number: int, scratch: Path, guard: _Guard, shared: memoryview
) -> Iterator[tuple[str, str]]:
    """Give a reader one input; kind and detail of what it did wrong."""
    made = make_input(surface, seed, number)
    folder = scratch / "work" / "input"
    if surface.is_on_disk:
        write_files(made.files, folder)
    before = _listing(scratch)
    place = _COUNTS + 2 * (number % len(surface.formats))
    guard.seen.clear()
    shared[_STARTED] = time.monotonic_ns()
    guard.is_on = True
    try:
        surface.run(made, folder)
        shared[place] += 1
    except CbptError as error:
        shared[place + 1] += 1
        problem = _message_problem(error)
        if problem:
            yield "message", problem
        elif made.is_whole:
            yield "broken promise", f"a whole input was refused: {error!s:.500}"
    except BaseException as error:
        kind = "broken promise" if type(error).__name__ == "BrokenPromiseError" else "traceback"
        yield kind, _described(error)
    finally:
        guard.is_on = False
        shared[_STARTED] = 0
    if guard.seen:
        yield "side effect", "; ".join(sorted(set(guard.seen)))[:500]
    after = _listing(scratch)
    if changed := sorted(before ^ after):
        yield "stray file", "; ".join(f"{name} ({size})" for name, size, _ in changed)[:500]
    if surface.is_on_disk:
        shutil.rmtree(folder, ignore_errors=True)
    if changed:
        for path in (scratch / "work", scratch / "home"):
            shutil.rmtree(path)
            path.mkdir()
        os.chdir(scratch / "work")


class _Guard:
    """Notes what a reader of files has no business with: programs, the network, changes elsewhere."""

    def __init__(self, scratch: Path) -> None:
        self.is_on = False
        self.seen: list[str] = []
        self._inside = (f"{scratch}/", os.devnull)
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.is_on:
            return
        is_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES
        if event in _FORBIDDEN:
            self.seen.append(f"{event} {arguments!r:.200}")
        elif (is_write or event in _CHANGES) and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.path.abspath(os.fsdecode(arguments[0]))  # noqa: PTH100 (a name may be any bytes)
            if not path.startswith(self._inside):
                self.seen.append(f"{event} {path:.200}")


def _listing(folder: Path) -> set[tuple[str, int, int]]:
    """Name, size and time of whatever is below a folder."""
    found = set()
    for root, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = os.path.join(root, name)  # noqa: PTH118 (many thousand times a second)
            facts = os.lstat(path)
            is_folder = name in folders
            found.add(
                (
                    path[len(str(folder)) :],
                    0 if is_folder else facts.st_size,
                    0 if is_folder else facts.st_mtime_ns,
                )
            )
    return found


def _message_problem(error: CbptError) -> str | None:
    """Return what is missing in the text of an error."""
    parts = {"expected": error.expected, "got": error.got, "fix": error.fix}
    empty = [name for name, text in parts.items() if not isinstance(text, str) or not text.strip()]
    if empty:
        return f"nothing under {', '.join(empty)}: {error!s:.500}"
    return f"{len(str(error)):,} characters: {error!s:.200}" if len(str(error)) > LONGEST_MESSAGE else None


def _described(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))
    return f"{type(error).__name__}: {error!s:.300} ({where})"


def _finding(surface: Surface, number: int, kind: str, detail: str) -> dict[str, Any]:
    form = surface.formats[number % len(surface.formats)]
    return {"kind": kind, "surface": surface.name, "format": form, "number": number, "detail": detail}


def _resident_mb(pid: int) -> int:
    with contextlib.suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() >> 20
    return 0
