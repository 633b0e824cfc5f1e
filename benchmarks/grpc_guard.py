"""What does the guard before Triton's gRPC cost?

    python benchmarks/grpc_guard.py model_repository/

Starts a real tritonserver and asks it through the public port, where the
guard listens, and, with the secret, on Triton's own port behind it, in turns: a question that needs no
model, one image at a time, then several at once. The requests come from a process of their own; the guard
lives in this one. Every answer is checked. Ratios are those of neighbouring runs, the figure is their median.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import subprocess
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from cbpt_runtime.bench.results import describe_machine, describe_versions
from cbpt_runtime.export.golden import read_golden
from cbpt_runtime.export.manifest import read_repository
from cbpt_runtime.serving import RunningServer, ServeConfig, running_server

INFER, READY = (f"/inference.GRPCInferenceService/{name}" for name in ("ModelInfer", "ServerReady"))
PARTS = ("question", "one_at_a_time", "at_once")
IS_READY = b"\x08\x01"
WARM_UP = 20


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("repository", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=200, help="of a run")
    parser.add_argument("--in-flight", type=int, default=8, help="requests at once in the second part")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/grpc-guard.json"))
    arguments = parser.parse_args()
    result = measure(arguments.repository, arguments.rounds, arguments.requests, arguments.in_flight)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: result[name] for name in PARTS}, indent=1))


def measure(path: Path, rounds: int, requests: int, in_flight: int) -> dict[str, Any]:
    """All of it, on one server."""
    about = {
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "machine": describe_machine(),
        "versions": describe_versions(),
    }
    with running_server(path, ServeConfig(http_port=0, grpc_port=0, metrics_port=0)) as server:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        sender = context.Process(target=send, args=(there, str(path)))
        sender.start()
        try:
            places = {"guarded": public(server), "unguarded": private(server)}
            parts = {
                name: compare(here, places, rounds, method, number, at_once)
                for name, method, number, at_once in zip(
                    PARTS,
                    (READY, INFER, INFER),
                    (5 * requests, requests, requests),
                    (1, 1, in_flight),
                    strict=True,
                )
            }
        finally:
            here.send(None)
            sender.join()
        about |= {"tritonserver": server.version, "placement": server.plan.placement.describe()}
    return {**parts, "in_flight": in_flight, "requests": requests, **about}


def public(server: RunningServer) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Where the guard listens, and what a request carries."""
    return server.config.grpc_url.removeprefix("grpc://"), ()


def private(server: RunningServer) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Where Triton listens, and what a request must carry."""
    return f"{server.endpoint.address}:{server.endpoint.grpc_port}", server.endpoint.metadata


def compare(
    sender: Connection, places: dict[str, Any], rounds: int, method: str, requests: int, in_flight: int
) -> dict[str, Any]:
    """Both in turns, who is first changing from round to round."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in places}
    for place in places.values():
        ask(sender, place, method, WARM_UP, in_flight)
    for number in range(rounds):
        for name in sorted(places, reverse=bool(number % 2)):
            found[name].append(ask(sender, places[name], method, requests, in_flight))
    result: dict[str, Any] = {"runs": found}
    for what in ("p50_ms", "requests_per_s"):
        ratios = [
            one[what] / other[what] for one, other in zip(found["guarded"], found["unguarded"], strict=True)
        ]
        result[what] = {
            name: round(statistics.median(run[what] for run in runs), 3) for name, runs in found.items()
        }
        result[what] |= {
            "ratio": round(statistics.median(ratios), 3),
            "ratios": [round(ratio, 3) for ratio in ratios],
        }
    return result


def ask(sender: Connection, place: Any, method: str, requests: int, in_flight: int) -> dict[str, float]:
    """One run of the process that sends."""
    sender.send((place, method, requests, in_flight))
    answer = sender.recv()
    if isinstance(answer, str):
        raise RuntimeError(answer)
    return answer


def send(connection: Connection, path: str) -> None:
    """Do what the other process does: run after run, until told to end."""
    repository = read_repository(path)
    golden = read_golden(repository.golden)
    messages = [message(repository.name, file) for file in golden.files]
    expected = [np.array(row["probabilities"]) for row in golden.answers["images"]]
    while (order := connection.recv()) is not None:
        try:
            connection.send(asyncio.run(run(*order, messages, expected, golden.answers["tolerance"])))
        except Exception as error:  # told to the one who waits
            connection.send(f"{type(error).__name__}: {error}")


def message(name: str, file: bytes) -> bytes:
    """Return a request for one image, as our client sends it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # grpc's own
        from tritonclient.grpc import service_pb2
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1, 1]}
    request = service_pb2.ModelInferRequest(
        model_name=name,
        inputs=[tensor],
        outputs=[{"name": "probabilities"}],
        raw_input_contents=[len(file).to_bytes(4, "little") + file],
    )
    return bytes(request.SerializeToString())


async def run(
    place: tuple[str, tuple[tuple[str, str], ...]],
    method: str,
    requests: int,
    in_flight: int,
    messages: list[bytes],
    expected: list[np.ndarray],
    tolerance: float,
) -> dict[str, float]:
    """Send requests and check their answers; the times of the whole and of one."""
    import grpc.aio

    address, metadata = place
    messages = messages if method == INFER else [b""]
    latencies_ms: list[float] = []
    numbers = iter(range(requests))
    answers: list[tuple[int, bytes]] = []
    async with grpc.aio.insecure_channel(address) as channel:
        infer = channel.unary_unary(method)
        await infer(messages[0], metadata=metadata, timeout=60)

        async def client() -> None:
            for number in numbers:
                start = time.perf_counter()
                answer = await infer(messages[number % len(messages)], metadata=metadata, timeout=60)
                latencies_ms.append(1000 * (time.perf_counter() - start))
                answers.append((number % len(messages), answer))

        start = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(in_flight)))
        seconds = time.perf_counter() - start
    for number, answer in answers:
        if method == INFER:
            check(answer, expected[number], tolerance)
        elif answer != IS_READY:
            raise RuntimeError("not ready")
    return {
        "requests_per_s": round(requests / seconds, 2),
        "p50_ms": round(statistics.median(latencies_ms), 3),
        "p99_ms": round(float(np.percentile(latencies_ms, 99)), 3),
    }


def check(answer: bytes, expected: np.ndarray, tolerance: float) -> None:
    """Raise where an answer is not the golden one."""
    from tritonclient.grpc import service_pb2

    (raw,) = service_pb2.ModelInferResponse.FromString(answer).raw_output_contents
    difference = float(np.abs(np.frombuffer(raw, np.float32) - expected).max())
    if difference > tolerance:
        raise RuntimeError(f"a wrong answer, off by {difference:.2g}")


if __name__ == "__main__":
    main()
