"""onnxruntime sessions for one served graph, on the execution provider that was asked for or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from jaxtyping import UInt8

from cbpt_runtime.artifacts.names import readable, utf8_path
from cbpt_runtime.errors import ConfigError, ExportError, OutputError
from cbpt_runtime.export.cpus import usable_cpus
from cbpt_runtime.export.onnx import INPUT
from cbpt_runtime.export.profiles import Provider as Provider
from cbpt_runtime.export.weights import written
from cbpt_runtime.runtime.prediction import OUTPUTS, Prediction, prediction_of
from cbpt_runtime.runtime.second_look import look_again

PROVIDERS: dict[Provider, tuple[str, dict[str, str]]] = {
    "cpu": ("CPUExecutionProvider", {}),
    "cuda": ("CUDAExecutionProvider", {"use_tf32": "0"}),
    "tensorrt": ("TensorrtExecutionProvider", {}),
}


def open_session(
    model: bytes | str | onnx.ModelProto, provider: Provider = "cpu", *, threads: int | None = None
) -> onnxruntime.InferenceSession:
    """Open a graph.

    Args:
        model: The file's content or path, or the graph itself.
        provider: Where it must run.
        threads: Of one operator; all usable CPUs when None.

    Raises:
        ConfigError: This machine or this build of onnxruntime does not have the provider.
        ExportError: onnxruntime refuses the graph.
    """
    name, options = PROVIDERS[provider]
    if name not in onnxruntime.get_available_providers():
        raise _provider_missing(provider, onnxruntime.get_available_providers())
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads or usable_cpus()
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    try:
        with _source(model) as source:
            session = onnxruntime.InferenceSession(source, settings, providers=[(name, options)])
    except OutputError:
        raise
    except Exception as error:  # onnxruntime raises classes of its own that share no public base
        raise ExportError(
            expected="a graph onnxruntime can open",
            got=f"{type(error).__name__}: {' '.join(str(error).split()):.300}",
            fix="Export the bundle again, with the package versions of constraints.txt.",
        ) from error
    if session.get_providers()[0] != name:  # onnxruntime falls back to the CPU without an error
        raise _provider_missing(provider, session.get_providers())
    return session


@contextmanager
def _source(model: bytes | str | onnx.ModelProto) -> Iterator[bytes | str]:
    """Give what onnxruntime takes: content, or a path in UTF-8 whose folder also has the weights."""
    if isinstance(model, onnx.ModelProto):
        with written(model) as source:
            yield source
    elif isinstance(model, bytes):
        yield model
    elif (path := Path(model)).name != readable(path.name):  # nobody can have weights beside such a graph
        with utf8_path(path) as name:
            yield name
    else:
        with utf8_path(path.parent) as folder:
            yield f"{folder}/{path.name}"


def run_session(
    session: onnxruntime.InferenceSession,
    images: UInt8[np.ndarray, "batch height width 3"],
    *,
    batch_size: int,
    outputs: Sequence[str] | None = None,
) -> dict[str, np.ndarray]:
    """Return the outputs for many images, computed `batch_size` at a time; the last batch may be smaller."""
    names = [output.name for output in session.get_outputs()] if outputs is None else list(outputs)
    batches: list[list[Any]] = [
        session.run(names, {INPUT: images[start : start + batch_size]})
        for start in range(0, len(images), batch_size)
    ]
    return {
        name: np.concatenate(parts) for name, parts in zip(names, zip(*batches, strict=True), strict=True)
    }


def predict(
    session: onnxruntime.InferenceSession,
    images: UInt8[np.ndarray, "batch height width 3"],
    *,
    batch_size: int,
    threshold: float | None,
) -> Prediction:
    """Ask a graph of `export`; suspicious are images whose alarm lies above a level."""
    return prediction_of(run_session(session, images, batch_size=batch_size, outputs=OUTPUTS), threshold)


def look_twice(
    session: onnxruntime.InferenceSession,
    images: UInt8[np.ndarray, "batch height width 3"],
    said: Prediction,
    *,
    threshold: float,
    suspects: Sequence[int],
    sigmoid: bool,
    max_batch: int,
) -> Prediction:
    """Return what comes of a second look at those images that a graph called suspicious, as of a server.

    Args:
        session: The graph.
        images: RGB at the model's own size.
        said: What it said of them at the first look.
        threshold: Level of the alarm above which an image is suspicious, in [0, 1].
        suspects: Class indices of the suspected targets.
        sigmoid: Whether each class has a probability of its own.
        max_batch: Most views looked at at once.
    """
    look = partial(predict, session, batch_size=max_batch, threshold=threshold)
    return look_again(images, said, look, suspects, threshold=threshold, sigmoid=sigmoid)


def _provider_missing(provider: Provider, there: Sequence[str]) -> ConfigError:
    return ConfigError(
        expected=f"{PROVIDERS[provider][0]}, which the profile asks for",
        got=f"an onnxruntime that runs on {', '.join(there)}",
        fix="Run where it is installed (onnxruntime-gpu and a GPU), or export with --profile cpu: configs/ "
        " holds the other targets, and `verify --provider` checks them where they will serve.",
    )
