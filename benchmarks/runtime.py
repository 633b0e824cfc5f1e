"""How fast is the classifier in one process, against itself with a plain head and against its peers?

    python benchmarks/runtime.py --images PHOTOS
    python benchmarks/runtime.py --images PHOTOS --only towers --towers ViT-B-32
    python benchmarks/runtime.py --images PHOTOS --threads 1 --clock processor

PHOTOS is a folder of full-size JPEGs. Image towers have random weights: speed does not depend on them, and
accuracy is not measured here. Whatever is compared takes turns in one process; a figure is the median of
five rounds, a ratio the median of the rounds' ratios. Everyone's answers are compared with eager PyTorch's
before the clock runs. Parts and towers already in the results file are kept, so that they can be measured
one by one; the tables of benchmarks/runtime.md are written anew at the end. torch.compile needs a C++
compiler; OpenVINO is left out where it is not installed.

On a machine that others use, too, wall-clock times compare who waits worse. There, `--threads 1 --clock
processor` compares the processor time of one thread, which other programs hardly change.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from PIL import Image
from tables import write_tables

from cbpt_runtime.bench.results import describe_machine, describe_versions
from cbpt_runtime.bench.scenarios import plain_head, with_classes
from cbpt_runtime.classification.bundled import BundleClassifier
from cbpt_runtime.export.cpus import usable_cpus
from cbpt_runtime.export.graph import ServedClassifier, export_onnx
from cbpt_runtime.export.images import draw_gate_images
from cbpt_runtime.export.precision import find_layers, make_quantiser
from cbpt_runtime.export.session import open_session
from cbpt_runtime.export.weights import to_bytes
from cbpt_runtime.runtime.preprocess import Preprocess, decode_image, to_pixels
from export import random_bundle

RESULTS = Path(__file__).parent / "results" / "runtime.json"
PARTS = ("gemm", "head", "towers", "int8", "preprocessing", "classes")
TOWERS = ("ViT-B-32", "RN50")
ROUNDS = 5
HEAD_BATCHES, TOWER_BATCHES = (1, 32), (1, 16)
CLASSES = 1000
CLASS_COUNTS = (10, 100, 1000, 5000, 10000, 20000)
SECONDS = 1.5  # a contestant's share of a round, roughly
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
Contestants = dict[str, Callable[[np.ndarray], np.ndarray]]


def main() -> None:
    """Measure what is asked for and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--towers", nargs="+", default=list(TOWERS))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--threads", type=int, default=usable_cpus())
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {}
    found |= {"machine": describe_machine(), "versions": describe_versions() | optional_versions()}
    for part in options.only:
        for name, result in measure(part, options):
            result |= {"threads": options.threads, "clock": options.clock}
            result["load_average"] = round(os.getloadavg()[0], 2)
            found.setdefault(part, {})[name] = result
            print(part, name, json.dumps({key: value for key, value in result.items() if key != "rounds"}))
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(found, indent=1) + "\n")
    if options.output == RESULTS:
        write_tables()


def measure(part: str, options: argparse.Namespace) -> Any:
    """One part, tower by tower where it is about towers: pairs of a name and a result."""
    if part == "gemm":
        yield "float32", measure_gemm(Timing.of(options))
    elif part == "preprocessing":
        yield "photographs", measure_preprocessing(options.images, Timing.of(options))
    else:
        work = {
            "head": measure_head,
            "towers": measure_tower,
            "int8": measure_int8,
            "classes": measure_classes,
        }
        for name in options.towers:
            with tempfile.TemporaryDirectory() as scratch:
                yield name, work[part](name, Path(scratch), Timing.of(options))


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Threads of every contestant, and the clock."""

    threads: int
    clock: Callable[[], float]

    @classmethod
    def of(cls, options: argparse.Namespace) -> Timing:
        """Return what the command line says."""
        return cls(threads=options.threads, clock=CLOCKS[options.clock])


def race(
    contestants: Contestants, given: np.ndarray, timing: Timing, *, seconds: float = SECONDS
) -> dict[str, Any]:
    """Medians of every round, in milliseconds; within a round all take turns, forwards and backwards."""
    names = list(contestants)
    probe = {}
    for name, run in contestants.items():
        run(given)
        start = timing.clock()
        run(given)
        probe[name] = timing.clock() - start
    turns = max(2, min(40, int(seconds / max(probe.values()) / 2)))
    rounds = []
    for _ in range(ROUNDS):
        spent: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(2 * turns):
            for name in names if turn % 2 else reversed(names):
                start = timing.clock()
                contestants[name](given)
                spent[name].append(1e3 * (timing.clock() - start))
        rounds.append({name: statistics.median(times) for name, times in spent.items()})
    return {
        "runs_per_round": 2 * turns,
        "rounds": rounds,
        "median_ms": {name: round(statistics.median(each[name] for each in rounds), 4) for name in names},
    }


def ratio(result: dict[str, Any], slow: str, fast: str) -> float:
    """How many times faster one is than another: the median of the rounds' ratios."""
    return round(statistics.median(each[slow] / each[fast] for each in result["rounds"]), 4)


