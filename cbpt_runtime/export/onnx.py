"""A served classifier as the bytes of one ONNX file: portable, deterministic, and saying what it is.

Portable: opset 18, IR 10, standard operators, one file, dynamic batch. Deterministic: the same bundle and
the same packages give the same bytes; what exporters leave in a file about the machine (source paths, stack
traces) is removed.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import onnx
import torch
from torch import nn

from cbpt_runtime.bundle import Bundle
from cbpt_runtime.errors import ExportError
from cbpt_runtime.export.graph import FEATURES, INPUT, OUTPUTS, ServedClassifier

OPSET = 18
MAX_IR_VERSION = 10
MAX_SIZE_BYTES = 2**31 - 2**24  # a protobuf message ends at 2 GiB; some room for the graph itself
_PACKAGES = ("cbpt-runtime", "torch", "onnx", "onnxscript", "open_clip_torch", "timm")
_NOISY_LOGGERS = ("onnxscript", "onnx_ir", "torch.onnx")


def check_exportable(module: nn.Module) -> None:
    """Refuse, before any work, what cannot become one ONNX file.

    Raises:
        ExportError: The weights are larger than one file can hold.
    """
    tensors = [*module.parameters(), *module.buffers()]
    size_bytes = sum(4 * tensor.numel() for tensor in tensors)
    if size_bytes > MAX_SIZE_BYTES:
        raise ExportError(
            expected=f"at most {MAX_SIZE_BYTES / 2**30:.2f} GiB of float32 weights, what one ONNX file holds",
            got=f"{size_bytes / 2**30:.2f} GiB",
            fix="Choose a smaller architecture.",
        )


def export_onnx(module: ServedClassifier, bundle: Bundle) -> onnx.ModelProto:
    """Export in float32.

    Args:
        module: On the CPU, in evaluation mode.
        bundle: What it was made from; named in the file's metadata.

    Returns:
        A checked model with one input and three outputs.

    Raises:
        ExportError: The exporter cannot express this architecture, or the result is not portable.
    """
    check_exportable(module)
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
    check_portable(model)
    return model


def describe(bundle: Bundle, *, precision: str) -> dict[str, str]:
    """What a graph says about itself, as ONNX metadata."""
    return {
        "cbpt.bundle_digest": bundle.digest,
        "cbpt.checkpoint_sha256": str(bundle.manifest["model"].get("sha256", "")),
        "cbpt.class_names": json.dumps(bundle.class_names, ensure_ascii=False),
        "cbpt.exporter": "torch.onnx dynamo",
        "cbpt.precision": precision,
        "cbpt.preprocess": json.dumps(bundle.preprocess.to_dict()),
        "cbpt.probabilities": "softmax" if bundle.logit_bias is None else "sigmoid",
        "cbpt.suspects": json.dumps(bundle.suspect_indices),
        "cbpt.verdict": bundle.verdict,
        "cbpt.versions": json.dumps({package: version(package) for package in _PACKAGES}),
    }


def read_metadata(model: onnx.ModelProto) -> dict[str, str]:
    """The metadata of a model by key."""
    return {entry.key: entry.value for entry in model.metadata_props}


def write_metadata(model: onnx.ModelProto, metadata: Mapping[str, str]) -> None:
    """Replace the metadata of a model."""
    del model.metadata_props[:]
    for key in sorted(metadata):
        model.metadata_props.add(key=key, value=metadata[key])


def to_bytes(model: onnx.ModelProto) -> bytes:
    """The file's content; equal models give equal bytes."""
    return bytes(model.SerializeToString(deterministic=True))


def with_features(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose image features are an output too, for the parity gate."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    kind = onnx.TensorProto.FLOAT
    copy.graph.output.append(onnx.helper.make_tensor_value_info(FEATURES, kind, ["batch", None]))
    return copy


def check_portable(model: onnx.ModelProto) -> None:
    """Check what every Triton release since 24.10 needs.

    Raises:
        ExportError: A newer operator set or format, an operator outside the standard, external data, or not
            the inputs and outputs of a served classifier.
    """
    problems = []
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    if set(opsets) != {""} or not 18 <= opsets[""] <= 20:
        problems.append(f"operator sets {opsets}")
    if model.ir_version > MAX_IR_VERSION:
        problems.append(f"IR version {model.ir_version}")
    foreign = sorted({node.op_type for node in model.graph.node if node.domain not in ("", "ai.onnx")})
    problems += [f"operator {name}" for name in foreign]
    if any(tensor.external_data for tensor in model.graph.initializer):
        problems.append("external data")
    names = ([value.name for value in model.graph.input], [value.name for value in model.graph.output])
    if names != ([INPUT], list(OUTPUTS)):
        problems.append(f"inputs and outputs {names}")
    elif model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "":
        problems.append("a fixed batch size")
    if not problems:
        try:
            onnx.checker.check_model(model)
        except onnx.checker.ValidationError as error:
            problems.append(f"{' '.join(str(error).split()):.200}")
    if problems:
        raise ExportError(
            expected=f"one ONNX file, opset 18 to 20, IR at most {MAX_IR_VERSION}, standard operators",
            got="; ".join(problems),
            fix="Install the package versions of constraints.txt.",
        )


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
