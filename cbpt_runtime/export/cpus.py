"""How many CPUs this process may really use, and which instructions they have."""

from __future__ import annotations

import os
import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# Those a numerical library chooses its kernels by, as Linux spells them.
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd",
                 "asimddp", "i8mm")  # fmt: skip


def usable_cpus() -> int:
    """CPUs this process may really use: the smaller of its affinity and its cgroup quota, at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:  # noqa: PTH123
            quota, period = file.read().split()
        allowed = min(allowed, int(quota) // int(period))
    except (OSError, ValueError):  # no cgroup v2, or the quota is 'max'
        pass
    return max(1, allowed)


def read_cpuinfo() -> dict[str, str]:
    """Return the first processor's entries of /proc/cpuinfo; empty where there is none."""
    try:
        text = CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def instructions() -> list[str]:
    """Return the instructions of this processor that numerical libraries choose their kernels by."""
    cpuinfo = read_cpuinfo()
    flags = set(cpuinfo.get("flags", cpuinfo.get("Features", "")).split())
    return [name for name in _INSTRUCTIONS if name in flags]


def kind_of_processor() -> str:
    """Architecture and `instructions`: the same text, the same kernels, hence the same answers."""
    return " ".join([platform.machine(), *instructions()])
