# SPDX-License-Identifier: Apache-2.0
"""Targets: what runs the artifact, and which low-bit carriers it has.

A target is data; passes ask it, never name it.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from splitfold.runtime.errors import UnsupportedError, did_you_mean
from splitfold.runtime.options import TAKING_TURNS, SessionOptions

if TYPE_CHECKING:
    from splitfold.runtime.costs.kernel import Case
    from splitfold.runtime.costs.measure import Meter
    from splitfold.runtime.costs.table import KernelCosts

__all__ = ["CPU_PROVIDER", "OPENVINO_PROVIDER", "Arithmetic", "Carrier", "Fusion", "Target"]

logger = logging.getLogger(__name__)

CPU_PROVIDER = "CPUExecutionProvider"
OPENVINO_PROVIDER = "OpenVINOExecutionProvider"


class Carrier(enum.Enum):
    """A way in which a target computes a layer with low-bit weights."""

    STATIC_QDQ = "static-qdq"
    """QuantizeLinear/DequantizeLinear around the operator, fused by the runtime to an integer kernel."""
    INTEGER_MATMUL = "integer-matmul"
    """com.microsoft::MatMulIntegerToFloat on quantized activations."""
    DYNAMIC_INT8 = "dynamic-int8"
    """DynamicQuantizeLinear and MatMulInteger, fused by the runtime to DynamicQuantizeMatMul /
    MatMulIntegerToFloat."""
    MATMUL_NBITS = "matmul-nbits"
    """com.microsoft::MatMulNBits: block-wise weights."""
    BLOCKED_DEQUANTIZE = "blocked-dequantize"
    """DequantizeLinear with `block_size` (opset 21) before a float MatMul."""
    GATHER_ROWS = "gather-rows"
    """Gather of integer rows, scaled after the gather."""
    GATHER_BLOCKS = "gather-blocks"
    """com.microsoft::GatherBlockQuantized: block-wise 4-bit tables."""


class Fusion(enum.Enum):
    """A fusion that the runtime of a target makes by itself."""

    SKIP_NORM = "skip-norm"
    """Add and LayerNormalization to SkipLayerNormalization."""


class Arithmetic(enum.Enum):
    """What a provider that has the choice computes float operators in."""

    F32 = "f32"
    BF16 = "bf16"
    """bfloat16, 8 bits of precision, where the processor has it."""


_ONNX_DOMAINS = ("", "ai.onnx", "ai.onnx.ml")


@dataclass(frozen=True)
class Target:
    """Where an artifact is to run.

    Args:
        name: text form, as in ``--target cpu``.
        provider: ONNX Runtime execution provider.
        opset: newest default-domain opset that the target is known to run.
        carriers: the low-bit carriers that the provider has kernels for.
        domains: operator domains that the provider has kernels for.
        weight_levels: largest magnitude of an 8-bit weight code: 127, or 63 (7 bits) where u8 x s8 sums
            saturate (x86 without VNNI).
        low_bit_kernels: operator types of the runtime's optimised graph that compute in low precision.
        slow_fusions: fusions of the runtime whose kernel is slower than what it replaces.
        left_out: standard operator types that the provider leaves to the CPU provider, which cuts the graph.
        compiles: the provider compiles the graph in one piece: no kernel of it can be listed or timed.
        arithmetic: what it computes float operators in.
        or_cpu: where the provider cannot be used, the CPU provider takes its place, with a warning.
        options: what every session is opened with.
        costs: what its kernels take, measured (`measure`, ``splitfold calibrate-target``); None is that
            nothing was. Two targets that differ only in it are equal.
    """

    name: str
    provider: str
    opset: int
    carriers: frozenset[Carrier]
    domains: tuple[str, ...] = (*_ONNX_DOMAINS, "com.microsoft")
    weight_levels: int = 127
    low_bit_kernels: frozenset[str] = field(default_factory=lambda: _CPU_KERNELS)
    slow_fusions: frozenset[Fusion] = frozenset()
    left_out: frozenset[str] = frozenset()
    compiles: bool = False
    arithmetic: Arithmetic = Arithmetic.F32
    or_cpu: bool = False
    options: SessionOptions = field(default_factory=SessionOptions)
    costs: KernelCosts | None = field(default=None, compare=False, repr=False)

    @staticmethod
    def cpu() -> Target:
        """Return ONNX Runtime's CPU provider on x86-64 with VNNI or Arm with dot products."""
        return Target(
            "cpu",
            CPU_PROVIDER,
            24,
            frozenset(Carrier),
            slow_fusions=frozenset({Fusion.SKIP_NORM}),
        )

    @staticmethod
    def openvino(*, arithmetic: Arithmetic = Arithmetic.F32, or_cpu: bool = False) -> Target:
        """Return OpenVINO's CPU device, by the provider of the extra ``splitfold[openvino]``.

        Its int8 kernels take QuantizeLinear/DequantizeLinear and weights in blocks. What it computes at run
        time from DynamicQuantizeLinear is slower than float, so that it carries no dynamic int8.

        Args:
            arithmetic: bfloat16, the provider's own default where the processor has it, must be asked for.
            or_cpu: where the provider cannot be used, the CPU provider takes its place, with a warning.
        """
        words = ["openvino"] + [arithmetic.value] * (arithmetic is not Arithmetic.F32) + ["or-cpu"] * or_cpu
        return Target(
            "-".join(words),
            OPENVINO_PROVIDER,
            24,
            _OPENVINO_CARRIERS,
            left_out=frozenset({"Attention", "RMSNormalization"}),
            low_bit_kernels=frozenset({"OpenVINO"}),
            compiles=True,
            arithmetic=arithmetic,
            or_cpu=or_cpu,
        )

    @staticmethod
    def named(name: str) -> Target:
        """Return the target of this text form.

        Raises:
            UnsupportedError: there is none.
        """
        if name not in _NAMED:
            near = did_you_mean(name, _NAMED)
            raise UnsupportedError(f"unknown target '{name}'.{near} Known: {', '.join(_NAMED)}.")
        return _NAMED[name]()

    def with_options(self, options: SessionOptions) -> Target:
        """Return the target whose sessions are opened with `options`."""
        return replace(self, options=options)

    def taking_turns(self) -> Target:
        """Return the target for sessions that are timed in turns: one's idle threads leave the cores to the
        next."""
        return self.with_options(self.options.joined(TAKING_TURNS))

    def with_costs(self, path: str | Path) -> Target:
        """Return the target with the kernel costs that a file holds; it is warned where they were measured on
        another processor or runtime.

        Raises:
            ArtifactError: the file holds none.
        """
        from splitfold.runtime.costs.file import read_costs
        from splitfold.runtime.costs.machine import Machine

        found = read_costs(path)
        if differences := found.machine.differences(Machine.here(found.machine.threads)):
            logger.warning(
                "%s was measured elsewhere: %s. Its times may be wrong here: splitfold calibrate-target "
                "measures them again.",
                path,
                "; ".join(differences),
            )
        return replace(self, costs=found)

    def measure(self, cases: Iterable[Case] | None = None, *, meter: Meter | None = None) -> Target:
        """Return the target with what its kernels take on this machine, beside what it knew of it.

        Args:
            cases: what to measure, as far as it is not known; default the shapes of common networks, which
                take about a minute.
            meter: what takes the times; default sessions with the runtime's own choice of threads.
        """
        from splitfold.runtime.costs.grid import common_cases
        from splitfold.runtime.costs.machine import Machine
        from splitfold.runtime.costs.measure import SessionMeter, measure_cases
        from splitfold.runtime.costs.table import KernelCosts

        here = Machine.here()
        known = self.costs if self.costs is not None and self.costs.machine == here else KernelCosts(here, {})
        wanted = known.missing(common_cases() if cases is None else cases)
        found = measure_cases(wanted, meter or SessionMeter(self))
        return replace(self, costs=known.with_samples(found.samples))

    def supports(self, node: ir.Node) -> bool:
        """Whether operators of the domain of `node` are expected to run; a custom domain is not known to."""
        return node.domain in self.domains

    def carries(self, carrier: Carrier) -> bool:
        """Whether the target has kernels for `carrier`."""
        return carrier in self.carriers


