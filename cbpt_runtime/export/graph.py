"""The served classifier as one torch module: uint8 pixels in; logits, probabilities and the alarm out.

The maths of the heads is that of `cbpt_runtime.heads`, written in torch so that it can be exported. The two
are compared on every export by the parity gate.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.functional import normalize

from cbpt_runtime.bundle import Bundle
from cbpt_runtime.models.clip import ImageEncoder

INPUT = "images"
OUTPUTS = ("logits", "probabilities", "alarm")
FEATURES = "features"


class ServedClassifier(nn.Module):
    """Image encoder and both heads of a bundle, from pixels as they are stored to answers.

    Args:
        bundle: Where the heads come from.
        encoder: Its image encoder, on the CPU.
    """

    def __init__(self, bundle: Bundle, encoder: ImageEncoder) -> None:
        super().__init__()
        self.tower = encoder.module
        self.mean = nn.Buffer(torch.tensor(bundle.preprocess.mean).view(1, 3, 1, 1))
        self.std = nn.Buffer(torch.tensor(bundle.preprocess.std).view(1, 3, 1, 1))
        self.class_embeddings = nn.Buffer(torch.from_numpy(bundle.class_embeddings.T.copy()))
        self.reference_embeddings = nn.Buffer(torch.from_numpy(bundle.reference_embeddings.T.copy()))
        self.logit_scale = bundle.logit_scale
        self.logit_bias = bundle.logit_bias
        self.suspects = list(bundle.suspect_indices)

    def forward(self, images: UInt8[Tensor, "batch height width 3"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Classify images at the model's own size.

        Returns:
            Logits [batch, classes], probabilities [batch, classes], alarm [batch] in [0, 1], and the
            unit-norm features [batch, dim].
        """
        pixels = images.permute(0, 3, 1, 2).float() / 255
        features = normalize(self.tower((pixels - self.mean) / self.std), dim=-1)
        logits = self._logits(features, self.class_embeddings)
        reference = self._logits(features, self.reference_embeddings)
        sigmoid = self.logit_bias is not None
        loudest = alarm(reference, logits, self.suspects, sigmoid=sigmoid)
        return logits, probabilities(logits, sigmoid=sigmoid), loudest, features

    def _logits(self, features: Tensor, head: Float[Tensor, "dim classes"]) -> Float[Tensor, "batch classes"]:
        scaled = self.logit_scale * (features @ head)
        return scaled if self.logit_bias is None else scaled + self.logit_bias


def probabilities(logits: Float[Tensor, "batch classes"], *, sigmoid: bool) -> Float[Tensor, "batch classes"]:
    """As `heads.probabilities`."""
    return logits.sigmoid() if sigmoid else logits.softmax(dim=1)


def alarm(
    reference_logits: Float[Tensor, "batch classes"],
    purified_logits: Float[Tensor, "batch classes"],
    suspects: list[int],
    *,
    sigmoid: bool,
) -> Float[Tensor, " batch"]:
    """As `heads.alarm`."""
    if not suspects:
        return torch.zeros_like(purified_logits[:, 0])
    before = probabilities(reference_logits, sigmoid=sigmoid)[:, suspects]
    after = probabilities(purified_logits, sigmoid=sigmoid)[:, suspects]
    return (before * (1 - after)).amax(dim=1)
