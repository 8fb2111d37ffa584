# SPDX-License-Identifier: Apache-2.0
"""What each operator is to relevance propagation: one table by ONNX operator type."""

from __future__ import annotations

import enum
from collections.abc import Mapping

__all__ = ["Kind", "kind_of"]


class Kind(enum.Enum):
    """How an operator's relevance is shared."""

    LINEAR = "linear"
    """A product with a constant weight by the linear rules; of two activations by the product rule."""
    PRODUCT = "product"
    """Element by element: a factor that is constant, or counts as constant, gets nothing."""
    QUOTIENT = "quotient"
    """The numerator gets all; a constant numerator leaves it to the denominator."""
    SUM = "sum"
    """By the rule of sums."""
    SOFTMAX = "softmax"
    """By the rule of softmax."""
    NORM = "norm"
    """By the rule of norms."""
    AFFINE = "affine"
    """x * dz/dx * R / z, what is added keeps its share: operators linear in their activations."""
    ELEMENTWISE = "elementwise"
    """The first activation gets all, unchanged: functions of one number."""
    MOVE = "move"
    """Relevance goes where the number came from: the transposed Jacobian times it."""


_OPERATORS: Mapping[Kind, str] = {
    Kind.LINEAR: "MatMul Gemm Conv ConvTranspose FusedMatMul MatMulNBits",
    Kind.PRODUCT: "Mul",
    Kind.QUOTIENT: "Div",
    Kind.SUM: "Add Sub Sum",
    Kind.SOFTMAX: "Softmax LogSoftmax",
    Kind.NORM: (
        "LayerNormalization RMSNormalization SimplifiedLayerNormalization InstanceNormalization "
        "GroupNormalization LpNormalization MeanVarianceNormalization LRN"
    ),
    Kind.AFFINE: (
        "BatchNormalization ReduceMean ReduceSum ReduceL1 ReduceL2 AveragePool GlobalAveragePool LpPool "
        "GlobalLpPool Mean Resize Upsample CumSum Einsum RotaryEmbedding DFT"
    ),
    Kind.ELEMENTWISE: (
        "Abs Acos Acosh Asin Asinh Atan Atanh Celu Clip Cos Cosh Elu Erf Exp Gelu HardSigmoid HardSwish "
        "LeakyRelu Log Mish Neg PRelu Pow QuickGelu Reciprocal Relu Round Selu Shrink Sigmoid Sin Sinh "
        "Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu QuantizeLinear DequantizeLinear"
    ),
    Kind.MOVE: (
        "Cast CastLike CenterCropPad Compress Concat DepthToSpace Dropout Expand Flatten Gather "
        "GatherElements GatherND GlobalMaxPool Identity Max MaxPool Min Pad ReduceMax ReduceMin Reshape "
        "ReverseSequence Slice SpaceToDepth Split Squeeze Tile TopK Transpose Trilu Unsqueeze Where"
    ),
}
_KINDS = {name: kind for kind, names in _OPERATORS.items() for name in names.split()}


def kind_of(operator: str) -> Kind | None:
    """Return the kind of an ONNX operator type, or None where no rule is for it."""
    return _KINDS.get(operator)
