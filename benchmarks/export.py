"""Is the ONNX file the purified classifier, what do fp16 and int8 cost, and how much faster are they?

    python benchmarks/export.py --bundles BUNDLES --victims VICTIMS --images TINY_IMAGENET_100
    python benchmarks/export.py --towers RN50 ViT-B-32

BUNDLES holds one bundle per victim, with the name of the victim, as `cbpt-runtime purify` made it; VICTIMS
the victims with `attack.json` and triggered test images (a folder or zip `test-triggered`); TINY_IMAGENET_100
is a folder or zip with `val/<class>`. Every precision is exported through its gate, and the graph in the
repository answers all test images under onnxruntime. With --towers, the speed of full-size image towers with
random weights is measured: their accuracy means nothing, so none is given. The results file is written after
every bundle and tower, and the tables are printed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch

from cbpt_runtime.bundle import Bundle, BundleContent, Suspect, read_bundle, write_bundle
from cbpt_runtime.classification.bundled import BundleClassifier
from cbpt_runtime.errors import ExportError
from cbpt_runtime.evaluation import metrics
from cbpt_runtime.export.graph import export_onnx
from cbpt_runtime.export.images import draw_gate_images
from cbpt_runtime.export.manifest import read_repository
from cbpt_runtime.export.onnx import FEATURES, with_features
from cbpt_runtime.export.precision import find_layers, make_quantiser
from cbpt_runtime.export.profiles import Profile
from cbpt_runtime.export.repository import export_bundle
from cbpt_runtime.export.session import open_session, run_session
from cbpt_runtime.export.weights import to_bytes
from cbpt_runtime.models.architecture import build_model
from cbpt_runtime.models.config import check_model_config
from cbpt_runtime.models.data import find_class_folders, read_images
from cbpt_runtime.runtime.preprocess import Preprocess

RESULTS = Path(__file__).parent / "results" / "export.json"
PRECISIONS = ("fp32", "fp16", "int8")
TINY_TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
BATCHES = (1, 8)
REPEATS = 15


def main() -> None:
    """Measure what is asked for and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundles", type=Path)
    parser.add_argument("--victims", type=Path)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--towers", nargs="*", default=[])
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    found: dict[str, Any] = {"bundles": {}, "towers": {}}
    if options.output.exists():
        found = json.loads(options.output.read_text())
    with tempfile.TemporaryDirectory() as scratch:
        for path in sorted(options.bundles.iterdir()) if options.bundles else []:
            found["bundles"][path.name] = measure_bundle(path, options, Path(scratch))
            save(options.output, found)
        for name in options.towers:
            found["towers"][name] = measure_tower(name, Path(scratch))
            save(options.output, found)
    print(bundle_table(found["bundles"]), tower_table(found["towers"]), sep="\n\n")


