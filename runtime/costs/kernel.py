# SPDX-License-Identifier: Apache-2.0
"""What can be measured: an operation, the form in which it is computed, and its sizes."""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["AXES", "Case", "Form", "Kernel", "Operation", "Shape", "work"]

Shape = tuple[int, ...]


class Operation(enum.Enum):
    """What is computed, whatever the form."""

    MATMUL = "matmul"
    CONV = "conv"
    SOFTMAX = "softmax"
    NORM = "norm"
    """A residual Add and LayerNormalization."""
    GELU = "gelu"
    ATTENTION = "attention"
    """softmax(Q K^T / sqrt(size)) V over all heads."""
    QUANTIZE = "quantize"
    DEQUANTIZE = "dequantize"
    CAST = "cast"
    """float32 to float16."""


class Form(enum.Enum):
    """How it is computed."""

    FLOAT = "fp32"
    """The ONNX operator, or those that it is made of."""
    STATIC_INT8 = "int8-static"
    """MatMul: QuantizeLinear of the input and MatMulIntegerToFloat; Conv: QLinearConv, codes to codes."""
    STATIC_QDQ = "int8-qdq"
    """QuantizeLinear and DequantizeLinear around the operator, as the runtime fuses them."""
    DYNAMIC_INT8 = "int8-dynamic"
    """DynamicQuantizeLinear and MatMulInteger or ConvInteger, scaled."""
    BLOCKS = "blocks"
    """MatMulNBits, of some bits, block and accuracy level."""
    FUSED = "fused"
    """One contrib operator without mask: SkipLayerNormalization, Gelu, MultiHeadAttention."""
    MASKED = "fused-masked"
    """MultiHeadAttention with a mask."""
    STANDARD = "standard"
    """The Attention operator of opset 23."""
    INT8 = "int8"
    """Codes to codes: QLinearSoftmax."""
    DYNAMIC = "dynamic"
    """DynamicQuantizeLinear, which also finds the range."""


_BLOCKS = re.compile(r"^blocks-w(?P<bits>\d+)-b(?P<block>\d+)-l(?P<level>\d+)(?P<zeros>-zp)?$")


@dataclass(frozen=True)
class Kernel:
    """One way of computing one operation.

    Attributes:
        operation: what.
        form: how.
        bits, block, level, zero_points: of MatMulNBits: its attributes (level is accuracy_level), and whether
            it has zero points.
    """

    operation: Operation
    form: Form = Form.FLOAT
    bits: int = 0
    block: int = 0
    level: int = 0
    zero_points: bool = False

    @staticmethod
    def blocks(bits: int, block: int, *, level: int = 4, zero_points: bool = True) -> Kernel:
        """Return MatMulNBits."""
        return Kernel(Operation.MATMUL, Form.BLOCKS, bits, block, level, zero_points)

    def __str__(self) -> str:
        form = self.form.value
        if self.form is Form.BLOCKS:
            form = f"blocks-w{self.bits}-b{self.block}-l{self.level}{'-zp' if self.zero_points else ''}"
        return f"{self.operation.value}/{form}"

    @staticmethod
    def parse(text: str) -> Kernel:
        """Return the kernel of a text such as ``matmul/blocks-w4-b32-l4-zp``.

        Raises:
            ValueError: there is none.
        """
        operation, _, form = text.partition("/")
        if (match := _BLOCKS.match(form)) is not None:
            bits, block, level = (int(match[name]) for name in ("bits", "block", "level"))
            return Kernel(Operation(operation), Form.BLOCKS, bits, block, level, match["zeros"] is not None)
        return Kernel(Operation(operation), Form(form))


AXES: Mapping[Operation, tuple[str, ...]] = {
    Operation.MATMUL: ("rows", "depth", "columns"),
    Operation.CONV: ("images", "channels", "outputs", "height", "width", "kernel", "stride", "groups"),
    Operation.SOFTMAX: ("rows", "width"),
    Operation.NORM: ("rows", "width"),
    Operation.GELU: ("rows", "width"),
    Operation.ATTENTION: ("batch", "heads", "tokens", "size"),
    Operation.QUANTIZE: ("elements",),
    Operation.DEQUANTIZE: ("elements",),
    Operation.CAST: ("elements",),
}
"""What the numbers of a shape mean. Height and width are those of a convolution's input; its padding keeps
them at stride 1."""


@dataclass(frozen=True)
class Case:
    """A kernel at a shape.

    Raises:
        ValueError: the shape has another number of axes than the operation, or one that is not positive.
    """

    kernel: Kernel
    shape: Shape

    def __post_init__(self) -> None:
        axes = AXES[self.kernel.operation]
        if len(self.shape) != len(axes) or min(self.shape) < 1:
            raise ValueError(
                f"the shape of {self.kernel} is {list(self.shape)}; it is {len(axes)} positive numbers: "
                f"{', '.join(axes)}."
            )

    def __str__(self) -> str:
        return f"{self.kernel} {'x'.join(map(str, self.shape))}"


def work(operation: Operation, shape: Shape) -> float:
    """Return multiply-adds, or elements where there are none: what time grows with, nearly."""
    if operation is Operation.CONV:
        images, channels, outputs, height, width, kernel, stride, groups = shape
        pixels = -(-height // stride) * -(-width // stride)
        return images * pixels * outputs * (channels / groups) * kernel * kernel
    if operation is Operation.ATTENTION:
        batch, heads, tokens, size = shape
        return 2.0 * batch * heads * tokens * tokens * size
    return float(math.prod(shape))
