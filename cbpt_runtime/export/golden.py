"""The golden set: a few image files and the answers expected for them, inside the repository.

It lies in ``<name>/1/golden/``, where Triton does not look. A server's self-test and `verify` use it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8

from cbpt_runtime.artifacts import NUMBER, read_json_file, read_regular_file, shape_problems
from cbpt_runtime.errors import ExportError, RepositoryError
from cbpt_runtime.export.cpus import kind_of_processor
from cbpt_runtime.runtime.preprocess import Preprocess, decode_image, to_pixels

if TYPE_CHECKING:
    from cbpt_runtime.runtime.prediction import Prediction
    from cbpt_runtime.serving.client.asynchronous import ServedPrediction

ANSWERS = "answers.json"
TOLERANCE = 1e-3  # in probability and alarm; another CPU or GPU adds its own rounding to the gate's 1e-4
# Of int8 on another kind of processor: where floats lie between the layers (ViT), their rounding decides some
# of the integers that follow. int8 itself moves probabilities of single images by 0.1 and more.
INT8_TOLERANCE_ELSEWHERE = 0.1
_ROW = {"file": str, "label": str, "pixels_sha256": str, "alarm": NUMBER, "probabilities": [NUMBER]}
_SHAPE = {"tolerance": NUMBER, "images": [_ROW]}
SECOND_LOOK = "second_look"  # in a row: what comes of it, where an image was looked at twice
_SHAPE_TWICE = {"box": [int], "probabilities": [NUMBER]}
_NAME = re.compile(r"[0-9]{1,4}\.(jpg|png|image)")
_MAX_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenCheck:
    """How golden answers came back.

    Attributes:
        images: How many.
        largest_difference: In probability or alarm.
        note: What differs, for people, where that is more than on the machine the answers are from.
    """

    images: int
    largest_difference: float
    note: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenSet:
    """Images and the answers expected for them.

    Attributes:
        files: Encoded images.
        names: Their file names.
        answers: Content of ``answers.json``.
    """

    files: tuple[bytes, ...]
    names: tuple[str, ...]
    answers: dict[str, Any]

    @property
    def looked_twice(self) -> int:
        """How many of the images are looked at twice."""
        return sum(SECOND_LOOK in row for row in self.answers["images"])

    def pixels(self, preprocess: Preprocess) -> UInt8[np.ndarray, "batch height width 3"]:
        """Return the images as the model takes them."""
        return decoded(self.files, preprocess)

    def check(
        self, said: Prediction | ServedPrediction, *, where: str, made_on: str | None = None
    ) -> GoldenCheck:
        """Compare answers with the expected ones.

        Args:
            said: Of the golden images, in order; compared with the answers of a second look where it says
                which were looked at twice.
            where: Who answered, for the error text.
            made_on: Processor that int8 answers are from; another one is allowed more, and a note says so.

        Raises:
            ExportError: A difference above the tolerance, or, on the same processor, a different label or
                another place that was covered.
        """
        tolerance, rows = self.answers["tolerance"], self.answers["images"]
        again = [row.get(SECOND_LOOK) if said.looked_twice is not None else None for row in rows]
        expected = np.array([(twice or row)["probabilities"] for row, twice in zip(rows, again, strict=True)])
        alarms = np.array([row["alarm"] for row in rows])
        if said.probabilities.shape != expected.shape or said.alarm is None:
            raise ExportError(
                expected=f"answers of {where} of shape {expected.shape}",
                got=str(said.probabilities.shape),
                fix="Export the bundle again with `cbpt-runtime export`.",
            )
        differences = (
            float(np.abs(said.probabilities - expected).max()),
            float(np.abs(said.alarm - alarms).max()),
        )
        labels = expected.argmax(axis=1) == said.probabilities.argmax(axis=1)
        if said.looked_twice is not None and said.boxes is not None:
            boxes = np.array([(twice or {"box": [0] * 4})["box"] for twice in again])
            labels &= said.looked_twice == [twice is not None for twice in again]
            labels &= (said.boxes == boxes).all(axis=1)
        largest, here = float(np.max(differences)), kind_of_processor()  # NaN where one is
        if largest <= tolerance and labels.all():
            return GoldenCheck(images=len(rows), largest_difference=largest)
        others = [str(row["file"]) for row, same in zip(rows, labels, strict=True) if not same]
        got = f"probabilities off by {differences[0]:.3g}, alarm by {differences[1]:.3g}, " + (
            f"{len(others)} other labels ({', '.join(others)})" if others else "no other label"
        )
        if made_on not in (None, here):
            if largest <= INT8_TOLERANCE_ELSEWHERE:
                note = _difference_note(got, made_on, here)
                return GoldenCheck(images=len(rows), largest_difference=largest, note=note)
            tolerance = INT8_TOLERANCE_ELSEWHERE
            got += f"; exported on a processor with {made_on}, this one has {here}"
        raise ExportError(
            expected=f"the golden answers of {where} within {tolerance:g}",
            got=got,
            fix="Do not serve it. Export the bundle again on the kind of machine that will serve.",
        )


def decoded(files: Iterable[bytes], preprocess: Preprocess) -> UInt8[np.ndarray, "batch height width 3"]:
    """Return image files as the model takes them."""
    return np.stack([to_pixels(decode_image(file), preprocess) for file in files])


def make_golden(
    files: tuple[bytes, ...],
    pixels: UInt8[np.ndarray, "batch height width 3"],
    class_names: Sequence[str],
    said: Prediction,
    again: Prediction | None = None,
) -> GoldenSet:
    """Return a golden set.

    Args:
        files: Encoded images.
        pixels: The same, decoded.
        class_names: In the order of the logits.
        said: What the graph answered.
        again: What comes of a second look, where a server is to take one.
    """
    names = tuple(f"{number}.{_suffix(file)}" for number, file in enumerate(files))
    rows: list[dict[str, Any]] = [
        {
            "file": name,
            "label": class_names[int(probabilities.argmax())],
            "pixels_sha256": hashlib.sha256(image.tobytes()).hexdigest(),
            "alarm": float(alarm),
            "probabilities": [float(value) for value in probabilities],
        }
        for name, image, probabilities, alarm in zip(
            names, pixels, said.probabilities, said.alarm if said.alarm is not None else (), strict=True
        )
    ]
    if again is not None and again.looked_twice is not None and again.boxes is not None:
        for row in np.flatnonzero(again.looked_twice):
            rows[row][SECOND_LOOK] = {
                "box": again.boxes[row].tolist(),
                "probabilities": [float(value) for value in again.probabilities[row]],
            }
    return GoldenSet(files=files, names=names, answers={"tolerance": TOLERANCE, "images": rows})


def write_golden(golden: GoldenSet, folder: Path) -> None:
    """Write the files and ``answers.json`` into a new folder."""
    folder.mkdir(parents=True)
    for name, file in zip(golden.names, golden.files, strict=True):
        (folder / name).write_bytes(file)
    (folder / ANSWERS).write_text(json.dumps(golden.answers, indent=1, ensure_ascii=False) + "\n", "utf-8")


def read_golden(folder: Path) -> GoldenSet:
    """Read what `write_golden` wrote; the caller has checked the hashes.

    Raises:
        RepositoryError: It is damaged, names files elsewhere, or allows larger differences than `TOLERANCE`.
    """
    try:
        _, answers = read_json_file(folder / ANSWERS, max_bytes=_MAX_BYTES)
        problems = shape_problems(answers, _SHAPE)
        if not problems:
            rows, tolerance = answers["images"], answers["tolerance"]
            if not 0 <= tolerance <= TOLERANCE:
                problems.append(f"a tolerance of {tolerance:g}, not of at most {TOLERANCE:g}")
            if not rows or len({len(row["probabilities"]) for row in rows}) != 1:
                problems.append("no images, or not one probability per class")
            problems += [f"the file name {row['file']!r}" for row in rows if not _NAME.fullmatch(row["file"])]
            problems += _problems_of_second_looks(rows)
        if problems:
            raise ValueError("; ".join(problems[:5]))
        names = tuple(row["file"] for row in rows)
        files = tuple(read_regular_file(folder / name, max_bytes=_MAX_BYTES) for name in names)
    except (OSError, ValueError) as error:
        raise RepositoryError(
            expected=f"golden images and their answers in {folder}",
            got=str(error.strerror if isinstance(error, OSError) else error),
            fix="Export the bundle again with `cbpt-runtime export`.",
        ) from error
    return GoldenSet(files=files, names=names, answers=answers)


def _problems_of_second_looks(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    again = [(row[SECOND_LOOK], len(row["probabilities"])) for row in rows if SECOND_LOOK in row]
    problems = [problem for twice, _ in again for problem in shape_problems(twice, _SHAPE_TWICE)]
    if not problems and any((len(t["box"]), len(t["probabilities"])) != (4, count) for t, count in again):
        problems.append("no box or not one probability per class after a second look")
    return problems


def _difference_note(differences: str, made_on: str | None, here: str) -> str:
    return (
        f"int8 answers differ here from those at export: golden images have {differences}. It was exported "
        f"on a processor with {made_on}, this one has {here}. "
        "`cbpt-runtime verify REPOSITORY --bundle BUNDLE` measures what that costs here"
    )


def _suffix(file: bytes) -> str:
    return "jpg" if file.startswith(b"\xff\xd8") else "png" if file.startswith(b"\x89PNG") else "image"