def pixels(batch: int, size: tuple[int, int]) -> np.ndarray:
    """Random images at a model's size."""
    return np.random.default_rng(0).integers(0, 256, (batch, *size, 3), dtype=np.uint8)


def agree(contestants: Contestants, given: np.ndarray, tolerance: float = 2e-3) -> dict[str, float]:
    """Largest differences to the first contestant; stops where one is no rounding."""
    runs = iter(contestants.items())
    _, first = next(runs)
    expected = first(given)
    differences = {name: float(np.abs(run(given) - expected).max()) for name, run in runs}
    if max(differences.values(), default=0.0) > tolerance:
        raise SystemExit(f"answers differ: {differences}")
    return differences


def measure_head(name: str, scratch: Path, timing: Timing) -> dict[str, Any]:
    """Return the graph with both heads and the alarm against the same graph with the plain zero-shot head."""
    bundle = random_bundle(name, scratch / "bundle")
    model = with_classes(export_onnx(BundleClassifier.from_bundle(bundle)), CLASSES)
    contestants = {
        "purified, with alarm": onnx_run(to_bytes(model), timing, ("logits", "alarm")),
        "plain head": onnx_run(to_bytes(plain_head(model)), timing, ("logits",)),
    }
    found: dict[str, Any] = {"classes": CLASSES}
    for batch in HEAD_BATCHES:
        given = pixels(batch, bundle.preprocess.image_size)
        agree(contestants, given[:2])
        result = race(contestants, given, timing, seconds=3)
        found[f"batch_{batch}"] = result | {"ratio": ratio(result, "purified, with alarm", "plain head")}
    return found


def onnx_run(
    content: bytes, timing: Timing, outputs: tuple[str, ...] = ("logits",)
) -> Callable[[np.ndarray], np.ndarray]:
    """Return a graph as `cbpt-runtime` opens it; all outputs are computed, the first is given."""
    session = open_session(content, threads=timing.threads)
    return lambda given: np.asarray(session.run(list(outputs), {"images": given})[0])


def measure_tower(name: str, scratch: Path, timing: Timing) -> dict[str, Any]:
    """Our graph against eager PyTorch, torch.compile, a plain export in onnxruntime, and OpenVINO."""
    bundle = random_bundle(name, scratch / "bundle")
    classifier = BundleClassifier.from_bundle(bundle)
    content = to_bytes(export_onnx(classifier))
    plain = PlainZeroShot(ServedClassifier(bundle, classifier.image_encoder)).eval()
    contestants: Contestants = {
        "open_clip eager": lambda given: plain_run(plain, given),
        "cbpt-runtime": onnx_run(content, timing, ("logits", "alarm")),
        "onnxruntime, plain export": plain_export(plain, bundle.preprocess.image_size, timing),
    }
    compiled = torch.compile(plain)
    contestants["torch.compile"] = lambda given: plain_run(compiled, given)
    openvino = openvino_run(content, timing)
    if openvino is not None:
        contestants["OpenVINO"] = openvino
    found: dict[str, Any] = {"flops_per_image": count_flops(plain, bundle.preprocess.image_size)}
    for batch in TOWER_BATCHES:
        given = pixels(batch, bundle.preprocess.image_size)
        differences = agree(contestants, given)
        result = race(contestants, given, timing)
        peers = [peer for peer in contestants if peer not in ("cbpt-runtime", "open_clip eager")]
        best = min(peers, key=lambda peer: result["median_ms"][peer])
        gflops = batch * found["flops_per_image"] / result["median_ms"]["cbpt-runtime"] / 1e6
        found[f"batch_{batch}"] = result | {
            "against_eager": ratio(result, "open_clip eager", "cbpt-runtime"),
            "best_peer": best,
            "against_best_peer": ratio(result, best, "cbpt-runtime"),
            "gflops_per_s": round(gflops, 1),
            "largest_differences": differences,
        }
    found["operators_at_batch_16"] = operator_shares(
        content, timing, pixels(16, bundle.preprocess.image_size)
    )
    return found


