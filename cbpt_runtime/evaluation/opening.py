"""Classifiers to be compared: opened together, over one class list."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cbpt_runtime.bundle import Bundle
from cbpt_runtime.classification import Classifier
from cbpt_runtime.classification.detectors import Detector
from cbpt_runtime.errors import ClassListError, ConfigError
from cbpt_runtime.loading import Source, kind_of, open_classifier
from cbpt_runtime.models.data import ClassList
from cbpt_runtime.trust import ANYONE, Trust, open_bundle

if TYPE_CHECKING:
    from cbpt_runtime.export.session import Provider


@contextmanager
def open_classifiers(
    sources: Sequence[Source],
    *,
    classes: ClassList | None = None,
    model: str | Path | None = None,
    image_size: int | None = None,
    device: str = "auto",
    provider: Provider = "cpu",
    detector: Detector | None = None,
    trust: Trust = ANYONE,
    images: Path | None = None,
    second_look: bool = False,
) -> Iterator[list[Classifier]]:
    """Open classifiers that share one class list; servers are left again after the block.

    Args:
        sources: As for `open_classifier`; every file of a bundle is hashed.
        classes: Class list of the checkpoints; that of the first bundle if None.
        model: Architecture of checkpoints that do not say; or served model, where a server has several.
        image_size: Side of the input of checkpoints, instead of their configuration's.
        device: Of bundles and checkpoints: 'auto', 'cpu' or 'cuda'.
        provider: Of ONNX files and repositories: 'cpu', 'cuda' or 'tensorrt'.
        detector: A test-time detector for the checkpoints.
        trust: What every source given by its path has to show.
        second_look: Bundles, ONNX files and repositories look again at suspicious images.
        images: Clean labelled images, which tell GELU from QuickGELU where a checkpoint does not say.

    Raises:
        ClassListError: The class lists differ.
        ConfigError: A detector without a checkpoint.
        CbptError: As of `open_classifier`.
    """
    found = [_read_if_bundle(source, trust) for source in sources]
    if classes is None:
        classes = next((_class_list(item) for item in found if isinstance(item, Bundle)), None)
    if detector is not None and all(kind_of(item) != "checkpoint" for item in found):
        raise ConfigError(
            expected=f"the suspect checkpoint, whose text tower {detector} needs",
            got="none; bundles and what is exported of them hold no text tower",
            fix="Give the checkpoint, too (with a bundle beside it the two are compared).",
        )
    with ExitStack() as stack:
        opened: list[Classifier] = []
        for item in found:
            classifier = open_classifier(
                item,
                classes=classes,
                model=model,
                image_size=image_size,
                device=device,
                provider=provider,
                detector=detector,
                images=images,
                trust=trust,
                second_look=second_look and kind_of(item) in ("bundle", "onnx", "repository"),
            )
            if not isinstance(item, Classifier):
                stack.enter_context(classifier)
            opened.append(classifier)
            names = opened[0].class_names if classes is None else classes.names
            if classifier.class_names != names:
                raise ClassListError(
                    expected="one class list for everything in a table",
                    got=f"other classes in {classifier.source}",
                    fix="Evaluate what has different classes one by one.",
                )
        yield opened


def _read_if_bundle(source: Source, trust: Trust) -> Source:
    if isinstance(source, str | Path) and kind_of(source) == "bundle":
        return open_bundle(source, trust)
    return source


def _class_list(bundle: Bundle) -> ClassList:
    return ClassList(
        names=bundle.class_names,
        templates=bundle.templates,
        folders=bundle.class_folders,
    )
