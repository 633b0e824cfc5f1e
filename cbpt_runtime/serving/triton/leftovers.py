"""Names of what a launcher puts on the machine, and the removal of what a killed one could not remove.

Triton's python backend puts paths into the command line of a shell. So every path it is given leads through
the launcher's own folder, whose name is plain, whatever the operator's folders are called.

A launcher that is killed takes its server along, which cleans up after itself. Only where all of them are
killed at once (the kernel is out of memory, a container is) folders and shared memory stay. Both bear the
process number of their launcher and, as in a container the next launcher has the same number, the
shared memory also bears a word made up anew in each process.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
from pathlib import Path

from cbpt_runtime.errors import ConfigError

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
_PROCESS = secrets.token_hex(4)
_PLAIN = re.compile(r"[A-Za-z0-9/][A-Za-z0-9._/+-]*")
_OTHER_FOLDERS = (Path("/tmp"), Path("/var/tmp"), SHARED_MEMORY)  # noqa: S108


def is_plain(path: Path) -> bool:
    """Whether a path means the same to a shell as to everybody else."""
    return _PLAIN.fullmatch(str(path)) is not None


def scratch_root() -> Path:
    """Where a launcher's temporary folder goes: the usual place, or where that has no plain name another.

    Raises:
        ConfigError: None of them can be used.
    """
    usual = Path(tempfile.gettempdir())
    for folder in (usual, *_OTHER_FOLDERS):
        if is_plain(folder) and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise ConfigError(
        expected="a folder for temporary files named with letters, digits and ._/+- only",
        got=str(usual),
        fix="Set TMPDIR to such a folder.",
    )


def scratch_prefix() -> str:
    """How the name of a launcher's temporary folder begins: a few links, never a model."""
    return f"cbpt-serve-{os.getpid()}-"


def region_prefix() -> str:
    """How the names of one server's shared-memory regions begin; another one at each call."""
    return f"cbpt_{os.getpid()}_{_PROCESS}_{secrets.token_hex(4)}_"


def sweep() -> None:
    """Remove this user's folders and shared memory that no living launcher owns."""
    for folder in scratch_root().glob("cbpt-serve-*"):
        found = re.match(r"cbpt-serve-(\d+)-", folder.name)
        if found and not _lives(found[1]) and _is_ours(folder):
            shutil.rmtree(folder, ignore_errors=True)
    for region in SHARED_MEMORY.glob("cbpt_*"):
        found = re.match(r"cbpt_(\d+)_([0-9a-f]{8})_", region.name)
        if found is None:
            continue
        is_predecessors = int(found[1]) == os.getpid() and found[2] != _PROCESS
        if (is_predecessors or not _lives(found[1])) and _is_ours(region):
            region.unlink(missing_ok=True)


def _lives(number: str) -> bool:
    try:
        stat = Path("/proc", number, "stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")  # in a container nobody may collect the dead


def _is_ours(path: Path) -> bool:
    try:
        return path.stat().st_uid == os.getuid()
    except OSError:  # somebody else was faster
        return False
