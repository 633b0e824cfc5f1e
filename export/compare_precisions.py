"""How far apart are two exports of one bundle? Labels, probabilities and alarm on a folder of images.

    python export/compare_precisions.py REPOSITORY OTHER_REPOSITORY --images DIR

Both graphs run on the CPU; the images need no labels.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from cbpt_runtime.export.manifest import read_repository
from cbpt_runtime.export.session import open_session, run_session
from cbpt_runtime.runtime.preprocess import decode_image, to_pixels

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("repositories", nargs=2, type=Path)
    parser.add_argument("--images", type=Path, required=True)
    arguments = parser.parse_args()

    first, second = (read_repository(path) for path in arguments.repositories)
    if first.manifest.preprocess != second.manifest.preprocess:
        parser.error("the two repositories take different images")
    files = sorted(path for path in arguments.images.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        parser.error(f"no images in {arguments.images}")
    preprocess = first.manifest.preprocess
    pixels = np.stack([to_pixels(decode_image(path), preprocess) for path in files])
    a, b = (
        run_session(open_session(str(repository.graph)), pixels, batch_size=16)
        for repository in (first, second)
    )
    result = {
        "images": len(files),
        "labels_equal": float((a["logits"].argmax(1) == b["logits"].argmax(1)).mean()),
        "largest_probability_difference": float(np.abs(a["probabilities"] - b["probabilities"]).max()),
        "largest_alarm_difference": float(np.abs(a["alarm"] - b["alarm"]).max()),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
