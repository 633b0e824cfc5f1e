"""gRPC: messages that ask for an inference, spoiled, and what the guard says of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from random import Random
from typing import Any

from google.protobuf.message import DecodeError

from cbpt_runtime.errors import ConfigError
from cbpt_runtime.serving.guard.grpc_admission import INFER, refuse_message
from fuzzing import mutations
from fuzzing.surface import Input, Surface, require

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # grpc's own
    from tritonclient.grpc.service_pb2 import ModelInferRequest

_INNER = ("shapes_alarm",)
_SIZES = (1, 2, 32, 0, -1, 10**9 - 1, 10**9, 2**31, 2**63 - 1, -(2**63))
_NAMES = ("shapes", "shapes_alarm", "shapes/../shapes_alarm", "", "é", "a" * 300)
_KEYS = ("shared_memory_region", "shared_memory_byte_size", "priority", "sequence_id", "shared_memory")


class Messages(Surface):
    """What gRPC lets through to Triton, judged by protobuf's own parser."""

    name = "messages"
    formats = ("bytes", "fields")
    limit_mb = 128
    is_on_disk = False

    def make(self, rng: Random, form: str) -> Input:
        """Return a right request, other fields, or other bytes."""
        right: dict[str, Any] = {
            "model_name": "shapes",
            "inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, 4, 4, 3]}],
            "outputs": [{"name": "alarm"}],
            "raw_input_contents": [rng.randbytes(48)],
        }
        is_whole = rng.random() < 0.02
        if form == "fields" and not is_whole:
            key, number = rng.choice(_KEYS), rng.choice(_SIZES)
            parameters = {key: {"int64_param": number} if rng.random() < 0.5 else {"string_param": "x"}}
            for change in rng.sample(range(6), rng.randrange(1, 4)):
                match change:
                    case 0:
                        right["inputs"][0]["shape"] = [rng.choice(_SIZES) for _ in range(rng.randrange(6))]
                    case 1:
                        right["model_name"] = rng.choice(_NAMES)
                    case 2:
                        right["inputs"][0]["parameters"] = parameters
                    case 3:
                        right["outputs"][0]["parameters"] = parameters
                    case 4:
                        right["parameters"] = parameters
                    case _:
                        right["inputs"][0]["contents"] = {"uint_contents": [1] * rng.randrange(200)}
        message = ModelInferRequest(**right).SerializeToString()
        if form == "bytes" and not is_whole:
            message = mutations.spoil(rng, message)
        return Input(files={"message": message}, is_whole=is_whole)

    def run(self, made: Input, folder: Path) -> None:
        """Ask the guard, and hold what it lets in to its promises."""
        message = made.files["message"]
        assert isinstance(message, bytes)
        refusal = refuse_message(INFER, message, inner_models=_INNER)
        if refusal is not None:
            raise ConfigError(expected="a message to let in", got=refusal.text, fix="Send another one.")
        try:
            read = ModelInferRequest.FromString(message)
        except DecodeError:
            require(False, "what Triton cannot read is refused")
        require(read.model_name not in _INNER, "inner models are not asked")
        sizes = [size for tensor in read.inputs for size in tensor.shape]
        require(all(0 < size < 10**9 for size in sizes), "sizes that overflow or are none are refused")
        keyed = [read, *read.inputs, *read.outputs]
        keys = {key for one in keyed for key in one.parameters}
        require(not any(key.startswith("shared_memory") for key in keys), "shared memory is not named")