def measure_bundle(path: Path, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """CA and ASR of PyTorch and of every precision of the ONNX file, on all test images."""
    bundle = read_bundle(path)
    attack = json.loads((options.victims / path.name / "attack.json").read_text())
    clean = labelled(unpacked(options.images, scratch / "images") / "val", bundle)
    sets, target = [clean], -1
    if attack.get("target") is not None:
        target = bundle.class_names.index(attack["target"].replace("_", " "))
        packed = options.victims / path.name / "test-triggered.zip"
        sets.append(labelled(unpacked(packed, scratch / path.name), bundle))
    classifier = BundleClassifier.from_bundle(bundle)
    expected = [classifier.predict(images) for images, _ in sets]
    result: dict[str, Any] = {
        "images": [len(labels) for _, labels in sets],
        "pytorch": rates([p.labels for p in expected], sets, target),
    }
    for precision in PRECISIONS:
        output = scratch / f"{path.name}-{precision}"
        try:
            exported = export_bundle(bundle, output, profile=Profile(precision=precision))
        except ExportError as error:
            result[precision] = {"refused": str(error)}
            continue
        session = open_session(str(read_repository(output).graph))
        got = [run_session(session, images, batch_size=64) for images, _ in sets]
        labels = [answers["logits"].argmax(axis=1) for answers in got]
        result[precision] = rates(labels, sets, target) | {
            "other_labels": sum(int((a != b.labels).sum()) for a, b in zip(labels, expected, strict=True)),
            "largest_probability_difference": max(
                float(np.abs(a["probabilities"] - b.probabilities).max())
                for a, b in zip(got, expected, strict=True)
            ),
            "largest_alarm_difference": max(
                float(np.abs(a["alarm"] - b.alarm).max()) for a, b in zip(got, expected, strict=True)
            ),
            "gate": exported.parity.get("precision"),
        }
    return result


def rates(
    labels: list[np.ndarray], sets: list[tuple[np.ndarray, np.ndarray]], target: int
) -> dict[str, float | None]:
    """CA, and ASR where there are triggered images."""
    attacked = len(sets) > 1
    return {
        "clean_accuracy": metrics.accuracy(labels[0], sets[0][1]).rate,
        "attack_success_rate": metrics.attack_success(labels[1], sets[1][1], target).rate
        if attacked
        else None,
    }


def measure_tower(name: str, scratch: Path) -> dict[str, Any]:
    """Speed of a full-size image tower in fp32 and int8, in turns, and how far its features move."""
    bundle = random_bundle(name, scratch / name)
    model = export_onnx(BundleClassifier.from_bundle(bundle))
    pixels = draw_gate_images(bundle).pixels
    quantised = make_quantiser(model, pixels[8:])(find_layers(model))
    sessions = {"fp32": open_session(to_bytes(model)), "int8": open_session(to_bytes(quantised))}
    features = [
        run_session(open_session(to_bytes(with_features(each))), pixels[:8], batch_size=8, outputs=[FEATURES])
        for each in (model, quantised)
    ]
    cosines = (features[0][FEATURES] * features[1][FEATURES]).sum(axis=1)
    result: dict[str, Any] = {"repeats": REPEATS, "smallest_feature_cosine": float(cosines.min())}
    for size in BATCHES:
        spent: dict[str, list[float]] = {precision: [] for precision in sessions}
        for repeat in range(REPEATS + 2):
            for precision, session in sessions.items():
                start = time.perf_counter()
                run_session(session, pixels[:size], batch_size=size)
                if repeat >= 2:  # the first are to warm up
                    spent[precision].append(1e3 * (time.perf_counter() - start))
        result[f"batch_{size}"] = {
            f"{precision}_ms_{key}": float(value)
            for precision, times in spent.items()
            for key, value in zip(("p50", "p90"), np.percentile(times, (50, 90)), strict=True)
        } | {"speed_up": statistics.median(spent["fp32"]) / statistics.median(spent["int8"])}
    return result


def random_bundle(name: str, folder: Path) -> Bundle:
    """Return a bundle of an open_clip image tower with random weights and a random head of ten classes."""
    config = check_model_config({**open_clip.get_model_config(name), "text_cfg": TINY_TEXT})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tower = build_model(config).visual
    size = tower.image_size if isinstance(tower.image_size, tuple) else (tower.image_size,) * 2
    heads = np.random.default_rng(0).standard_normal((2, 10, config["embed_dim"])).astype(np.float32)
    heads /= np.linalg.norm(heads, axis=2, keepdims=True)
    names = tuple(f"class {number}" for number in range(10))
    content = BundleContent(
        verdict="backdoored",
        model={
            "config": config,
            "preprocess": Preprocess(image_size=size).to_dict(),
            "source": "random weights",
            "sha256": "0" * 64,
        },
        class_names=names,
        templates=(("a photo of a {}.",),) * 10,
        method={"name": "cbpt", "config": {}, "seed": 0, "parameterization": "prompt"},
        suspects=(Suspect(index=3, name=names[3], score=5.0),),
        class_embeddings=heads[0],
        reference_embeddings=heads[1],
        logit_scale=100.0,
        encoder={key: tensor.numpy() for key, tensor in tower.state_dict().items()},
    )
    return write_bundle(folder, content=content)


def labelled(folder: Path, bundle: Bundle) -> tuple[np.ndarray, np.ndarray]:
    """All images of a folder of class folders, and their classes; classes may be missing."""
    groups = find_class_folders(folder, bundle.class_names, allow_missing=True)
    labels = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    return read_images([path for group in groups for path in group], bundle.preprocess), labels


def unpacked(path: Path, folder: Path) -> Path:
    """Return the folder itself, or a zip unpacked; steps into a single folder inside."""
    if path.suffix == ".zip":
        if not folder.exists():
            with zipfile.ZipFile(path) as archive:
                archive.extractall(folder)
        path = folder
    inside = [entry for entry in path.iterdir() if entry.is_dir()]
    return inside[0] if len(inside) == 1 else path


def save(path: Path, found: dict[str, Any]) -> None:
    """Write the results with what they were measured on."""
    flags = Path("/proc/cpuinfo")
    words = set(flags.read_text().split()) if flags.exists() else set()
    machine = {
        "processor": platform.processor() or platform.machine(),
        "vnni": sorted(words & {"avx512_vnni", "avx_vnni", "amx_int8"}),
        "usable_cores": len(os.sched_getaffinity(0)),
        "provider": "CPUExecutionProvider",
        "versions": {name: version(name) for name in ("torch", "onnx", "onnxruntime", "onnxscript")},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine, "bundles": found["bundles"], "towers": found["towers"]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def bundle_table(bundles: dict[str, Any]) -> str:
    """One row per bundle and precision, as Markdown."""
    columns = (
        "bundle", "graph", "CA", "ASR", "other labels", "largest probability difference",
        "layers in fp32", "size", "speed at batch 1 / 8",
    )  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for name, found in bundles.items():
        pytorch = found["pytorch"]
        lines.append(f"| {name} | PyTorch | {cell(pytorch, 'clean_accuracy')} | "
                     f"{cell(pytorch, 'attack_success_rate')} | | | | | |")  # fmt: skip
        for precision in PRECISIONS:
            row = found[precision]
            if "refused" in row:
                lines.append(f"| | {precision} | refused by the gate | | | | | | |")
                continue
            gate, kept, size, speed = row["gate"], "", "", ""
            if gate:
                kept = f"{len(gate['layers_kept_in_fp32'])} of {gate['layers']}" if gate["layers"] else "–"
                size = f"{gate['size_ratio']:.2f}×"
                speed = " / ".join(f"{ratio:.2f}×" for ratio in gate["speed_ups"].values())
            total = sum(found["images"])
            lines.append(
                f"| | {precision} | {cell(row, 'clean_accuracy')} | {cell(row, 'attack_success_rate')} | "
                f"{row['other_labels']} of {total} | {row['largest_probability_difference']:.1e} | "
                f"{kept} | {size} | {speed} |"
            )
    return "\n".join(lines)


def cell(row: dict[str, Any], key: str) -> str:
    """Return a share in percent."""
    return "–" if row[key] is None else f"{100 * row[key]:.2f} %"


def tower_table(towers: dict[str, Any]) -> str:
    """One row per tower, as Markdown."""
    columns = ("image tower", "batch", "fp32 p50 (p90) ms", "int8 p50 (p90) ms", "speed-up", "feature cosine")
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for name, found in towers.items():
        for size in BATCHES:
            row = found[f"batch_{size}"]
            times = " | ".join(
                f"{row[f'{precision}_ms_p50']:.1f} ({row[f'{precision}_ms_p90']:.1f})"
                for precision in ("fp32", "int8")
            )
            lines.append(
                f"| {name} | {size} | {times} | {row['speed_up']:.2f}× | "
                f"{found['smallest_feature_cosine']:.4f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
