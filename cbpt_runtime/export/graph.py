"""The served classifier as one torch module, and its export: uint8 pixels in; both heads' answers out.

The maths of the heads is that of `cbpt_runtime.runtime.zero_shot`, written in torch so that it can be
exported. The two are compared on every export by the parity gate. The same bundle and the same packages give
the same bytes; what exporters leave in a file about the machine (source paths, stack traces) is removed.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn.functional import normalize

from cbpt_runtime.bundle import Bundle
from cbpt_runtime.classification.bundled import BundleClassifier
from cbpt_runtime.errors import ExportError
from cbpt_runtime.export.onnx import FEATURES, INPUT, check_portable, describe, write_metadata
from cbpt_runtime.export.weights import MAX_WEIGHT_BYTES, fills_two_files, seal_weights
from cbpt_runtime.models.clip import ImageEncoder
from cbpt_runtime.runtime.prediction import OUTPUTS

OPSET = 18
_NOISY_LOGGERS = ("onnxscript", "onnx_ir", "torch.onnx")


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

    def forward(self, images: UInt8[Tensor, "batch height width 3"]) -> tuple[Tensor, ...]:
        """Classify images at the model's own size.

        Returns:
            Logits [batch, classes], probabilities [batch, classes], alarm [batch] in [0, 1], the class index
            it speaks of [batch], and the unit-norm features [batch, dim].
        """
        pixels = images.permute(0, 3, 1, 2).float() / 255
        features = normalize(self.tower((pixels - self.mean) / self.std), dim=-1)
        logits = self._logits(features, self.class_embeddings)
        reference = self._logits(features, self.reference_embeddings)
        sigmoid = self.logit_bias is not None
        loudest, target = alarm(reference, logits, self.suspects, sigmoid=sigmoid)
        return logits, probabilities(logits, sigmoid=sigmoid), loudest, target, features

    def _logits(self, features: Tensor, head: Float[Tensor, "dim classes"]) -> Float[Tensor, "batch classes"]:
        scaled = self.logit_scale * (features @ head)
        return scaled if self.logit_bias is None else scaled + self.logit_bias


def probabilities(logits: Float[Tensor, "batch classes"], *, sigmoid: bool) -> Float[Tensor, "batch classes"]:
    """As `zero_shot.probabilities`."""
    return logits.sigmoid() if sigmoid else logits.softmax(dim=1)


def alarm(
    reference_logits: Float[Tensor, "batch classes"],
    purified_logits: Float[Tensor, "batch classes"],
    suspects: list[int],
    *,
    sigmoid: bool,
) -> tuple[Float[Tensor, " batch"], Int[Tensor, " batch"]]:
    """As `zero_shot.alarm`, and which suspect it speaks of (class index; -1 when nothing is suspected)."""
    if not suspects:
        silent = torch.zeros_like(purified_logits[:, 0])
        return silent, silent.to(torch.int64) - 1
    before = probabilities(reference_logits, sigmoid=sigmoid)[:, suspects]
    after = probabilities(purified_logits, sigmoid=sigmoid)[:, suspects]
    loudest, which = (before * (1 - after)).max(dim=1)
    return loudest, torch.tensor(suspects)[which]


def check_exportable(module: nn.Module, *, precision: str = "fp32") -> None:
    """Refuse, before any work, what cannot become an ONNX graph.

    Raises:
        ExportError: One weight is larger than protobuf can hold, or all together than what int8 is made of.
    """
    sizes = [4 * tensor.numel() for tensor in (*module.parameters(), *module.buffers())]
    if max(sizes) > MAX_WEIGHT_BYTES:
        raise ExportError(
            expected=f"at most {MAX_WEIGHT_BYTES / 2**30:.2f} GiB of float32 in one weight, as ONNX has it",
            got=f"{max(sizes) / 2**30:.2f} GiB",
            fix="Choose a smaller architecture.",
        )
    if precision == "int8" and fills_two_files(sum(sizes)):
        raise ExportError(
            expected="float32 weights that fit one ONNX file, for int8 to be made of them",
            got=f"{sum(sizes) / 2**30:.2f} GiB",
            fix="Choose --precision fp32 or fp16.",
        )


def export_onnx(classifier: BundleClassifier, precision: str = "fp32") -> onnx.ModelProto:
    """Export the classifier of a bundle in float32.

    Args:
        classifier: On the CPU.
        precision: What is to be made of the graph.

    Returns:
        A checked model with one input and four outputs.

    Raises:
        ExportError: The exporter cannot express this architecture, or the result is not portable.
    """
    bundle = classifier.bundle
    module = ServedClassifier(bundle, classifier.image_encoder)
    check_exportable(module, precision=precision)
    example = torch.zeros((2, *bundle.preprocess.image_size, 3), dtype=torch.uint8)
    try:
        with _exporting(), torch.no_grad():
            program = torch.onnx.export(
                module.eval(),
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[*OUTPUTS, FEATURES],
                dynamic_shapes={INPUT: {0: torch.export.Dim("batch", min=1)}},
                external_data=False,
                verbose=False,
            )
            model: onnx.ModelProto = program.model_proto  # type: ignore[union-attr]
    except (RuntimeError, TypeError, ValueError, NotImplementedError, torch.onnx.OnnxExporterError) as error:
        raise ExportError(
            expected="an image tower torch.onnx can export",
            got=f"{type(error).__name__}: {' '.join(str(error).split()):.300}",
            fix="Choose another architecture; export/README.md lists those that are tested.",
        ) from error
    _forget_origin(model)
    _hide_features(model)
    write_metadata(model, describe(bundle, precision="fp32"))
    seal_weights(model)
    check_portable(model)
    return model


@contextmanager
def _exporting() -> Iterator[None]:
    """Attention in plain operators, and the exporters' chatter kept off stderr."""
    fast = torch.backends.mha.get_fastpath_enabled()
    levels = {name: logging.getLogger(name).level for name in _NOISY_LOGGERS}
    torch.backends.mha.set_fastpath_enabled(False)
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _forget_origin(model: onnx.ModelProto) -> None:
    """Remove source paths and stack traces: they differ between machines and are nobody's business."""
    model.doc_string = ""
    graph = model.graph
    graph.doc_string = ""
    graph.name = "cbpt_classifier"
    parts: list[Any] = [
        graph,
        *graph.node,
        *graph.input,
        *graph.output,
        *graph.value_info,
        *graph.initializer,
    ]
    for part in parts:
        part.doc_string = ""
        del part.metadata_props[:]
    del graph.value_info[:]


def _hide_features(model: onnx.ModelProto) -> None:
    kept = [value for value in model.graph.output if value.name != FEATURES]
    del model.graph.output[:]
    model.graph.output.extend(kept)
