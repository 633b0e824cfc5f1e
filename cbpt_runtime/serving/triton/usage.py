"""What a server and everything it started use: processes, memory, open files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_GROUP_FIELD = 2  # of /proc/<pid>/stat after the name, which may hold spaces
_STATE_FIELD = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a process group uses.

    Attributes:
        pids: Its processes that live.
        memory_bytes: Their heaps, stacks and shared-memory regions, the latter counted once. Pages of program
            files are left out: what they cost depends on who else on the machine runs the same libraries.
        descriptors: Their open file descriptors.
    """

    pids: tuple[int, ...]
    memory_bytes: int
    descriptors: int


def group_usage(group: int) -> Usage:
    """What the process group of a number uses now; a process that ends meanwhile counts as zero."""
    pids = group_members(group)
    return Usage(
        pids=pids,
        memory_bytes=sum(map(_memory_bytes, pids)),
        descriptors=sum(map(_descriptors, pids)),
    )


def group_members(group: int) -> tuple[int, ...]:
    """Living processes of a process group, zombies left out."""
    found = []
    for entry in _PROC.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if fields and int(fields[_GROUP_FIELD]) == group and fields[_STATE_FIELD] not in "ZX":
            found.append(int(entry.name))
    return tuple(sorted(found))


def command_of(pid: int) -> str:
    """The command line of a process; empty when it has ended."""
    try:
        return (_PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
    except OSError:
        return ""


def _memory_bytes(pid: int) -> int:
    try:
        lines = (_PROC / str(pid) / "smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


def _descriptors(pid: int) -> int:
    try:
        return sum(1 for _ in (_PROC / str(pid) / "fd").iterdir())
    except OSError:
        return 0
