"""What an interrupted training needs to go on after its last whole epoch, as safetensors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from cbpt_runtime.artifacts.names import utf8_path

STATE_NAME = "training-state.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochStore:
    """A folder that keeps the state after the last whole epoch.

    Args:
        folder: Made when first needed.
        fingerprint: Identifies the run; a state of another run is not used.
    """

    folder: Path
    fingerprint: str

    def save(
        self, epoch: int, model: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator
    ) -> None:
        """Replace the stored state by the present one."""
        tensors = {f"model/{key}": value for key, value in model.state_dict().items()}
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{key}": value for key, value in state.items()}
        tensors["generator"] = generator.get_state()
        plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        metadata = {"epoch": json.dumps(epoch), "fingerprint": self.fingerprint}
        # Not save_file, whose files only their owner may read.
        (self.folder / f"{STATE_NAME}.new").write_bytes(save(plain, metadata=metadata))
        (self.folder / f"{STATE_NAME}.new").replace(self.folder / STATE_NAME)

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> int:
        """Put the stored state in place; returns the finished epochs, 0 when nothing usable is stored."""
        try:
            with (
                utf8_path(self.folder / STATE_NAME) as name,
                safe_open(name, framework="pt") as file,
            ):
                metadata = file.metadata() or {}
                if metadata.get("fingerprint") != self.fingerprint:
                    return 0
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return 0
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer/"):
                _, index, name = key.split("/")
                state.setdefault(int(index), {})[name] = value
        weights = {
            key.removeprefix("model/"): value for key, value in tensors.items() if key.startswith("model/")
        }
        model.load_state_dict(weights)
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        generator.set_state(tensors["generator"])
        return int(metadata["epoch"])
