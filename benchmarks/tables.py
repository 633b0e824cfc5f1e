"""Writes the tables of runtime.md and serving.md from results/runtime.json and results/serving.json.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def main() -> None:
    """Write them."""
    write_tables()


def write_tables() -> None:
    """Replace what stands between the markers; a table whose numbers are missing stays as it is."""
    for file, makers in (("runtime", RUNTIME), ("serving", SERVING)):
        path, page = FOLDER / "results" / f"{file}.json", FOLDER / f"{file}.md"
        if not path.exists():
            continue
        results, text = json.loads(path.read_text(encoding="utf-8")), page.read_text(encoding="utf-8")
        for name, (part, columns, rows) in makers.items():
            if part in results:
                marker = re.compile(rf"(<!-- table:{name} -->\n).*?(<!-- end -->)", re.DOTALL)
                body = table(columns, list(rows(results)))
                text = marker.sub(lambda match, body=body: f"{match[1]}{body}\n{match[2]}", text)
        page.write_text(text, encoding="utf-8")


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def batches(found: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Batch size and result."""
    for key, result in found.items():
        if key.startswith("batch_"):
            yield key.removeprefix("batch_"), result


def verdict(value: float, bar: float, *, at_most: bool = False) -> str:
    """Whether a bar is met, in a word."""
    return "yes" if (value <= bar if at_most else value >= bar) else "**no**"


