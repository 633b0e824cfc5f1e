"""The ONNX file of a served classifier: what it says about itself and what it promises. Needs no torch.

Portable: opset 18 to 20, IR at most 10, standard operators, dynamic batch, one file or (above 2 GiB) two.

The operators are those that `export` writes, for any image tower, in float32, fp16 and int8. None runs a
graph inside it (If, Loop, Scan, SequenceMap), draws random numbers, reads text or images, or can be defined
by a file: what a graph of these does depends on its weights alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Final

import onnx

from cbpt_runtime.bundle import Bundle
from cbpt_runtime.errors import ExportError
from cbpt_runtime.export.manifest import WEIGHTS
from cbpt_runtime.export.weights import is_outside, needs_two_files, without_weights
from cbpt_runtime.runtime.prediction import OUTPUTS

_ARITHMETIC = """
    Abs Add Ceil Clip Cos Div Erf Exp Floor Log Max Min Mod Mul Neg Pow Reciprocal Round Sign Sin Sqrt Sub Sum
"""
_ACTIVATIONS = """
    Celu Elu Gelu HardSigmoid HardSwish LeakyRelu LogSoftmax Mish PRelu Relu Selu Sigmoid Softmax Softplus
    Softsign Tanh
"""
_COMPARISONS = """
    And ArgMax ArgMin Equal Greater GreaterOrEqual IsInf IsNaN Less LessOrEqual Not Or TopK Where Xor
"""
_LAYERS = """
    AveragePool BatchNormalization Conv ConvTranspose Einsum Gemm GlobalAveragePool GlobalMaxPool
    GroupNormalization InstanceNormalization LayerNormalization LpNormalization LpPool MatMul MaxPool
"""
_REDUCTIONS = """
    CumSum ReduceL1 ReduceL2 ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
    ReduceSumSquare
"""
_SHAPES = """
    Cast CastLike Concat Constant ConstantOfShape DepthToSpace Expand Flatten Gather GatherElements GatherND
    GridSample Identity Pad Range Reshape Resize ScatterElements ScatterND Shape Size Slice SpaceToDepth
    Split Squeeze Tile Transpose Trilu Unsqueeze
"""
_SEQUENCES = "SequenceAt SplitToSequence"  # a tensor split into parts, before optimisers make a Split of it
_QUANTISATION = "DequantizeLinear QuantizeLinear"

_GROUPS = (
    _ARITHMETIC,
    _ACTIVATIONS,
    _COMPARISONS,
    _LAYERS,
    _REDUCTIONS,
    _SHAPES,
    _SEQUENCES,
    _QUANTISATION,
)
OPERATORS: Final = frozenset(name for group in _GROUPS for name in group.split())
INPUT = "images"
FEATURES = "features"  # a tensor inside the graph
OPSETS = (18, 19, 20)
MAX_IR_VERSION = 10
_MOST_NAMED = 5
_PACKAGES = ("cbpt-runtime", "torch", "onnx", "onnxscript", "open_clip_torch", "timm")


def describe(bundle: Bundle, *, precision: str) -> dict[str, str]:
    """Return what a graph says about itself, as ONNX metadata."""
    threshold = bundle.alarm_threshold
    return {
        **({} if threshold is None else {"cbpt.alarm_threshold": json.dumps(threshold)}),
        "cbpt.bundle_digest": bundle.digest,
        "cbpt.checkpoint_sha256": bundle.origin.sha256,
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
    """Return the metadata of a model by key."""
    return {entry.key: entry.value for entry in model.metadata_props}


def write_metadata(model: onnx.ModelProto, metadata: Mapping[str, str]) -> None:
    """Replace the metadata of a model."""
    del model.metadata_props[:]
    for key in sorted(metadata):
        model.metadata_props.add(key=key, value=metadata[key])


def with_features(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy whose image features are an output too, for the parity gate."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    kind = onnx.TensorProto.FLOAT
    copy.graph.output.append(onnx.helper.make_tensor_value_info(FEATURES, kind, ["batch", None]))
    return copy


def nodes_after(model: onnx.ModelProto, tensor: str) -> list[str]:
    """Names of the nodes that depend on a tensor."""
    reached, names = {tensor}, []
    for node in model.graph.node:  # ONNX keeps them in topological order
        if reached & set(node.input):
            reached |= set(node.output)
            names.append(node.name)
    return names


def tidy(model: onnx.ModelProto) -> onnx.ModelProto:
    """Put right what converters leave behind: stale shapes, casts made twice, lost order, unused sets."""
    del model.graph.value_info[:]
    nodes = _in_order(model.graph)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    used = {node.domain or "" for node in model.graph.node}
    unused = [entry for entry in model.opset_import if entry.domain not in used]
    for entry in unused:
        model.opset_import.remove(entry)
    return model


def _in_order(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Return the nodes, each after those it depends on, and each tensor computed once."""
    makers = {name: node for node in reversed(graph.node) for name in node.output if name}
    ordered: list[onnx.NodeProto] = []
    done: set[str] = set()
    stack = [value.name for value in reversed(graph.output)]
    while stack:
        node = makers.get(stack[-1])
        missing = [] if node is None else [name for name in node.input if name in makers and name not in done]
        if stack[-1] in done or node is None:
            stack.pop()
        elif missing:
            stack.extend(reversed(missing))
        else:
            ordered.append(node)
            done.update(node.output)
            stack.pop()
    return ordered


