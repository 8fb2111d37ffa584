# SPDX-License-Identifier: Apache-2.0
"""What a layer computes in: the bits of its weights and of its input, really carried or only simulated."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import ClassVar

from splitfold.passes.errors import SpecError
from splitfold.passes.worded import Worded
from splitfold.runtime.errors import did_you_mean
from splitfold.runtime.target import Carrier

__all__ = ["ActivationPrecision", "ActivationRange", "Precision", "WeightPrecision"]

_FLOAT = "fp32"
_BLOCKS = (16, 32, 64, 128, 256)
_REAL_BLOCK = 32
_REAL_BITS = (2, 3, 4, 8)
_BLOCKWISE = re.compile(r"^w(?P<bits>\d)(-b(?P<block>\d+))?(?P<sym>-sym)?$")
_SIMULATED = re.compile(r"^sim-(w(?P<w>\d))?(a(?P<a>\d))?$")
_EXAMPLES = (
    "fp32",
    "int8-static",
    "int8-dynamic",
    "w8",
    "w4",
    "w3",
    "w2",
    "w4-b64-sym",
    "sim-w4",
    "sim-w4a8",
)
_FLOAT_BITS = 32


class ActivationRange(enum.Enum):
    """When the range of a layer's input is chosen."""

    STATIC = "static"
    """On calibration data, once."""
    DYNAMIC = "dynamic"
    """In each call."""


@dataclass(frozen=True)
class WeightPrecision:
    """How weights are held.

    Attributes:
        bits: 2 to 8.
        block: weights of a column that share a scale; None is one scale an output channel.
        symmetric: whether zero is at the middle of the codes; else there are zero points.
    """

    bits: int
    block: int | None = None
    symmetric: bool = True


@dataclass(frozen=True)
class ActivationPrecision:
    """How a layer's input is rounded: one grid of `bits` bits a tensor."""

    bits: int
    range: ActivationRange = ActivationRange.STATIC