class PlainZeroShot(torch.nn.Module):
    """What anybody would write with open_clip: normalised pixels, image tower, unit features, one head."""

    def __init__(self, served: Any) -> None:
        super().__init__()
        self.tower, self.scale = served.tower, served.logit_scale
        self.mean, self.std, self.head = served.mean, served.std, served.class_embeddings

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of normalised float pixels [batch, 3, height, width]."""
        features = torch.nn.functional.normalize(self.tower(images), dim=-1)
        return self.scale * features @ self.head


def normalised(plain: Any, given: np.ndarray) -> torch.Tensor:
    """uint8 images as open_clip's transform leaves them."""
    return (torch.from_numpy(given).permute(0, 3, 1, 2).float() / 255 - plain.mean) / plain.std


def plain_run(plain: Any, given: np.ndarray) -> np.ndarray:
    """Return the module on uint8 images."""
    with torch.inference_mode():
        return plain(normalised(plain, given)).numpy()


def plain_export(
    plain: PlainZeroShot, size: tuple[int, int], timing: Timing
) -> Callable[[np.ndarray], np.ndarray]:
    """torch.onnx.export and InferenceSession with nothing set but the number of threads."""
    example = torch.zeros(2, 3, *size)
    dynamic = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.onnx.export(plain, (example,), dynamo=True, dynamic_shapes=dynamic, verbose=False)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = timing.threads
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda given: np.asarray(session.run(None, {name: normalised(plain, given).numpy()})[0])


def openvino_run(content: bytes, timing: Timing) -> Callable[[np.ndarray], np.ndarray] | None:
    """Our graph in OpenVINO, float32; None where it is not installed."""
    try:
        import openvino
    except ImportError:
        return None
    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": timing.threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    model = core.read_model(io.BytesIO(content))
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    return lambda given: np.asarray(request.infer({0: given})["logits"])