def format_problems(model: onnx.ModelProto) -> list[str]:
    """Operator sets and a format that `export` does not write."""
    sets = [(entry.domain or "ai.onnx", entry.version) for entry in model.opset_import]
    problems = []
    if len(sets) != 1 or model.opset_import[0].domain or sets[0][1] not in OPSETS:
        problems.append(
            f"operator sets {', '.join(f'{domain} {number}' for domain, number in sets) or 'none'}"
        )
    if model.ir_version > MAX_IR_VERSION:
        problems.append(f"IR version {model.ir_version}")
    return problems


def foreign_operators(nodes: Sequence[onnx.NodeProto]) -> list[str]:
    """Names of operators that `export` does not write, with their domain where it is not the standard."""
    return sorted(
        {
            f"{node.domain}.{node.op_type}" if node.domain else str(node.op_type)
            for node in nodes
            if node.domain or node.op_type not in OPERATORS
        }
    )


def check_portable(model: onnx.ModelProto) -> None:
    """Check what every Triton release since 24.10 needs.

    Raises:
        ExportError: A newer operator set or format, an operator out of the standard or not in `OPERATORS`,
            which `serve` would refuse, weights in any other file than `WEIGHTS`, or not the inputs and
            outputs of a served classifier.
    """
    problems = [
        *format_problems(model),
        *(f"operator {name}" for name in foreign_operators(model.graph.node)),
    ]
    outside = [tensor for tensor in model.graph.initializer if is_outside(tensor)]
    places = {entry.value for each in outside for entry in each.external_data if entry.key == "location"}
    if places - {WEIGHTS}:
        problems.append("external data")
    names = ([value.name for value in model.graph.input], [value.name for value in model.graph.output])
    if names != ([INPUT], list(OUTPUTS)):
        problems.append(f"inputs and outputs {names}")
    elif not any(size.dim_param for size in model.graph.input[0].type.tensor_type.shape.dim[:1]):
        problems.append("a fixed batch size")
    if not problems:
        try:
            is_large = bool(outside) or needs_two_files(model)
            onnx.checker.check_model(without_weights(model) if is_large else model)
        except onnx.checker.ValidationError as error:
            problems.append(f"{' '.join(str(error).split()):.200}")
    if problems:
        raise ExportError(
            expected=f"an ONNX graph, opset 18 to 20, IR at most {MAX_IR_VERSION}, standard operators",
            got="; ".join(problems),
            fix="Install the package versions of constraints.txt.",
        )
