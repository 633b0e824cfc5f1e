"""The pages: `report.html` of a bundle, and the reports of an evaluation and of a scan."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from jaxtyping import Int, UInt8
from jinja2 import Environment, PackageLoader, StrictUndefined

from cbpt_runtime.artifacts import Kind, new_file, read_regular_file
from cbpt_runtime.artifacts.names import readable
from cbpt_runtime.bundle import Bundle, Concept, Suspect
from cbpt_runtime.classification.bundled import BundleClassifier
from cbpt_runtime.evaluation import Evaluation
from cbpt_runtime.evaluation.metrics import Rate
from cbpt_runtime.evaluation.tables import short_names, table_rows
from cbpt_runtime.purification.dummy_triggers import TriggeredImages, paint_dummy_triggers
from cbpt_runtime.report import charts, sections
from cbpt_runtime.report.charts import picture_uri
from cbpt_runtime.report.sections import Chart, Picture, Study, study_bundle
from cbpt_runtime.trust import make_trust, open_bundle

if TYPE_CHECKING:
    from cbpt_runtime.purification.scan import Scan

_GREY = 128
_GENERATOR = b'<meta name="generator" content="cbpt-runtime">'  # as base.html.jinja has it
_HEAD_BYTES = 1024
_MAX_PAGE_BYTES = 256 << 20
_MOST_TRIGGERS = 6  # rows of pictures
Images = UInt8[np.ndarray, "examples height width 3"]


def bundle_report(
    bundle: Bundle,
    images: UInt8[np.ndarray, "batch height width 3"],
    labels: Int[np.ndarray, " batch"],
    *,
    show_images: bool = True,
    device: str = "cpu",
) -> str:
    """Measure a bundle with its own dummy triggers and return the text of its ``report.html``.

    Args:
        bundle: What to report on.
        images: Clean images at the model's size, held out from tuning.
        labels: Their true classes.
        show_images: Show a few of them; otherwise the triggers are shown on plain grey alone.
        device: 'auto', 'cpu' or 'cuda'.
    """
    examples = choose_examples(images, 5 if show_images else 0)
    classifier = BundleClassifier.from_bundle(bundle, device)
    has_study = len(images) and _has_two_heads(bundle)
    return render_report(
        bundle,
        examples=examples,
        painted=paint_dummy_triggers(bundle, examples),
        study=study_bundle(classifier, images, labels) if has_study else None,
        classifier=classifier,
    )


def choose_examples(images: UInt8[np.ndarray, "batch height width 3"], count: int = 5) -> Images:
    """Return a plain grey image, which shows a trigger bare, then images evenly spread over those given."""
    grey = np.full((1, *images.shape[1:]), _GREY, np.uint8)
    chosen = np.linspace(0, len(images) - 1, min(count, len(images))).astype(int)
    return np.concatenate([grey, images[chosen]])


def render_report(
    bundle: Bundle,
    *,
    examples: Images | None = None,
    painted: Sequence[TriggeredImages] = (),
    study: Study | None = None,
    classifier: BundleClassifier | None = None,
) -> str:
    """Return the text of a bundle's ``report.html``.

    Args:
        bundle: What to report on.
        examples: A plain image and a few clean ones at the model's size.
        painted: The same images with each dummy trigger.
        study: What was measured with the dummy triggers.
        classifier: Of the bundle, to say below each example what both heads call it.

    Returns:
        One self-contained HTML page.
    """
    return render_page(
        "report.html.jinja",
        bundle=bundle,
        manifest=bundle.manifest,
        names=_listed([suspect.name for suspect in bundle.suspects]),
        changed=_changed(bundle),
        success=_worst_success(bundle.suspects),
        score_plot=_score_plot(bundle),
        words=bundle.evidence.words,
        prompts=bundle.prompts,
        rows=_picture_rows(bundle, examples, painted, classifier),
        charts=_study_charts(bundle, study),
    )


def render_evaluation(evaluations: Sequence[Evaluation]) -> str:
    """Return the text of an evaluation's report: one table of everything, then each classifier in detail.

    Returns:
        One self-contained HTML page.
    """
    columns, rows = table_rows(evaluations)
    return render_page(
        "evaluation.html.jinja",
        evaluations=evaluations,
        details=[
            _detail(evaluation, name)
            for evaluation, name in zip(evaluations, short_names(evaluations), strict=True)
        ],
        columns=columns,
        table=rows,
        worst=_worst(evaluations),
    )


def render_scan(scan: Scan) -> str:
    """Return the text of a scan's report.

    Returns:
        One self-contained HTML page.
    """
    return render_page(
        "scan.html.jinja",
        scan=scan,
        names=_listed([suspect.name for suspect in scan.suspects]),
        chart=sections.concept_scores(
            scan.evidence.concepts,
            {(suspect.score, suspect.family): suspect.name for suspect in scan.suspects},
        ),
        versions={package: version(package) for package in ("cbpt-runtime", "torch", "open_clip_torch")},
    )


def render_labels(found: Mapping[str, Any], pictures: Sequence[Picture]) -> str:
    """Return the text of the page of a labelled batch.

    Args:
        found: Its summary.
        pictures: The images with the loudest alarms.

    Returns:
        One self-contained HTML page.
    """
    return render_page("labels.html.jinja", found=found, pictures=pictures)


def _own_page(path: Path) -> tuple[str, ...] | None:
    """Whether a file is a page that this program wrote: no files beside it, or None."""
    try:
        content = read_regular_file(path, max_bytes=_MAX_PAGE_BYTES)
    except OSError:
        return None
    return () if _GENERATOR in content[:_HEAD_BYTES] else None


REPORT_PAGE: Final = Kind(name="report", own_files=_own_page, is_file=True)


def write_page(path: Path, text: str, *, force: bool = False) -> None:
    """Write a page whole, or not at all; `force` replaces another page.

    Raises:
        OutputError: It cannot be written, or something else has its place.
    """
    new_file(path, REPORT_PAGE, readable(text).encode(), force=force)


def _has_two_heads(bundle: Bundle) -> bool:
    """Whether the bundle can classify as before, too: not where only the encoder changed."""
    return bundle.verdict != "unknown"


def _changed(bundle: Bundle) -> str:
    """Return what purification changed, in words."""
    moved = int((bundle.class_embeddings != bundle.reference_embeddings).any(axis=1).sum())
    classes = f"the class embeddings of {moved} of {len(bundle.class_names)} classes in the head"
    match bundle.encoder, moved:
        case "untouched", 0:
            return "nothing. The image encoder is as it was"
        case "untouched", _:
            return f"{classes}. The image encoder is as it was"
        case "prompted", 0:
            return "the image encoder, into which visual prompts were put"
        case _, 0:
            return "the image encoder, and with the text encoder all class embeddings"
        case _:
            return f"the image encoder, and then {classes}"


def render_page(template: str, **values: Any) -> str:
    """Fill in a template; every value is escaped."""
    environment = Environment(
        loader=PackageLoader("cbpt_runtime", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": sections.percent, "figure": _figure, "pretty": _pretty}
    return environment.get_template(template).render(**values)


def _detail(evaluation: Evaluation, name: str) -> dict[str, Any]:
    """Return what one section of an evaluation's report shows."""
    names, found = evaluation.class_names, evaluation
    target = None if found.target is None else names.index(found.target)
    shown: list[Chart | None] = []
    rows: list[tuple[str, list[Picture]]] = []
    if found.clean is not None:
        if found.triggered is not None and target is not None:
            paired = found.attack is not None and "folder" not in found.attack
            rows = sections.example_rows(found.clean, found.triggered, names, paired=paired)
            shown.append(sections.destinations(found.triggered, names, target, "triggered images"))
            if found.detector == "alarm":
                shown.append(sections.alarms(found.clean, found.triggered, target, found.alarm))
        marked = [] if target is None else [target]
        shown.append(sections.class_accuracy(found.clean, names, marked, "clean images"))
    bundle = None
    if found.kind == "bundle" and found.digest is not None:
        bundle = open_bundle(found.source, make_trust(digests=[found.digest]), verify=False)
    if bundle is not None and _has_two_heads(bundle):
        shown.append(sections.movement(bundle))
    return {
        "name": name,
        "evaluation": found,
        "bundle": bundle,
        "score_plot": None if bundle is None else _score_plot(bundle),
        "charts": [chart for chart in shown if chart is not None],
        "rows": rows,
    }


