"""What was measured on: hardware, what of it may be used, and versions."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

from cbpt_runtime.export.cpus import instructions, read_cpuinfo, usable_cpus

_PACKAGES = ("cbpt-runtime", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "open_clip_torch", "pillow",
             "torch", "tritonclient")  # fmt: skip
COMPARED = ("processor", "instructions", "usable_cpus", "gpus")  # what makes two machines the same


def describe_machine() -> dict[str, Any]:
    """Processor, instructions that matter, cores and affinity, memory, GPUs, load and system."""
    return {
        "processor": _processor(read_cpuinfo()),
        "instructions": instructions(),
        "cpus": os.cpu_count(),
        "affinity": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "usable_cpus": usable_cpus(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": _gpus(),
        "load_average_before": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def describe_versions() -> dict[str, str]:
    """Installed packages whose version matters for speed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor(cpuinfo: dict[str, str]) -> str:
    """Name, family and model: virtual machines often hide the rest of the name."""
    name = cpuinfo.get("model name") or platform.processor() or platform.machine()
    family = [f"{key} {cpuinfo[key]}" for key in ("cpu family", "model", "stepping") if key in cpuinfo]
    return f"{name} ({', '.join(family)})" if family else name


def _gpus() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