_CPU_KERNELS: frozenset[str] = frozenset(
    {
        "ConvInteger",
        "DynamicQuantizeLSTM",
        "DynamicQuantizeMatMul",
        "GatherBlockQuantized",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "QAttention",
        "QGemm",
        "QLinearAdd",
        "QLinearAveragePool",
        "QLinearConcat",
        "QLinearConv",
        "QLinearGlobalAveragePool",
        "QLinearLeakyRelu",
        "QLinearMatMul",
        "QLinearMul",
        "QLinearSigmoid",
        "QLinearSoftmax",
        "QLinearWhere",
    }
)

_OPENVINO_CARRIERS = frozenset(
    {
        Carrier.STATIC_QDQ,
        Carrier.MATMUL_NBITS,
        Carrier.BLOCKED_DEQUANTIZE,
        Carrier.GATHER_ROWS,
        Carrier.GATHER_BLOCKS,
    }
)

_NAMED: Mapping[str, Callable[[], Target]] = {
    "cpu": Target.cpu,
    "openvino": Target.openvino,
    "openvino-bf16": partial(Target.openvino, arithmetic=Arithmetic.BF16),
    "openvino-or-cpu": partial(Target.openvino, or_cpu=True),
    "openvino-bf16-or-cpu": partial(Target.openvino, arithmetic=Arithmetic.BF16, or_cpu=True),
}
