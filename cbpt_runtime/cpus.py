"""How many CPUs this process may really use."""

from __future__ import annotations

import os


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
