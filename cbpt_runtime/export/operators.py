"""The ONNX operators that `export` writes, for any image tower, in float32, fp16 and int8.

All are of the standard. None runs a graph inside it (If, Loop, Scan, SequenceMap), draws random numbers,
reads text or images, or can be defined by a file: what a graph of these does depends on its weights alone.
"""

from __future__ import annotations

from typing import Final

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
