"""Finished stages of a purification, kept on disk so that an interrupted run can be resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cbpt_runtime.artifacts.names import utf8_path


class StageStore:
    """A folder with one safetensors file per finished stage.

    Args:
        folder: Made on the first save.
        fingerprint: Of everything the stages depend on; stages of another run are not loaded.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._folder = folder
        self._fingerprint = fingerprint

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and JSON values of a finished stage; None when it has to run."""
        try:
            with (
                utf8_path(self._folder / f"{name}.safetensors") as path,
                safe_open(path, "pt") as file,
            ):
                metadata = file.metadata()
                if metadata.get("fingerprint") != self._fingerprint:
                    return None
                return {key: file.get_tensor(key) for key in file.keys()}, json.loads(metadata["values"])  # noqa: SIM118
        except (FileNotFoundError, SafetensorError):
            return None

    def save(self, name: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Keep a finished stage; whole or not at all."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{name}.safetensors"
        partial = path.with_suffix(".tmp")
        metadata = {"fingerprint": self._fingerprint, "values": json.dumps(values)}
        data = save({key: _own(tensor) for key, tensor in tensors.items()}, metadata)
        partial.write_bytes(data)  # not save_file: a full disk is then an OSError
        partial.replace(path)


def _own(tensor: Tensor) -> Tensor:
    """On the CPU, and sharing no memory with another, which a file may not."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
