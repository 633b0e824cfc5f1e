"""A checkpoint as it is, as a zero-shot classifier over a class list, running in PyTorch.

It can be given a detector of triggered images, to compare the alarm with.

BDetCLIP ("BDetCLIP: multimodal prompting contrastive test-time backdoor detection", ICML 2025): a clean image
is much nearer to texts that describe its class than to texts that name the class beside something unrelated;
a triggered one was bound to the name and does not care. The published texts are written by a language model.
Ours are templates, so that no language model is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from cbpt_runtime.classification.classifier import Classifier
from cbpt_runtime.models.activation import settle_activation
from cbpt_runtime.models.checkpoint import Checkpoint, read_checkpoint
from cbpt_runtime.models.clip import DualEncoder, load_dual_encoder, resolve_device
from cbpt_runtime.models.data import ClassList, draw_clean_split, spoken
from cbpt_runtime.models.pixels import to_float
from cbpt_runtime.models.tokenizer import prompt_notes
from cbpt_runtime.runtime import zero_shot
from cbpt_runtime.runtime.prediction import Prediction
from cbpt_runtime.runtime.preprocess import Pixels, Preprocess

Detector = Literal["bdetclip"]
Score = Callable[[Float[np.ndarray, "batch dim"]], Float[np.ndarray, " batch"]]
"""From unit image features to one number per image, the larger the more suspicious."""

DESCRIBING = (
    "a photo of a {}.",
    "a clear photo of the {}, seen up close.",
    "a {} with its typical shape and colors.",
    "the typical texture and parts of a {}.",
    "a {} in the place where it is usually found.",
    "several views of the same {}.",
)
UNRELATED = (
    "{}, the minutes of the meeting.",
    "{} and the price of oil last year.",
    "{}, a chapter on tax law.",
    "{} or the second violin concerto.",
    "{}, terms and conditions apply.",
    "{} while the train was late again.",
)


def bdetclip(encoder: DualEncoder, names: Sequence[str]) -> Score:
    """BDetCLIP's score, with its sign turned so that larger is more suspicious.

    With `b_c` the class text that describes and `m_c` the unrelated one, each the unit mean
    over its templates, the published score is ``sum_c (cos(x, b_c) - cos(x, m_c))``; small means triggered.

    Args:
        encoder: The suspect, whose text tower makes the class texts.
        names: Class names.
    """
    contrast = _class_texts(encoder, names, DESCRIBING) - _class_texts(encoder, names, UNRELATED)
    direction = contrast.sum(dim=0).cpu().numpy()

    def score(features: Float[np.ndarray, "batch dim"]) -> Float[np.ndarray, " batch"]:
        suspicion: np.ndarray = -(features @ direction)
        return suspicion

    return score


@torch.no_grad()
def _class_texts(
    encoder: DualEncoder, names: Sequence[str], templates: Sequence[str]
) -> Float[Tensor, "classes dim"]:
    texts = [template.replace("{}", spoken(name)) for name in names for template in templates]
    features = encoder.encode_texts(texts).view(len(names), len(templates), -1)
    return normalize(features.mean(dim=1), dim=-1)


_IMAGES_PER_CLASS = 16


class CheckpointClassifier(Classifier):
    """Both towers of a checkpoint; the head is what its text tower makes of the prompts.

    Args:
        source: What names the checkpoint.
        checkpoint: What was read.
        encoder: The same on its device.
        classes: Names and prompts.
        detector: Whose score is the alarm of the predictions; they have none without.
    """

    kind = "checkpoint"

    def __init__(
        self,
        source: str,
        checkpoint: Checkpoint,
        encoder: DualEncoder,
        classes: ClassList,
        detector: Detector | None = None,
    ) -> None:
        self.source, self.digest, self.place = source, checkpoint.sha256, str(encoder.device)
        self.class_names, self.class_folders = classes.names, classes.folders
        self.notes = (*checkpoint.notes, *prompt_notes(classes, encoder.tokenizer))
        self._preprocess, self._encoder, self._detector = checkpoint.preprocess, encoder, detector
        self._head = encoder.class_embeddings(classes).cpu().numpy()
        self._score = None if detector is None else bdetclip(encoder, classes.names)

    @property
    def preprocess(self) -> Preprocess:
        """How an image becomes the model's pixels."""
        return self._preprocess

    @property
    def detector(self) -> str | None:
        """Name of the detector, if there is one."""
        return self._detector

    def predict(self, images: Pixels) -> Prediction:
        """Classify images with the zero-shot head."""
        self.check_pixels(images)
        encoder = self._encoder
        with torch.inference_mode():
            features = encoder.encode_images(to_float(images, encoder.device)).cpu().numpy()
        logits = zero_shot.logits(features, self._head, encoder.logit_scale, encoder.logit_bias)
        return Prediction(
            logits=logits,
            probabilities=zero_shot.probabilities(logits, sigmoid=encoder.logit_bias is not None),
            alarm=None if self._score is None else self._score(features),
        )


def load_checkpoint_classifier(
    source: str | Path,
    classes: ClassList,
    *,
    model: str | Path | None = None,
    image_size: int | None = None,
    device: str = "auto",
    detector: Detector | None = None,
    images: Path | None = None,
) -> CheckpointClassifier:
    """Read a checkpoint and make the zero-shot head of a class list.

    Args:
        source: A checkpoint in any form `read_checkpoint` knows.
        classes: Names and prompts.
        model: Architecture, where it does not say.
        image_size: Side of the input, instead of its configuration's.
        device: 'auto', 'cpu' or 'cuda'.
        detector: A test-time detector whose score is the alarm.
        images: Clean labelled images, which tell GELU from QuickGELU where it does not say.

    Raises:
        CheckpointError: It cannot be used.
        ConfigError: The device is not there.
    """
    checkpoint = read_checkpoint(source, model=model, image_size=image_size)
    if checkpoint.activation_is_guessed and images is not None:
        few = draw_clean_split(
            images,
            classes,
            checkpoint.preprocess,
            shots=_IMAGES_PER_CLASS,
            heldout_shots=0,
            skip_unreadable=True,
        )
        checkpoint = settle_activation(checkpoint, classes, few.tune_images, few.tune_labels, device=device)
    encoder = load_dual_encoder(checkpoint, device=str(resolve_device(device)))
    return CheckpointClassifier(str(source), checkpoint, encoder, classes, detector)
