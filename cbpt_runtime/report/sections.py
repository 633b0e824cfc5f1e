"""The measured parts of a report: each a chart, what it says in words, and the numbers behind it.

What is measured: a bundle's dummy triggers on clean images nobody tuned on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, UInt8

from cbpt_runtime.bundle import Bundle, Concept
from cbpt_runtime.classification.bundled import BundleClassifier
from cbpt_runtime.evaluation.results import (
    AlarmQuality,
    Measured,
    alarm_quality,
    join,
    measure_batch,
    per_class,
    prediction_counts,
)
from cbpt_runtime.evaluation.tables import estimate_text, rate_text
from cbpt_runtime.purification.dummy_triggers import paint_dummy_triggers
from cbpt_runtime.report import charts
from cbpt_runtime.report.charts import picture_uri

_MOST_SUSPECTS = 3
_MOST_IMAGES = 512
_BATCH = 64
_DESTINATIONS = 8  # classes with a bar of their own


@dataclass(frozen=True, slots=True, kw_only=True)
class Attacked:
    """Clean images of other classes with the dummy trigger of one suspected target.

    Attributes:
        family: Family of the trigger.
        target: Class index of the suspected target.
        measured: What both heads say.
        alarm: How well the alarm tells them from the clean images.
    """

    family: str
    target: int
    measured: Measured
    alarm: AlarmQuality | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """Both heads of a bundle on clean images, bare and with dummy triggers.

    Attributes:
        clean: The images as they are.
        attacked: One entry per suspected target, most suspicious first, three at most.
    """

    clean: Measured
    attacked: tuple[Attacked, ...]


def study_bundle(
    classifier: BundleClassifier,
    images: UInt8[np.ndarray, "batch height width 3"],
    labels: Int[np.ndarray, " batch"],
) -> Study:
    """Classify clean images with and without the first dummy trigger of each suspected target.

    Args:
        classifier: Of the bundle to study.
        images: Clean images at the model's size, held out from tuning.
        labels: Their true classes.
    """
    rows = np.unique(np.linspace(0, len(images) - 1, min(_MOST_IMAGES, len(images))).round().astype(int))
    images, labels = images[rows], labels[rows]
    bare: list[Measured] = []
    painted: dict[tuple[int, str], list[Measured]] = {}
    for start in range(0, len(images), _BATCH):
        batch, true = images[start : start + _BATCH], labels[start : start + _BATCH]
        bare.append(measure_batch(true, classifier.predict(batch), is_purified=True))
        for key, triggered in _painted(classifier, batch).items():
            found = measure_batch(true, classifier.predict(triggered), is_purified=True)
            painted.setdefault(key, []).append(found.rows(true != key[0]))
    clean = join(bare)
    attacked = []
    for (target, family), parts in painted.items():
        whole = join(parts)
        quality = alarm_quality(clean, whole, target)
        attacked.append(Attacked(family=family, target=target, measured=whole, alarm=quality))
    return Study(clean=clean, attacked=tuple(attacked))


def _painted(classifier: BundleClassifier, batch: np.ndarray) -> dict[tuple[int, str], np.ndarray]:
    """Return the batch with the first dummy trigger of each suspected target, by target and family."""
    found: dict[tuple[int, str], np.ndarray] = {}
    targets: set[int] = set()
    for dummy in paint_dummy_triggers(classifier.bundle, batch):
        if dummy.target not in targets and len(targets) < _MOST_SUSPECTS:
            targets.add(dummy.target)
            found[dummy.target, dummy.family] = dummy.images
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A part of a report.

    Attributes:
        title: Its heading.
        text: What it shows, in a sentence or two.
        uri: Address of the chart.
        alt: What the chart shows, for those who cannot see it.
        columns: Names of the columns of the numbers behind it.
        rows: These numbers as texts.
    """

    title: str
    text: str
    uri: str
    alt: str
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """An image of the report: its address, what it shows, and what stands below it."""

    uri: str
    caption: str
    below: tuple[str, ...] = ()


def destinations(triggered: Measured, names: Sequence[str], target: int, what: str) -> Chart:
    """Where the predictions of triggered images go."""
    counts = prediction_counts(triggered, names)
    first = [row for row in counts if row["name"] == names[target]]
    shown = (first + [row for row in counts if row["name"] != names[target]])[:_DESTINATIONS]
    rest = [row for row in counts if row not in shown]
    labels = [row["name"] for row in shown] + (["all others"] if rest else [])
    heads = triggered.heads
    bars = {
        head: np.array([row[head] for row in shown] + [sum(row[head] for row in rest)] * bool(rest))
        for head in heads
    }
    total = len(triggered.labels)
    right = [int((called == triggered.labels).sum()) for called in heads.values()]
    called_target = [int((called == target).sum()) for called in heads.values()]
    text = f"{total:,} {what}. Given their true class: {_arrow(right, total)}. "
    text += f"Called {names[target]}: {_arrow(called_target, total)}."
    return Chart(
        title="Where triggered images go",
        text=text,
        uri=charts.destinations_uri(labels, bars, total, marked=names[target]),
        alt=f"Bars: share of the triggered images by the class they are given. {text}",
        columns=("class", *heads),
        rows=tuple((row["name"], *(str(row[head]) for head in heads)) for row in counts),
    )