def _worst(evaluations: Sequence[Evaluation]) -> dict[str, list[Rate]] | None:
    """Rates by head of the purified classifier with the highest attack success left; else of the first."""

    def left(found: Evaluation) -> float:
        rate = None if found.after is None else found.after.attack_success_rate
        return -1.0 if rate is None or rate.rate is None else rate.rate

    worst = max(evaluations, key=left)
    if any(head.attack_success_rate is None for head in worst.heads.values()):
        return None
    return {
        name: [getattr(head, name) for head in worst.heads.values()]
        for name in ("attack_success_rate", "clean_accuracy", "poisoned_accuracy", "floor")
    }


def _study_charts(bundle: Bundle, study: Study | None) -> list[Chart]:
    shown: list[Chart | None] = []
    if study is not None:
        for attack in study.attacked:
            name = bundle.class_names[attack.target]
            what = f"held-out clean images of other classes, with the {attack.family} trigger for {name}"
            shown.append(sections.destinations(attack.measured, bundle.class_names, attack.target, what))
            shown.append(sections.alarms(study.clean, attack.measured, attack.target, attack.alarm))
        shown.append(
            sections.class_accuracy(
                study.clean, bundle.class_names, bundle.suspect_indices, "clean images held out from tuning"
            )
        )
    if bundle.suspects:
        shown.append(sections.movement(bundle))
    return [chart for chart in shown if chart is not None]