@dataclass(frozen=True)
class Precision(Worded):
    """What a layer computes in.

    Real ones are the carriers of a target: float, static int8, dynamic int8, and weights in blocks of 2, 3
    (stored in 4), 4 or 8 bits (MatMulNBits, which computes in int8 at accuracy level 4). Simulated ones round
    weights and inputs to 2 to 8 bits and compute in float, for research: neither smaller nor faster.

    The text form: ``fp32``, ``int8-static``, ``int8-dynamic``; ``w4`` (blocks of 32 with zero points),
    ``w4-b64``, ``w4-b64-sym``; ``sim-w4`` (a scale and zero point a channel), ``sim-w4a8``, ``sim-a8``.

    Attributes:
        weight: how weights are held; None is float.
        activation: how the input is rounded; None is not at all.
        simulated: whether it is computed in float with rounded values.
    """

    described: ClassVar[str] = f"a precision such as {', '.join(_EXAMPLES)}"

    weight: WeightPrecision | None = None
    activation: ActivationPrecision | None = None
    simulated: bool = False

    def __post_init__(self) -> None:
        for part in (self.weight, self.activation):
            if part is not None and not 2 <= part.bits <= 8:
                raise ValueError(f"bits is {part.bits}; it lies between 2 and 8.")
        block = self.weight.block if self.weight is not None else None
        if block is not None and block not in _BLOCKS:
            raise ValueError(f"block is {block}; it may be one of {', '.join(map(str, _BLOCKS))}.")
        if self.simulated:
            self._check_simulated()
        elif not self._is_carrier:
            raise ValueError(
                f"no carrier of a target holds {self.weight} with {self.activation}: simulate it, or take "
                f"one of {', '.join(_EXAMPLES[:4])}."
            )

    def _check_simulated(self) -> None:
        if self.is_float:
            raise ValueError("nothing is rounded: that is fp32.")
        if self.weight is not None and (self.weight.block is not None or self.weight.symmetric):
            raise ValueError("simulated weights have one scale and zero point an output channel.")
        if self.activation is not None and self.activation.range is not ActivationRange.STATIC:
            raise ValueError("simulated activations have a calibrated range.")

    @property
    def _is_carrier(self) -> bool:
        weight, activation = self.weight, self.activation
        if weight is None:
            return activation is None
        if activation is not None:
            return activation.bits == weight.bits == 8 and weight.block is None and weight.symmetric
        return weight.block is not None and weight.bits in _REAL_BITS

    @property
    def is_float(self) -> bool:
        """Whether nothing is rounded."""
        return self.weight is None and self.activation is None

    @property
    def weight_bits(self) -> int:
        """Bits of a weight's code, 32 in float."""
        return _FLOAT_BITS if self.weight is None else self.weight.bits

    @property
    def activation_bits(self) -> int:
        """Bits of an element of the input, 32 in float."""
        return _FLOAT_BITS if self.activation is None else self.activation.bits

    @property
    def carrier(self) -> Carrier | None:
        """What the target must have; None where it is float or simulated."""
        if self.simulated or self.weight is None:
            return None
        if self.activation is None:
            return Carrier.MATMUL_NBITS
        static = self.activation.range is ActivationRange.STATIC
        return Carrier.STATIC_QDQ if static else Carrier.DYNAMIC_INT8

    @classmethod
    def parse(cls, text: str) -> Precision:
        """Return the precision of a text form.

        Raises:
            SpecError: there is none of this form, or nothing carries it.
        """
        word = text.strip()
        known = {_FLOAT: cls.float(), "int8-static": cls.int8_static(), "int8-dynamic": cls.int8_dynamic()}
        if word in known:
            return known[word]
        try:
            if match := _BLOCKWISE.match(word):
                block = int(match["block"] or _REAL_BLOCK)
                return cls.blocks(int(match["bits"]), block, symmetric=match["sym"] is not None)
            if match := _SIMULATED.match(word):
                return cls.simulate(*(int(match[key]) if match[key] else None for key in ("w", "a")))
        except ValueError as error:
            raise SpecError(f"precision '{word}': {error}") from error
        near = did_you_mean(word, _EXAMPLES)
        raise SpecError(f"unknown precision '{word}'.{near} It is written such as {', '.join(_EXAMPLES)}.")

    @staticmethod
    def float() -> Precision:
        """Return float32."""
        return Precision()

    @staticmethod
    def int8_static() -> Precision:
        """Return static int8: weights per channel, inputs per tensor, both calibrated."""
        return Precision(WeightPrecision(8), ActivationPrecision(8))

    @staticmethod
    def int8_dynamic() -> Precision:
        """Return dynamic int8: weights per column, inputs per tensor and call."""
        return Precision(WeightPrecision(8), ActivationPrecision(8, ActivationRange.DYNAMIC))

    @staticmethod
    def blocks(bits: int, block: int = _REAL_BLOCK, *, symmetric: bool = False) -> Precision:
        """Return weights in blocks, inputs in float."""
        return Precision(WeightPrecision(bits, block, symmetric))

    @staticmethod
    def simulate(weights: int | None, activations: int | None = None) -> Precision:
        """Return these bits, 2 to 8, simulated; None is float."""
        return Precision(
            None if weights is None else WeightPrecision(weights, symmetric=False),
            None if activations is None else ActivationPrecision(activations),
            simulated=True,
        )

    def __str__(self) -> str:
        if self.simulated:
            parts = ((letter, part) for letter, part in (("w", self.weight), ("a", self.activation)))
            return "sim-" + "".join(f"{letter}{part.bits}" for letter, part in parts if part is not None)
        if self.weight is None:
            return _FLOAT
        if self.activation is not None:
            return f"int8-{self.activation.range.value}"
        block = "" if self.weight.block == _REAL_BLOCK else f"-b{self.weight.block}"
        return f"w{self.weight.bits}{block}{'-sym' if self.weight.symmetric else ''}"