def head_rows(found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Purified head against plain head."""
    for tower, result in found["head"].items():
        for batch, race in batches(result):
            times = race["median_ms"]
            yield (tower, batch, f"{times['purified, with alarm']:.2f}", f"{times['plain head']:.2f}",
                   f"{race['ratio']:.3f}", verdict(race["ratio"], 1.01, at_most=True))  # fmt: skip


EAGER_BARS = {("ViT-B-32", "1"): 1.35, ("ViT-B-32", "16"): 1.0, ("RN50", "1"): 1.75, ("RN50", "16"): 1.45}
PEERS = ("open_clip eager", "torch.compile", "onnxruntime, plain export", "OpenVINO")


def tower_rows(found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Our graph against its peers."""
    for tower, result in found["towers"].items():
        for batch, race in batches(result):
            times = race["median_ms"]
            bar = EAGER_BARS.get((tower, batch))
            eager, best = race["against_eager"], race["against_best_peer"]
            yield (
                tower,
                batch,
                f"{times['cbpt-runtime']:.1f}",
                *(f"{times[peer]:.1f}" if peer in times else "–" for peer in PEERS),
                f"{eager:.2f}×" + (f" (≥ {bar}: {verdict(eager, bar)})" if bar else ""),
                f"{best:.3f}× {race['best_peer']} (≥ 0.97: {verdict(best, 0.97)})",
            )


def peak_rows(found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Share of the GEMM peak at batch 16, and the operators that take the time."""
    peak = max(found["gemm"]["float32"]["gflops_per_s"].values())
    for tower, result in found["towers"].items():
        reached = result["batch_16"]["gflops_per_s"]
        shares = result["operators_at_batch_16"]
        told = ", ".join(f"{name} {100 * share:.1f} %" for name, share in list(shares.items())[:7])
        yield tower, f"{reached:.0f}", f"{peak:.0f}", f"{100 * reached / peak:.0f} %", told


INT8_BARS = {"ViT-B-32": 2.3, "RN50": 1.8}


def int8_rows(found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """int8 against fp32."""
    for tower, result in found["int8"].items():
        for batch, race in batches(result):
            times, bar = race["median_ms"], INT8_BARS.get(tower)
            met = "–" if bar is None else verdict(race["ratio"], bar)
            yield (tower, batch, f"{times['fp32']:.1f}", f"{times['int8']:.1f}", f"{race['ratio']:.2f}×",
                   "–" if bar is None else f"≥ {bar}: {met}")  # fmt: skip


def preprocessing_rows(found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Bytes to pixels."""
    for name, result in found["preprocessing"].items():
        times = result["ms_per_image"]
        names = ("cbpt-runtime", "open_clip transform", "open_clip without its floats", "decode alone")
        gain = result["against_open_clip"]
        faster = f"{gain:.2f}× (≥ 1: {verdict(gain, 1.0)})"
        yield name, str(result["files"]), *(f"{times[key]:.2f}" for key in names), faster


def class_rows(found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Latency and memory over the number of classes."""
    for tower, result in found["classes"].items():
        for count, latency in result["median_ms"].items():
            memory = result["resident_bytes"][count] / 2**20
            share = 100 * max(0.0, result["head_share"][count])
            yield tower, f"{int(count):,}", f"{latency:.2f}", f"{share:.1f} %", f"{memory:.0f} MiB"


def saturated_rows(found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Triton, saturated, against what its parts cost in one process."""
    for name, result in found["saturated"].items():
        keys = ("triton_per_s", "in_process_per_s", "decode_ms", "compute_ms", "mean_batch_size")
        met = f"{result['ratio']:.2f}× (≥ 0.85: {verdict(result['ratio'], 0.85)})"
        spent = f"{result['triton_processor_ms']:.1f} / {result['in_process_processor_ms']:.1f}"
        yield (
            name,
            *(f"{result[key]:.1f}" for key in keys),
            met,
            spent,
            f"{result['ratio_of_processor_time']:.2f}×",
        )


def overhead_rows(found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """One request at a time."""
    for name, result in found["overhead"].items():
        keys = ("triton_p50_ms", "in_process_p50_ms")
        bar = f"(≤ 3: {verdict(result['overhead_ms'], 3.0, at_most=True)})"
        stalls = sum(each["longer_than_400_ms"] for each in result["rounds"])
        total = sum(each["n"][0] for each in result["rounds"])
        yield (
            name,
            *(f"{result[key]:.2f}" for key in keys),
            f"{result['overhead_ms']:.2f} {bar}",
            f"{result['overhead_p10_ms']:.2f}",
            f"{result['alarm_step_ms']:.2f}",
            f"{stalls} of {total:,}",
        )


def start_rows(found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """From the command to ready."""
    for name, result in found["start"].items():
        yield (name, f"{result['median_s']:.1f} s", ", ".join(f"{value:.1f}" for value in result["seconds"]),
               f"≤ 10 s: {verdict(result['median_s'], 10.0, at_most=True)}")  # fmt: skip


RUNTIME = {
    "head": (
        "head",
        ("tower", "batch", "purified, with alarm, ms", "plain head, ms", "ratio", "≤ 1.01"),
        head_rows,
    ),
    "towers": (
        "towers",
        (
            "tower",
            "batch",
            "cbpt-runtime, ms",
            *(f"{peer}, ms" for peer in PEERS),
            "against eager",
            "against the best",
        ),
        tower_rows,
    ),
    "peak": (
        "towers",
        ("tower", "GFLOP/s at batch 16", "GEMM peak", "share", "where the time goes"),
        peak_rows,
    ),
    "int8": ("int8", ("tower", "batch", "fp32, ms", "int8, ms", "int8 faster", "bar"), int8_rows),
    "preprocessing": (
        "preprocessing",
        (
            "images",
            "files",
            "ours, ms",
            "open_clip, ms",
            "without its floats, ms",
            "decoding alone, ms",
            "against open_clip",
        ),
        preprocessing_rows,
    ),
    "classes": ("classes", ("tower", "classes", "latency, ms", "share of the head", "memory"), class_rows),
}
SERVING = {
    "saturated": (
        "saturated",
        (
            "model",
            "Triton, images/s",
            "in process, images/s",
            "decode, ms",
            "compute, ms",
            "mean batch",
            "ratio of wall-clock",
            "processor time of an image, ms: Triton / in process",
            "ratio of it",
        ),
        saturated_rows,
    ),
    "overhead": (
        "overhead",
        (
            "model",
            "Triton p50, ms",
            "decode + graph in process p50, ms",
            "overhead, ms",
            "of undisturbed requests, ms",
            "of which the alarm counter, ms",
            "longer than 400 ms",
        ),
        overhead_rows,
    ),
    "start": ("start", ("repository", "median", "all, s", "bar"), start_rows),
}

if __name__ == "__main__":
    main()
