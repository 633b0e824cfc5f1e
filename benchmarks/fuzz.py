"""Does whatever strangers wrote get an answer or a refusal with a reason, and nothing else?

    python benchmarks/fuzz.py --seed 0 --inputs 200000 --output benchmarks/results/fuzz.json
    python benchmarks/fuzz.py --surface images --number 1234 --write FOLDER

Spoiled images, checkpoints, bundles, model repositories, requests and text files are given to the readers of
the package, in processes of their own. An input is accepted, or refused by one of the package's errors that
says what was expected, what came and what to do. A *finding* is anything else: another exception, an empty
message, a process that dies, takes too long or too much memory, files out of place, programs started or hosts
asked, a whole input refused, a promise of a reader not kept. Exit code 1 with any finding.

Seed, surface and number determine an input, with the same versions of the libraries that write whole ones;
the second command writes it and says what becomes of it. With --surface, an --output that is there keeps its
other surfaces.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from fuzzing.artefacts import Bundles, Checkpoints, Repositories
from fuzzing.files import Images, Requests, Texts
from fuzzing.messages import Messages
from fuzzing.surface import Surface, write_files
from fuzzing.workers import Outcome, fuzz, in_child, make_input
from PIL import features

# Surface, and its share of all inputs.
SURFACES: tuple[tuple[type[Surface], float], ...] = (
    (Images, 0.60),
    (Requests, 0.17),
    (Messages, 0.05),
    (Texts, 0.12),
    (Checkpoints, 0.03),
    (Bundles, 0.02),
    (Repositories, 0.01),
)
PACKAGES = (
    "cbpt-runtime",
    "pillow",
    "pillow-heif",
    "torch",
    "open_clip_torch",
    "safetensors",
    "onnx",
    "onnxruntime",
    "timm",
)
CODECS = ("jpg", "libjpeg_turbo", "zlib", "webp", "avif", "libtiff")


def main() -> None:
    """Run, or show one input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [kind.name for kind, _ in SURFACES]
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inputs", type=int, default=200_000, help="of all surfaces together")
    parser.add_argument(
        "--surface", choices=names, action="append", help="only this one; several times for more"
    )
    parser.add_argument("--output", type=Path, help="where the results go, as JSON")
    parser.add_argument("--number", type=int, help="one input of one surface")
    parser.add_argument("--write", type=Path, help="folder to be made of that input")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        chosen = [(kind(), share) for kind, share in SURFACES if kind.name in (arguments.surface or names)]
        if arguments.number is not None:
            if len(chosen) != 1:
                parser.error("--number needs one --surface")
            show(
                open_surface(chosen[0][0], folder), arguments.seed, arguments.number, folder, arguments.write
            )
            return
        result = run(chosen, arguments.seed, arguments.inputs, folder)
    if arguments.surface and arguments.output and arguments.output.exists():
        result = merged(json.loads(arguments.output.read_text(encoding="utf-8")), result)
    text = json.dumps(result, indent=1) + "\n"
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    sys.exit(1 if result["findings"] else 0)


def open_surface(surface: Surface, folder: Path) -> Surface:
    """Return a surface with its whole inputs made and read."""
    seeds = folder / f"{surface.name}.seeds"
    seeds.mkdir()
    in_child(surface.prepare, seeds)
    surface.load(seeds)
    return surface


def run(chosen: Sequence[tuple[Surface, float]], seed: int, inputs: int, folder: Path) -> dict[str, Any]:
    """Give every surface its share of the inputs."""
    start = time.perf_counter()
    outcomes: dict[str, Outcome] = {}
    for surface, share in chosen:
        opened = open_surface(surface, folder)
        count = round(inputs * share)
        outcomes[surface.name] = fuzz(opened, seed=seed, inputs=count, scratch=folder / surface.name)
        print(surface.name, count, outcomes[surface.name].seconds, "s", file=sys.stderr, flush=True)
        for found in outcomes[surface.name].findings:
            print("  ", found, file=sys.stderr)
    return {
        "seed": seed,
        "inputs": sum(round(inputs * share) for _, share in chosen),
        "seconds": round(time.perf_counter() - start, 1),
        "cpus": os.cpu_count(),
        "versions": versions(),
        "surfaces": {
            surface.name: {
                "inputs": round(inputs * share),
                "limits": {"seconds": surface.limit_s, "mebibytes": surface.limit_mb},
                "seconds": outcomes[surface.name].seconds,
                "formats": {form: asdict(row) for form, row in outcomes[surface.name].counts.items()},
                "not_repeated": outcomes[surface.name].not_repeated,
            }
            for surface, share in chosen
        },
        "findings": [found for outcome in outcomes.values() for found in outcome.findings],
    }


def merged(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Earlier results with some surfaces measured again, as after a mend."""
    if (before["seed"], before["versions"]) != (now["seed"], now["versions"]):
        sys.exit("expected results of the same seed and the same versions in --output. Name another file.")
    surfaces = before["surfaces"] | now["surfaces"]
    kept = [found for found in before["findings"] if found["surface"] not in now["surfaces"]]
    return {
        **now,
        "inputs": sum(surface["inputs"] for surface in surfaces.values()),
        "seconds": round(sum(surface["seconds"] for surface in surfaces.values()), 1),
        "surfaces": surfaces,
        "findings": kept + now["findings"],
    }


def show(surface: Surface, seed: int, number: int, folder: Path, written: Path | None) -> None:
    """Write an input, read it here and print what comes."""
    made = make_input(surface, seed, number)
    print(made.how)
    for name, content in made.files.items():
        print(f"{name}: {len(content)} bytes" if isinstance(content, bytes) else f"{name}: {content}")
    place = written or folder / "input"
    write_files(made.files, place)
    surface.run(made, place)
    print("accepted")


def versions() -> dict[str, str]:
    """Of Python, of the packages, and of the libraries in which Pillow decodes."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found | {codec: str(features.version(codec)) for codec in CODECS if features.check(codec)}


if __name__ == "__main__":
    main()
