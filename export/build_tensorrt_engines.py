"""Build and cache the TensorRT engines of a repository before the first request does. NEEDS A GPU.

    python export/build_tensorrt_engines.py REPOSITORY --cache DIR

Uses the shape profile of configs/tensorrt.pbtxt, checks that TensorRT really ran, and compares the golden
answers. Give the cache folder to the server (tensorrt_cache in the profile). Engines fit only the GPU model
and the TensorRT version they were built with.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import onnxruntime

from cbpt_runtime.export.golden import read_golden
from cbpt_runtime.export.manifest import read_repository
from cbpt_runtime.export.session import run_session
from cbpt_runtime.export.triton import parse_config

PROVIDER = "TensorrtExecutionProvider"


def main() -> None:
    """Build, check the provider, compare the golden answers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("repository", type=Path)
    parser.add_argument("--cache", type=Path, required=True)
    arguments = parser.parse_args()

    if PROVIDER not in onnxruntime.get_available_providers():
        parser.error(f"this onnxruntime has no {PROVIDER}; install onnxruntime-gpu and TensorRT")
    repository = read_repository(arguments.repository)
    config = parse_config((repository.graph.parents[1] / "configs" / "tensorrt.pbtxt").read_text())
    wanted = config.optimization.execution_accelerators.gpu_execution_accelerator[0].parameters
    options = {key: value for key, value in wanted.items() if key.startswith("trt_profile")}
    options |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(arguments.cache)}
    arguments.cache.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    session = onnxruntime.InferenceSession(str(repository.graph), providers=[(PROVIDER, options)])
    if session.get_providers()[0] != PROVIDER:
        parser.error(f"onnxruntime fell back to {session.get_providers()[0]}")
    golden = read_golden(repository.golden)
    pixels = golden.pixels(repository.manifest.preprocess)
    outputs = run_session(session, pixels, batch_size=len(pixels))
    difference = golden.check(outputs, where=str(arguments.repository)).largest_difference
    print(f"built in {time.perf_counter() - start:.0f} s; golden answers within {difference:.2g}")


if __name__ == "__main__":
    main()
