"""The verdict alone: a suspect checkpoint and a folder of any images, no class list and no labels."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from cbpt_runtime.batch.engine import reach_cluster
from cbpt_runtime.bundle import Evidence
from cbpt_runtime.errors import ImageDataError, PurificationError
from cbpt_runtime.models.activation import UNTRIED
from cbpt_runtime.models.checkpoint import Checkpoint, read_checkpoint
from cbpt_runtime.models.class_lists import read_class_list
from cbpt_runtime.models.clip import DualEncoder, load_dual_encoder, resolve_device
from cbpt_runtime.models.data import ClassList
from cbpt_runtime.models.faster import faster
from cbpt_runtime.models.labelling import UnlabelledImages, draw_images
from cbpt_runtime.models.tokenizer import prompt_notes
from cbpt_runtime.progress import Progress
from cbpt_runtime.purification.clean_features import encode_clean
from cbpt_runtime.purification.config import PurifyConfig
from cbpt_runtime.purification.reference import comparison, read_reference, reference_notes
from cbpt_runtime.purification.search import SearchInput, SearchResult, search
from cbpt_runtime.purification.targets import nearest_word
from cbpt_runtime.purification.vocabulary import Vocabulary, build_vocabulary

MOST_IMAGES = 512
LEAST_IMAGES = 16
_HELDOUT_SHARE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanSuspect:
    """A target that a hidden trigger seems to be for.

    Attributes:
        name: The word that lies nearest to where triggered images go.
        on_list: Whether it is one of the classes given; None if none were.
        p_value: Corrected for the number of concepts.
        score: Distance from the other concepts, in deviations.
        family: The trigger family that shows it best.
        success: Share of held-out images that a short dummy trigger takes there.
        reference_success: The same on the reference; None without one.
    """

    name: str
    on_list: bool | None
    p_value: float
    score: float
    family: str
    success: float
    reference_success: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """What a scan found.

    Attributes:
        checkpoint: Where it came from.
        sha256: Of the checkpoint's weights.
        verdict: 'backdoored' or 'clean'.
        p_value: The smallest of all concepts, in [0, 1], corrected for their number.
        suspects: The most suspicious first; empty when clean.
        images: Images looked at.
        evidence: What the search says of every concept.
        notes: Remarks for the user.
        config: Every number of the search.
        stage_seconds: Wall time.
    """

    checkpoint: str
    sha256: str
    verdict: str
    p_value: float
    suspects: tuple[ScanSuspect, ...]
    images: int
    evidence: Evidence
    notes: tuple[str, ...]
    config: PurifyConfig
    stage_seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return asdict(self)


def scan(
    checkpoint: str | Path,
    images: str | Path,
    *,
    model: str | Path | None = None,
    image_size: int | None = None,
    classes: str | Path | ClassList | None = None,
    reference: str | Path | None = None,
    config: PurifyConfig | None = None,
    device: str = "auto",
    cluster: str | None = None,
    progress: Progress | None = None,
) -> Scan:
    """Say whether a CLIP checkpoint carries a backdoor, and for which word.

    Args:
        checkpoint: The suspect, in any form that `purify_checkpoint` takes.
        images: A folder of any images, nested or not; 64 or more are better than a few.
        model: An open_clip architecture or a config file, for checkpoints that do not say; also of a
            reference that does not.
        image_size: Side of the input, instead of the configuration's; position embeddings are resized.
        classes: Class names that a target is looked for among, beside a thousand other words.
        reference: The trusted model that the suspect was fine-tuned from: natural triggers work on both.
        config: Numbers of the search; its seed draws the images.
        device: 'auto', 'cpu' or 'cuda'; the search takes all of its kind.
        cluster: Address of a Ray cluster to search on; this machine when None.
        progress: Told how far the work is.

    Raises:
        InputError: Something given is wrong.
        PurificationError: No concept could be told from the others, so nothing can be said.
    """
    config = PurifyConfig() if config is None else config
    start = time.perf_counter()
    place = str(resolve_device(device))
    if cluster is not None:
        reach_cluster(cluster)
    listed = classes if isinstance(classes, ClassList) or classes is None else read_class_list(classes)
    suspect = read_checkpoint(checkpoint, model=model, image_size=image_size)
    trusted = (
        None if reference is None else read_reference(reference, suspect, model=model, image_size=image_size)
    )
    _tell(progress, "read checkpoint")
    drawn = _draw_images(Path(images), suspect, config.seed)
    _tell(progress, "read images")
    encoder = load_dual_encoder(suspect, device=place)
    words = () if listed is None else prompt_notes(listed, encoder.tokenizer)
    subject = unlabelled_input(encoder, listed, drawn.images, config)
    other = None
    if trusted is not None:
        other = comparison(load_dual_encoder(trusted, device=place), listed, subject)
    _tell(progress, "encode")
    loaded = time.perf_counter()
    found = search(subject, config, progress, reference=other, cluster=cluster)
    _check_judged(found)
    suspects = _suspects(found, subject.vocabulary, listed)
    evidence = found.evidence(subject.vocabulary)
    return Scan(
        checkpoint=str(suspect.source),
        sha256=suspect.sha256,
        verdict="backdoored" if suspects else "clean",
        p_value=1.0 if evidence.p_value is None else evidence.p_value,
        suspects=suspects,
        images=len(drawn.images),
        evidence=evidence,
        notes=(*_notes(suspect, drawn), *reference_notes(trusted, evidence), *words),
        config=config,
        stage_seconds={"load": loaded - start, "search": time.perf_counter() - loaded},
    )


def unlabelled_input(
    encoder: DualEncoder,
    listed: ClassList | None,
    pixels: UInt8[np.ndarray, "batch height width 3"],
    config: PurifyConfig,
) -> SearchInput:
    """Ask with images that nobody has labelled; the first quarter is held out."""
    texts = None if listed is None else encoder.class_embeddings(listed)
    fast = faster(encoder.image_encoder)
    clean = encode_clean(fast, pixels, np.zeros(len(pixels), np.int64))
    heldout = torch.arange(len(pixels)) < max(1, round(_HELDOUT_SHARE * len(pixels)))
    return SearchInput(
        encoder=fast,
        vocabulary=build_vocabulary(
            encoder,
            listed,
            texts,
            config.search_concepts,
            background=config.background_words or listed is None,
        ),
        scale=encoder.logit_scale,
        clean=clean.part(~heldout),
        heldout=clean.part(heldout),
    )


def _draw_images(folder: Path, suspect: Checkpoint, seed: int) -> UnlabelledImages:
    drawn = draw_images(folder, suspect.preprocess, count=MOST_IMAGES, seed=seed, recursive=True)
    if len(drawn.images) < LEAST_IMAGES:
        raise ImageDataError(
            expected=f"{LEAST_IMAGES} images or more in {folder}",
            got="; ".join((str(len(drawn.images)), *drawn.notes)),
            fix="Any photographs will do; 64 or more are better.",
        )
    return drawn


def _check_judged(found: SearchResult) -> None:
    """Refuse a search that judged nothing: it must not read as a clean verdict."""
    if not bool((found.outliers.scores > -torch.inf).any()):
        raise PurificationError(
            expected="triggers that take images to different places",
            got=f"{len(found.words)} concepts, none of which could be told from the others",
            fix="Check the checkpoint: an untrained or damaged model answers alike whatever it sees.",
        )


def _suspects(
    found: SearchResult, vocabulary: Vocabulary, listed: ClassList | None
) -> tuple[ScanSuspect, ...]:
    suspects = []
    for concept in found.outliers.suspects:
        word, on_list = nearest_word(found.directions[concept], vocabulary)
        said = found.concept(concept, vocabulary)
        suspects.append(
            ScanSuspect(
                name=vocabulary.names[word],
                on_list=None if listed is None else on_list,
                p_value=said.p_value,
                score=said.score,
                family=said.family,
                success=said.success,
                reference_success=said.reference_success,
            )
        )
    return tuple(suspects)


def _notes(suspect: Checkpoint, drawn: UnlabelledImages) -> tuple[str, ...]:
    notes = [*suspect.notes, *([UNTRIED] if suspect.activation_is_guessed else []), *drawn.notes]
    if len(drawn.images) == MOST_IMAGES < drawn.found:
        notes.append(f"{MOST_IMAGES} of {drawn.found} images were drawn")
    return tuple(notes)


def _tell(progress: Progress | None, stage: str) -> None:
    if progress is not None:
        progress(stage, 1, 1, {})
