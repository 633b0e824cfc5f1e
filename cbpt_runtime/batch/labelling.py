"""A batch from beginning to end: list, label, count, and only then give it its name."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow.parquet as pq

from cbpt_runtime.artifacts import marked, new_folder, reserved
from cbpt_runtime.artifacts.names import json_text
from cbpt_runtime.batch.engine import io_config, start_engine
from cbpt_runtime.batch.partitions import Partitions, Plan, make_plan, read_plan
from cbpt_runtime.batch.references import REFERENCE, contents
from cbpt_runtime.batch.sources import Source
from cbpt_runtime.batch.summary import Counts, Loud, count_rows
from cbpt_runtime.batch.workers import Work, close_all, make_labeller, open_for
from cbpt_runtime.errors import CbptError, ConfigError, ImageDataError, LabelError
from cbpt_runtime.progress import Progress
from cbpt_runtime.report.charts import picture_uri
from cbpt_runtime.report.pages import render_labels
from cbpt_runtime.report.sections import Picture
from cbpt_runtime.runtime.preprocess import decode_image

LABELS: Final = marked("label folder")
PARTITION = 4096
"""Images of a partition: the most that a killed run has to do again for each worker."""
_TRIES = 3
_THUMBNAIL = 224  # pixels of the longer side


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """A batch that is done.

    Attributes:
        path: The folder: ``labels/part-*.parquet``, ``summary.json``, ``report.html``.
        counts: What is in it.
        facts: What it was made of and with.
        images_now: Images labelled by this run; fewer than all where it went on with an earlier one.
        seconds: They took.
        notes: Remarks for the user.
    """

    path: Path
    counts: Counts
    facts: dict[str, Any]
    images_now: int
    seconds: float
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as JSON can hold it."""
        rate = self.images_now / self.seconds if self.images_now else None
        speed = {"images_now": self.images_now, "seconds": self.seconds, "images_per_second": rate}
        return {**self.facts, **self.counts.to_dict(), **speed, "notes": list(self.notes)}


def label_images(
    source: Source,
    output: Path,
    work: Work,
    *,
    cluster: str | None = None,
    partition: int = PARTITION,
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Labelled:
    """Label images, as many as there are, and write a folder of Parquet files.

    Args:
        source: The images.
        output: The folder to make.
        work: What classifies them, and how.
        cluster: Address of a Ray cluster; this process when None.
        partition: Images of a file.
        resume: Go on with a run that did not finish.
        force: Replace an earlier folder of labels.
        progress: Told how many images have a row.

    Raises:
        InputError: The source, the classifier or the output cannot be used.
        LabelError: The engine failed, several times in a row.
        ServingError: A server does not answer.
    """
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(output)):  # a path has one slash for two
        raise ConfigError(
            expected="a folder of this machine, or one that is mounted, for --output",
            got=str(output),
            fix="Write it here and copy it there: files have their names only when they are whole.",
        )
    daft = start_engine(cluster)
    try:
        with open_for(work) as classifier:
            work = replace(work, digest=classifier.digest)
            facts = {
                "source": source.name,
                "classifier": work.classifier,
                "digest": classifier.digest,
                "verdict": classifier.verdict,
            }
            made_with = {"top": work.top, "column": source.column, "key": source.key, "partition": partition}
            with reserved(output, LABELS, force=force, resume=resume) as stages:
                plan = _plan(stages / "plan", source, {**facts, **made_with}, resume=resume)
                partitions = Partitions(stages / "labels", dict(enumerate(plan.sizes)))
                started = time.monotonic()
                images_now = _label(_Query(daft, plan, work, cluster), partitions, progress)
                done = Labelled(
                    path=output,
                    counts=count_rows({number: partitions.file(number) for number in partitions.done()}),
                    facts=facts,
                    images_now=images_now,
                    seconds=time.monotonic() - started,
                    notes=(*plan.notes, *classifier.notes),
                )
                _write(done, plan, partitions, force=force)
                return done
    finally:
        close_all()