def count_flops(plain: PlainZeroShot, size: tuple[int, int]) -> int:
    """Multiplications and additions of one image, as PyTorch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # whose products the counter does not see
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            plain(torch.zeros(1, 3, *size))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops())


def operator_shares(content: bytes, timing: Timing, given: np.ndarray, *, runs: int = 6) -> dict[str, float]:
    """Share of the time by operator; of every node the fastest of several runs counts."""
    with tempfile.TemporaryDirectory() as folder:
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = timing.threads
        settings.enable_profiling = True
        settings.profile_file_prefix = f"{folder}/profile"
        session = onnxruntime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])
        for _ in range(runs):
            session.run(["logits", "alarm"], {"images": given})
        events = json.loads(Path(session.end_profiling()).read_text())
    fastest: dict[str, tuple[float, str]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            known = fastest.get(event["name"], (float("inf"), ""))
            fastest[event["name"]] = min(known, (event["dur"], event["args"]["op_name"]))
    by_operator: dict[str, float] = defaultdict(float)
    for duration, operator in fastest.values():
        by_operator[operator] += duration
    total = sum(by_operator.values())
    ranked = sorted(by_operator.items(), key=lambda item: -item[1])[:10]
    return {operator: round(duration / total, 4) for operator, duration in ranked}


def measure_gemm(timing: Timing) -> dict[str, Any]:
    """Matrix products per second, the largest rate of several sizes, in PyTorch and in onnxruntime."""
    best: dict[str, float] = {"torch": 0.0, "onnxruntime": 0.0}
    for rows, inner, columns in ((800, 768, 3072), (2048, 2048, 2048), (3136, 768, 3072)):
        left = np.random.default_rng(0).standard_normal((rows, inner)).astype(np.float32)
        right = np.random.default_rng(1).standard_normal((inner, columns)).astype(np.float32)
        session = open_session(product(right, rows), threads=timing.threads)
        tensors = torch.from_numpy(left), torch.from_numpy(right)
        result = race(
            {
                "torch": lambda _, pair=tensors: (pair[0] @ pair[1]).numpy(),
                "onnxruntime": lambda given, run=session.run: np.asarray(run(None, {"left": given})[0]),
            },
            left,
            timing,
            seconds=1,
        )
        for name in best:
            fastest = min(each[name] for each in result["rounds"])
            best[name] = max(best[name], round(2 * rows * inner * columns / fastest / 1e6, 1))
    return {"gflops_per_s": best}


def product(right: np.ndarray, rows: int) -> bytes:
    """Return a graph that multiplies with a constant matrix."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["left", "right"], ["product"])],
        "product",
        [helper.make_tensor_value_info("left", kind, [rows, right.shape[0]])],
        [helper.make_tensor_value_info("product", kind, [rows, right.shape[1]])],
        [onnx.numpy_helper.from_array(right, "right")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return bytes(model.SerializeToString())


def measure_int8(name: str, scratch: Path, timing: Timing) -> dict[str, Any]:
    """int8 against float32 in onnxruntime; what it costs in accuracy is measured by benchmarks/export.py."""
    bundle = random_bundle(name, scratch / "bundle")
    model = export_onnx(BundleClassifier.from_bundle(bundle))
    quantised = make_quantiser(model, draw_gate_images(bundle).pixels)(find_layers(model))
    contestants = {"fp32": onnx_run(to_bytes(model), timing), "int8": onnx_run(to_bytes(quantised), timing)}
    found: dict[str, Any] = {"size_ratio": round(quantised.ByteSize() / model.ByteSize(), 3)}
    for batch in TOWER_BATCHES:
        result = race(contestants, pixels(batch, bundle.preprocess.image_size), timing)
        found[f"batch_{batch}"] = result | {"ratio": ratio(result, "fp32", "int8")}
    return found


def measure_preprocessing(folder: Path, timing: Timing) -> dict[str, Any]:
    """Bytes to the model's pixels: ours, and open_clip's transform with and without its floats."""
    from open_clip.transform import image_transform

    files = [
        path.read_bytes() for path in sorted(folder.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg")
    ]
    if not files:
        raise SystemExit(f"no JPEGs in {folder}")
    preprocess = Preprocess(image_size=(224, 224))
    transform = image_transform(224, is_train=False)
    geometry = transform.transforms[:2]  # resize and centre crop

    def open_clip_geometry(file: bytes) -> np.ndarray:
        image = Image.open(io.BytesIO(file)).convert("RGB")
        for step in geometry:
            image = step(image)
        return np.array(image)

    def all_of(one: Callable[[bytes], Any]) -> Callable[[np.ndarray], np.ndarray]:
        return lambda _: np.array([one(file).shape[0] for file in files])

    for file in files:
        if not (to_pixels(decode_image(file), preprocess) == open_clip_geometry(file)).all():
            raise SystemExit("pixels differ from open_clip's")
    result = race(
        {
            "cbpt-runtime": all_of(lambda file: to_pixels(decode_image(file), preprocess)),
            "open_clip transform": all_of(lambda file: transform(Image.open(io.BytesIO(file)))),
            "open_clip without its floats": all_of(open_clip_geometry),
            "decode alone": all_of(lambda file: np.array(Image.open(io.BytesIO(file)).convert("RGB"))),
        },
        np.zeros(0),
        timing,
    )
    per_image = {name: round(value / len(files), 4) for name, value in result["median_ms"].items()}
    return result | {
        "files": len(files),
        "bytes_per_file": sum(map(len, files)) // len(files),
        "byte_identical": len(files),
        "ms_per_image": per_image,
        "against_open_clip": ratio(result, "open_clip transform", "cbpt-runtime"),
        "against_open_clip_without_floats": ratio(result, "open_clip without its floats", "cbpt-runtime"),
    }


def measure_classes(name: str, scratch: Path, timing: Timing) -> dict[str, Any]:
    """Latency at batch 1 and memory of the graph with heads of many sizes."""
    bundle = random_bundle(name, scratch / "bundle")
    model = export_onnx(BundleClassifier.from_bundle(bundle))
    contents = {count: to_bytes(with_classes(model, count)) for count in CLASS_COUNTS}
    contestants = {str(count): onnx_run(content, timing, ("logits", "probabilities", "alarm"))
                   for count, content in contents.items()}  # fmt: skip
    result = race(contestants, pixels(1, bundle.preprocess.image_size), timing)
    memory = {}
    for count, content in contents.items():
        path = scratch / f"{count}.onnx"
        path.write_bytes(content)
        memory[str(count)] = resident_bytes(path, bundle.preprocess.image_size)
    fewest = str(CLASS_COUNTS[0])
    shares = {str(count): round(1 - 1 / ratio(result, str(count), fewest), 4) for count in CLASS_COUNTS}
    return result | {"resident_bytes": memory, "head_share": shares}


def resident_bytes(path: Path, size: tuple[int, int]) -> int:
    """Most memory a fresh process held that loaded a graph and answered once."""
    code = (
        "import sys, numpy, onnxruntime as o; s = o.SessionOptions(); s.intra_op_num_threads = 1\n"
        "e = o.InferenceSession(sys.argv[1], s, providers=['CPUExecutionProvider'])\n"
        f"e.run(None, {{'images': numpy.zeros((1, {size[0]}, {size[1]}, 3), 'uint8')}})\n"
        "text = open('/proc/self/status').read(); print(1024 * int(text.split('VmHWM:')[1].split()[0]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    return int(done.stdout)


def optional_versions() -> dict[str, str]:
    """Peers that are no dependencies."""
    from importlib import metadata

    try:
        return {"openvino": metadata.version("openvino")}
    except metadata.PackageNotFoundError:
        return {}


if __name__ == "__main__":
    main()