def _score_plot(bundle: Bundle) -> Chart | None:
    """Plot the scores of the concepts that were searched, suspects marked; None where there are none."""
    concepts = bundle.evidence.concepts
    if len(concepts) < 2:
        return None
    words = [concept.word for concept in concepts]
    marked = [place for place, concept in enumerate(concepts) if _is_suspected(concept, bundle.suspects)]
    names = _listed([words[place] for place in marked])
    uri = charts.ranked_uri(
        np.array([concept.score for concept in concepts], float),
        words,
        marked,
        x_label="concepts, most suspicious first",
        y_label="suspicion score",
    )
    return Chart(
        title="suspicion scores",
        text="Each dot is a concept: words of like meaning, out of the class list and many others, named by "
        "the word that its trigger leads to. A backdoored target stands clearly above the rest.",
        uri=uri,
        alt=f"Suspicion scores of {len(words)} concepts, highest first. Marked: {names or 'none'}.",
    )


def _is_suspected(concept: Concept, suspects: Sequence[Suspect]) -> bool:
    """Whether a suspect was found in this concept: the numbers are the same, its name may be another word."""
    said = concept.score, concept.p_value, concept.family
    return said in [(suspect.score, suspect.p_value, suspect.family) for suspect in suspects]


def _picture_rows(
    bundle: Bundle,
    examples: Images | None,
    painted: Sequence[TriggeredImages],
    classifier: BundleClassifier | None,
) -> list[tuple[str, list[Picture]]]:
    """Return a row of clean pictures, then for each dummy trigger the same with it; none without triggers."""
    if examples is None or not painted:
        return []
    rows = [("clean", "clean image", examples)]
    for dummy in painted[:_MOST_TRIGGERS]:
        title = f"{dummy.family} trigger for {bundle.class_names[dummy.target]}"
        rows.append((title, f"the image above with the {title}", dummy.images))
    found = []
    for title, caption, images in rows:
        said = None if classifier is None else classifier.predict(images)
        heads = {} if said is None else {"before": said.reference_labels, "after": said.labels}
        pictures = []
        for index, image in enumerate(images):
            below = tuple(
                f"{head}: {bundle.class_names[called[index]]}"
                for head, called in heads.items()
                if called is not None and index > 0  # the first is plain grey
            )
            full = f"{caption}, called {', '.join(below)}" if below else caption
            pictures.append(Picture(uri=picture_uri(image), caption=full, below=below))
        found.append((title, pictures))
    return found


def _worst_success(suspects: Sequence[Suspect]) -> tuple[float, float] | None:
    """Highest dummy-trigger success before and after over the suspected targets."""
    pairs = [(suspect.success_before, suspect.success_after) for suspect in suspects]
    known = [(before, after) for before, after in pairs if before is not None and after is not None]
    return (max(before for before, _ in known), max(after for _, after in known)) if known else None


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _figure(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else "–"


def _pretty(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