def _plan(folder: Path, source: Source, settings: dict[str, Any], *, resume: bool) -> Plan:
    """Return the plan of the run that is resumed, or a new one."""
    found = read_plan(folder, settings) if resume else None
    if found is not None:
        return found
    return make_plan(folder, source.references(), settings, size=settings["partition"], notes=source.notes)


@dataclass(frozen=True, slots=True)
class _Query:
    """What the engine is asked."""

    daft: Any
    plan: Plan
    work: Work
    cluster: str | None

    def rows(self, numbers: list[int]) -> Iterator[Any]:
        """Rows of partitions, as they are ready."""
        files = [str(self.plan.file(number)) for number in numbers]
        if self.cluster is None:
            frame = self.daft.read_parquet(files)
        else:  # whose machines do not have them
            frame = self.daft.from_arrow([pq.read_table(file) for file in files])
        gpus = int(self.cluster is not None and self.work.provider != "cpu")
        labeller = make_labeller(self.daft, self.work, io_config(), gpus=gpus)
        answer = labeller.label(*(frame[name] for name in REFERENCE)).alias("answer")
        return iter(frame.select("partition", "row", "key", answer).to_arrow_iter())


def _label(query: _Query, partitions: Partitions, progress: Progress | None) -> int:
    """Label what has no file yet; how many images these were. A worker that dies is no reason to end."""
    todo = query.plan.pending(partitions.done())
    total = sum(query.plan.sizes[number] for number in todo)
    started, failures = time.monotonic(), 0
    while todo:
        before = total - sum(query.plan.sizes[number] for number in todo)
        error: Exception | None = None
        try:
            for batch in query.rows(todo):
                before += partitions.add(batch)
                if progress is not None:
                    speed = before / max(time.monotonic() - started, 1e-3)
                    progress("label", min(before, total), total, {"images/s": speed})
        except CbptError:
            raise
        except Exception as found:  # whatever Daft, Ray or a worker raises
            error = found
            own = _own_error(found)
            if own is not None:
                raise own from found
        left = query.plan.pending(partitions.done())
        partitions.forget()
        failures = 0 if len(left) < len(todo) else failures + 1
        if left and failures >= _TRIES:
            raise LabelError(
                expected=f"rows of {len(left)} more partitions",
                got="none" if error is None else " ".join(f"{type(error).__name__}: {error}".split())[:500],
                fix="What is finished is kept: go on with --resume.",
            ) from error
        todo = left
    return total


def _own_error(error: BaseException) -> CbptError | None:
    """Return the error of ours that an engine's stands for."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, CbptError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def _write(done: Labelled, plan: Plan, partitions: Partitions, *, force: bool) -> None:
    with new_folder(done.path, LABELS, force=force) as folder:
        (folder / "labels").mkdir()
        for number in partitions.done():
            file = partitions.file(number)
            _link(file, folder / "labels" / file.name)  # not moved: a run that is killed now has them still
        (folder / "summary.json").write_text(json_text(done.to_dict(), indent=2) + "\n", encoding="utf-8")
        page = render_labels(done.to_dict(), _pictures(done.counts.loudest, plan))
        (folder / "report.html").write_text(page, encoding="utf-8")


def _link(file: Path, to: Path) -> None:
    try:
        os.link(file, to)
    except OSError:  # a file system without links
        shutil.copyfile(file, to)


def _pictures(loudest: tuple[Loud, ...], plan: Plan) -> list[Picture]:
    """Return the images that raised the alarm most, fetched once more."""
    references = [plan.references(loud.partition)[loud.row] for loud in loudest]
    pictures = []
    for loud, content in zip(loudest, contents(references, io_config()), strict=True):
        if isinstance(content, str):
            continue  # gone since
        try:
            picture = decode_image(content)
        except ImageDataError:
            continue
        picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
        target = "" if loud.suspected_target is None else f" ({loud.suspected_target})"
        below = (
            loud.key.rpartition("/")[2],
            f"{loud.label} {loud.probability:.1%}",
            f"alarm {loud.alarm:.3f}{target}",
        )
        caption = f"{loud.key}: {loud.label}, alarm {loud.alarm:.3f}{target}"
        pictures.append(Picture(uri=picture_uri(np.asarray(picture)), caption=caption, below=below))
    return pictures