def class_accuracy(clean: Measured, names: Sequence[str], marked: Sequence[int], what: str) -> Chart:
    """Clean accuracy class by class."""
    rows = [row for row in per_class(clean, names) if row["images"]]
    present = [row["name"] for row in rows]
    images = np.array([row["images"] for row in rows])
    shares = {head: np.array([row[f"right_{head}"] for row in rows]) / images for head in clean.heads}
    text = f"{len(clean.labels):,} {what}."
    if len(shares) > 1:
        lost = int((shares["after"] < shares["before"]).sum())
        won = int((shares["after"] > shares["before"]).sum())
        same = len(rows) - lost - won
        text += f" {lost} of {len(rows)} classes lost, {won} gained, {same} stayed as they were."
    kept = [present.index(names[index]) for index in marked if names[index] in present]
    return Chart(
        title="Clean accuracy by class",
        text=text,
        uri=charts.class_accuracy_uri(shares, present, kept),
        alt=f"Dots: clean accuracy of every class. {text}",
        columns=("class", "images", *shares),
        rows=tuple(
            (row["name"], str(row["images"]), *(percent(own[place]) for own in shares.values()))
            for place, row in enumerate(rows)
        ),
    )


def alarms(clean: Measured, triggered: Measured, target: int, quality: AlarmQuality | None) -> Chart | None:
    """How far apart the alarm keeps clean and triggered images."""
    if clean.alarm is None or triggered.alarm is None or quality is None:
        return None
    attacks = triggered.alarm[triggered.labels != target]
    auroc, false_alarms = estimate_text(quality.auroc), rate_text(quality.false_alarm_rate)
    text = (
        f"AUROC {auroc}. At the level {quality.threshold:.3g}, where 95 % of the triggered images are "
        f"detected, {false_alarms} of the clean images raise the alarm. Brackets: 95 % intervals."
    )
    return Chart(
        title="The alarm on clean and on triggered images",
        text=text,
        uri=charts.alarms_uri(clean.alarm, attacks, quality.threshold),
        alt=f"Histogram of the alarm, from 0 to 1, for clean and for triggered images. {text}",
    )


def movement(bundle: Bundle) -> Chart:
    """How far each class embedding moved."""
    cosines = (bundle.class_embeddings * bundle.reference_embeddings).sum(axis=1).clip(-1, 1)
    degrees = np.degrees(np.arccos(cosines.astype(np.float64)))
    still = int((bundle.class_embeddings == bundle.reference_embeddings).all(axis=1).sum())
    text = (
        f"Angle between the embedding of a class before and after: median {np.median(degrees):.1f}°, "
        f"largest {degrees.max():.1f}° ({bundle.class_names[int(degrees.argmax())]}). "
        f"{still} of {len(degrees)} are bit for bit the same."
    )
    order = np.argsort(-degrees, kind="stable")
    return Chart(
        title="How far the class embeddings moved",
        text=text,
        uri=charts.ranked_uri(
            degrees,
            bundle.class_names,
            bundle.suspect_indices,
            x_label="classes, most moved first",
            y_label="angle, degrees",
        ),
        alt=f"Dots: one per class. {text}",
        columns=("class", "degrees"),
        rows=tuple((bundle.class_names[index], f"{degrees[index]:.2f}") for index in order),
    )


def example_rows(
    clean: Measured, triggered: Measured, names: Sequence[str], *, paired: bool
) -> list[tuple[str, list[Picture]]]:
    """Return a few images clean and triggered, with what each head calls them."""
    rows = [("triggered", _called(triggered, names))]
    return [("clean", _called(clean, names)), *rows] if paired else rows


def concept_scores(concepts: Sequence[Concept], suspected: Mapping[tuple[float, str], str]) -> Chart:
    """Every concept that a search looked at, by how far it stands out.

    Args:
        concepts: What the search says of each.
        suspected: Names of the suspected targets, by score and trigger family.
    """
    places = [(concept.score, concept.family) for concept in concepts]
    marked = [index for index, place in enumerate(places) if place in suspected]
    text = "Each dot is a group of words, named by the one its trigger comes nearest to. "
    text += "Others were given up. "
    text += f"Marked: {', '.join(suspected.values())}." if suspected else "None stands out from the rest."
    return Chart(
        title="How far each concept stands out",
        text=text,
        uri=charts.ranked_uri(
            np.array([concept.score for concept in concepts], float),
            [suspected.get(place, concept.word) for place, concept in zip(places, concepts, strict=True)],
            marked,
            x_label="concepts, highest score first",
            y_label="score, in deviations",
        ),
        alt=f"Score of {len(concepts)} concepts, highest first. {text}",
        columns=("concept", "score", "p-value", "trigger family", "success"),
        rows=tuple(
            (
                concept.word,
                f"{concept.score:.4g}",
                f"{concept.p_value:.4g}",
                concept.family,
                f"{100 * concept.success:.1f} %",
            )
            for concept in concepts
        ),
    )


def _called(measured: Measured, names: Sequence[str]) -> list[Picture]:
    pictures = []
    for row, image in zip(measured.shown, measured.pictures, strict=True):
        true = names[measured.labels[row]]
        below = [f"{head}: {names[called[row]]}" for head, called in measured.heads.items()]
        caption = f"{true}; called {', '.join(below)}"
        pictures.append(Picture(uri=picture_uri(image), caption=caption, below=(f"is: {true}", *below)))
    return pictures


def _arrow(counts: Sequence[int], total: int) -> str:
    return " → ".join(percent(count / total) for count in counts)


def percent(rate: float | None) -> str:
    """Return a rate for people; a dash where there is none."""
    return "–" if rate is None else f"{100 * rate:.1f}\N{NO-BREAK SPACE}%"
