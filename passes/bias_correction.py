# SPDX-License-Identifier: Apache-2.0
"""Bias correction: what rounding moves in the mean of a layer's output goes back into the layer's bias.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.2 and
appendix D (the empirical form). With the float output y = W x + b and the quantized one y' = Q(W) x' + b',
where x' has gone through all quantized layers before, each output channel c has

    E[y_c] - E[y'_c] = e_c,    b'_c <- b'_c + e_c.

Layers are corrected in order of execution, each behind the corrected ones: all at once would correct the same
shift again in every layer that it passes.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from splitfold.passes.base import Findings
from splitfold.passes.identity import display_layer
from splitfold.passes.values import add_initializer, constant, drop_initializer, forget_names
from splitfold.passes.walk import Walk
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.compare import deviation
from splitfold.runtime.feeds import Array, Feeds
from splitfold.runtime.session import Session
from splitfold.runtime.target import Target

__all__ = ["BiasCorrection", "correct_biases", "shift"]

Floats = npt.NDArray[np.float64]


class BiasCorrection(enum.Enum):
    """Which quantized layers are corrected."""

    NONE = "none"
    CONVOLUTIONS = "convolutions"
    ALL = "all"
    """Also MatMul and Gemm, where the bias is an input of the operator."""

    def takes(self, output: ir.Value) -> bool:
        """Whether the layer that computes `output` is one of them."""
        node = output.producer()
        if node is None or self is BiasCorrection.NONE:
            return False
        return self is BiasCorrection.ALL or node.op_type == "Conv"


_BATCHES = 16
"""Calibration batches that are walked through; all their live values are held."""
_CHANCE = 1.0
"""Squared standard errors of a mean that are taken off its square."""
_BIAS_INPUT = {"Conv": 2, "Gemm": 2, "MatMulIntegerToFloat": 6}
_INT32 = np.iinfo(np.int32)


@dataclass(frozen=True, eq=False)
class _Bias:
    """The bias of a quantized layer.

    Attributes:
        node: the layer.
        reference: name of the value of the float model that its output stands for.
        reader: the node that reads the constant: the layer, or the DequantizeLinear before it.
        at: which input of the reader the constant is.
        step: value of one of its codes by channel, or 1 where it is held in float.
    """

    node: ir.Node
    reference: str
    reader: ir.Node
    at: int
    step: Floats

    @property
    def output(self) -> ir.Value:
        return self.node.outputs[0]

    @property
    def held(self) -> ir.Value:
        """The constant."""
        value = self.reader.inputs[self.at]
        if value is None or constant(value) is None:
            raise ValueError(f"{self.node.name}: its bias is no constant")
        return value

    def move(self, by: Floats) -> Floats:
        """Read a constant moved by `by`, one number a channel, where codes hold it; return what was added."""
        old, graph = self.held, self.reader.graph
        tensor = constant(old)
        if graph is None or tensor is None:
            raise ValueError(f"{self.node.name}: it is in no graph")
        before = tensor.numpy()
        codes = before.astype(np.float64) + by / self.step
        if before.dtype == np.int32:
            codes = np.clip(np.rint(codes), _INT32.min, _INT32.max)
        after = codes.astype(before.dtype)
        self.read(add_initializer(graph, f"{old.name}_corrected", after))
        moved: Floats = (after.astype(np.float64) - before.astype(np.float64)) * self.step
        return moved

    def read(self, value: ir.Value) -> None:
        """Read `value` instead."""
        self.reader.replace_input_with(self.at, value)


def correct_biases(
    model: ir.Model,
    reference: ir.Model,
    made: Mapping[str, ir.Value],
    calibration: Calibration,
    target: Target,
    findings: Findings,
) -> None:
    """Correct the biases of the quantized layers of `model`, made from `reference`, and keep that where the
    outputs come nearer to the reference on the calibration data; `findings.notes` says so.

    Layers without a constant bias of their own are left alone, with the reason on record.

    Args:
        model: quantized; changed in place.
        reference: in float.
        made: by name of a value of `reference`, what computes it in `model`: an output of a quantized layer,
            before its grid.
        calibration: representative inputs; the first 16 batches are used.
        target: where both run.
        findings: takes the notes.
    """
    forget_names(model)
    batches = list(itertools.islice(calibration, _BATCHES))
    biases = _biases(model, made, findings)
    if not biases:
        return
    were = [bias.held for bias in biases]
    before = _sqnr(reference, model, batches, target)
    _correct(model, reference, biases, batches, target)
    after = _sqnr(reference, model, batches, target)
    if after > before:
        for value in were:
            drop_initializer(value)
        findings.notes.append(
            f"biases of {len(biases)} layers corrected: outputs rise from {before:.1f} dB to {after:.1f} dB"
            " on calibration data"
        )
        return
    for bias, value in zip(biases, were, strict=True):
        moved = bias.held
        bias.read(value)
        drop_initializer(moved)
    findings.notes.append(
        f"no bias was corrected: outputs would go from {before:.1f} dB to {after:.1f} dB on calibration data"
    )


def shift(reference: Sequence[Array], actual: Sequence[Array], *, linear: bool) -> Floats:
    """Return what the mean of each channel of `actual` lacks, less what its samples show by chance.

    The mean over samples m with the standard error s is taken as m max(0, 1 - s^2 / m^2), since a mean of few
    samples is off by itself, and a bias moved by chance adds noise.

    Args:
        reference, actual: arrays by batch, [samples, channels, ...].
        linear: whether they are [samples, ..., channels].
    """
    pairs = zip(reference, actual, strict=True)
    rows = np.concatenate([_means(one, linear) - _means(other, linear) for one, other in pairs])
    if len(rows) < 2:
        return np.zeros(rows.shape[1])
    mean = rows.mean(axis=0)
    chance = rows.var(axis=0, ddof=1) / len(rows)
    share = np.maximum(0, 1 - _CHANCE * chance / np.maximum(mean**2, np.finfo(np.float64).tiny))
    found: Floats = mean * share
    return found


def _means(array: Array, linear: bool) -> Floats:
    """The mean of each channel by sample, [samples, channels]."""
    channels = array.shape[-1 if linear else 1]
    turned = np.moveaxis(array, 1, -1) if not linear else array
    whole: Floats = turned.reshape(len(array), -1, channels).mean(axis=1, dtype=np.float64)
    return whole


def _correct(
    model: ir.Model,
    reference: ir.Model,
    biases: Sequence[_Bias],
    batches: Sequence[Feeds],
    target: Target,
) -> None:
    """Walk through both models side by side and move each bias."""
    wanted, walked = Walk(reference, batches, target), Walk(model, batches, target)
    for bias in biases:
        name, linear = bias.output.name or "", bias.node.op_type != "Conv"
        is_as = [made[name] for made in walked.values([name])]
        should_be = [made[bias.reference] for made in wanted.values([bias.reference])]
        by = bias.move(shift(should_be, is_as, linear=linear))
        walked.amend(name, [_added(array, by, linear) for array in is_as])


def _added(array: Array, by: Floats, linear: bool) -> Array:
    spread = by if linear else by.reshape([-1, *[1] * (array.ndim - 2)])
    return np.asarray(array + spread, dtype=array.dtype)


def _biases(model: ir.Model, made: Mapping[str, ir.Value], findings: Findings) -> list[_Bias]:
    """The biases of the layers that compute `made`, in order of execution."""
    names = {value.producer(): name for name, value in made.items()}
    found = []
    for node in model.graph:
        if node not in names:
            continue
        bias = _bias(node, names[node]) if node.op_type in _BIAS_INPUT else None
        if bias is None:
            findings.miss(display_layer(node), "bias correction", "it has no constant bias of its own")
        else:
            found.append(bias)
    return found


def _bias(node: ir.Node, reference: str) -> _Bias | None:
    at = _BIAS_INPUT[node.op_type]
    value = node.inputs[at] if at < len(node.inputs) else None
    if value is None:
        return None
    if constant(value) is not None:
        return _Bias(node, reference, node, at, np.array(1.0))
    reader = value.producer()
    if reader is None or reader.op_type != "DequantizeLinear" or len(list(value.uses())) > 1:
        return None
    step = constant(reader.inputs[1])
    if step is None or constant(reader.inputs[0]) is None:
        return None
    return _Bias(node, reference, reader, 0, step.numpy().astype(np.float64))


def _sqnr(reference: ir.Model, model: ir.Model, batches: Sequence[Feeds], target: Target) -> float:
    """The smallest SQNR in dB of an output of `model` on these batches."""
    sessions = Session(reference, target), Session(model, target)
    runs: list[tuple[Mapping[str, Array], ...]] = [
        tuple(it.run(feeds) for it in sessions) for feeds in batches
    ]
    return min(
        deviation([one[name] for one, _ in runs], [other[name] for _, other in runs]).sqnr_db
        for name in runs[0][0]
    )
