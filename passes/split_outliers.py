# SPDX-License-Identifier: Apache-2.0
"""Outliers apart: a linear layer as a dense layer of few bits and the few channels that need more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from splitfold.passes.activations import required_calibration
from splitfold.passes.base import Context, Contract, Findings, LayerPass
from splitfold.passes.branches import Part, branch_of_node
from splitfold.passes.candidates import candidate_layers
from splitfold.passes.gram import GramRequest, grams_in_chunks
from splitfold.passes.gram_loss import normalised
from splitfold.passes.layers import Layer, LayerKind
from splitfold.passes.outlier_cuts import Axis, Cut, Held, OutlierScore, OutputCost, Split, cuts
from splitfold.passes.outlier_parts import emit_cut
from splitfold.passes.outlier_share import share_out
from splitfold.passes.values import drop_unused, replace_value
from splitfold.passes.weight_methods import WeightMethod
from splitfold.runtime.feeds import Array

__all__ = ["Axis", "OutlierScore", "SplitOutliersPass"]

_BLOCKS = (16, 32, 64, 128, 256)
_LARGEST = 0.5
_METHODS = (WeightMethod.RTN, WeightMethod.MSE)


@dataclass(frozen=True)
class SplitOutliersPass(LayerPass):
    """Hold the few channels of a linear layer that cost most error apart, so that they can have more bits.

    The parts are layers of their own to later passes: ``name:outliers`` and ``name:rest`` in patterns. A
    layer is split only where the sum of both parts, in the formats that the options name, is expected to be
    more exact than plain weights of as many bytes. Exact: each weight stands in one of the parts, bit for
    bit.

    Args:
        bits: in which the rest will be held: 2, 3 or 4.
        block: of the rest.
        symmetric: of the rest.
        method: how the rest will be rounded: rtn or mse (for awq, gptq and dgq say mse).
        outlier_bits: of the outliers, 4 or 8. They are symmetric.
        outlier_block: of the outliers, and how many input channels leave at a time.
        axis: input channels, output channels, or whichever gains more.
        by: what channels are ranked by: error (with calibration data: of the output), weight or activation.
        share: largest part of all weights that may stand apart, given to the layers that gain most for a
            byte.
        most: largest part of one layer's channels.
        min_gain: dB by which a split layer must be more exact than plain weights of as many bytes.

    Before::

        y = MatMul(x, W)

    After::

        rest = MatMul(x, W without some rows)
        outliers = MatMul(Gather<axis=-1>(x, channels), those rows of W)
        y = Add(rest, outliers)
    """

    name: ClassVar[str] = "split-outliers"
    contract: ClassVar[Contract] = Contract.EXACT
    takes: ClassVar[str] = "MatMul and Gemm with a constant float32 weight"
    bits: int = 4
    block: int = 32
    symmetric: bool = False
    method: WeightMethod = WeightMethod.RTN
    outlier_bits: int = 8
    outlier_block: int = 16
    axis: Axis = Axis.BEST
    by: OutlierScore = OutlierScore.ERROR
    share: float = 0.05
    most: float = 0.25
    min_gain: float = 0.5

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4):
            raise ValueError(f"bits is {self.bits}; it may be 2, 3 or 4.")
        if self.outlier_bits not in (4, 8) or self.outlier_bits <= self.bits:
            raise ValueError(
                f"outlier-bits is {self.outlier_bits}; it may be 4 or 8, above bits={self.bits}."
            )
        for name, block in (("block", self.block), ("outlier-block", self.outlier_block)):
            if block not in _BLOCKS:
                raise ValueError(f"{name} is {block}; it may be 16, 32, 64, 128 or 256.")
        if self.method not in _METHODS:
            raise ValueError(
                f"method is {self.method.value}; it may be rtn or mse, the nearest to the others."
            )
        for name, part in (("share", self.share), ("most", self.most)):
            if not 0 < part <= _LARGEST:
                raise ValueError(f"{name} is {part}; it lies above 0 and is at most {_LARGEST}.")
        if self.axis is Axis.OUTPUT and self.by is OutlierScore.ACTIVATION:
            raise ValueError("by=activation ranks input channels: axis=output has none.")

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""
        layers = candidate_layers(self, model, findings, self._reason_against)
        whole = [layer for layer in layers if layer.part is None]
        done = dict.fromkeys(layer.name for layer in layers if layer.part is not None)
        findings.skipped.extend((name, "split already") for name in done)
        users = self._users(whole, findings)
        menus = dict(self._menus(model, users, context, findings))
        chosen = share_out(menus, self._budget(layers), self.min_gain)
        for weight, own in users.items():
            if weight in chosen:
                self._split(own, chosen[weight], findings)
            elif weight in menus:
                self._skip(
                    own,
                    f"it does not fit in share={self.share:g} beside what gains more for a byte",
                    findings,
                )
        if chosen:
            findings.notes.append(self._note(chosen))
        return bool(chosen)

    def _reason_against(self, layer: Layer) -> str | None:
        if layer.kind is LayerKind.CONV:
            return "a Conv has no block-wise carrier"
        if layer.weight.dtype is not ir.DataType.FLOAT:
            return f"the weight is {layer.weight.dtype}, not FLOAT"
        if layer.part is None and branch_of_node(layer.node):
            return "it is a part of a split layer"
        return None

    def _users(self, layers: Sequence[Layer], findings: Findings) -> dict[ir.Value, list[Layer]]:
        """Return the layers by weight, of weights that nobody else reads: those would be stored twice."""
        users: dict[ir.Value, list[Layer]] = {}
        for layer in layers:
            users.setdefault(layer.weight, []).append(layer)
        for weight, own in list(users.items()):
            other = next((use.node for use in weight.uses() if use.node not in [it.node for it in own]), None)
            if other is not None:
                self._skip(own, f"its weight is also read by '{other.name}', which is not split", findings)
                del users[weight]
        return users

    def _skip(self, layers: Sequence[Layer], reason: str, findings: Findings) -> None:
        for layer in layers:
            findings.skip(layer.name, f"kept whole: {reason}")

    def _budget(self, layers: Sequence[Layer]) -> int:
        """Return how many weights may still stand apart."""
        sizes = {layer.weight: (layer.part, layer.weight_array()) for layer in layers}
        apart = sum(array.size for part, array in sizes.values() if part is Part.OUTLIERS)
        # rows of the rest that are zero were counted with the outliers
        total = sum(
            np.count_nonzero(array.any(1)) * array.shape[1] if part is Part.REST else array.size
            for part, array in sizes.values()
        )
        return int(self.share * total) - apart

    def _menus(
        self,
        model: ir.Model,
        users: Mapping[ir.Value, Sequence[Layer]],
        context: Context,
        findings: Findings,
    ) -> Iterator[tuple[ir.Value, list[Cut]]]:
        """Yield the cuts that pay, by weight."""
        split = Split(self._rest, self._outliers, self.axis, self.by, self.most)
        for weight, cost in self._costs(model, users, context, findings):
            layers = users[weight]
            matrix = np.ascontiguousarray(layers[0].weight_array().T, np.float32)
            found = cuts(matrix, cost, split)
            paying = [cut for cut in found if cut.gain_db >= self.min_gain]
            if paying:
                yield weight, paying
            elif found:
                best = max(found, key=lambda cut: cut.gain_db)
                reason = f"{best} of the same size; less than min-gain={self.min_gain:g} apart"
                self._skip(layers, reason, findings)
            else:
                self._skip(layers, self._too_small(matrix), findings)

    def _too_small(self, matrix: Array) -> str:
        if self._rest.round_trip(matrix).tobytes() == matrix.tobytes():
            return f"{self.bits} bits lose nothing of its weight"
        n, k = matrix.shape
        return f"of {k} input and {n} output channels, most={self.most:g} is less than what leaves at a time"

    @property
    def _rest(self) -> Held:
        return Held(self.bits, self.block, self.symmetric, self.method is WeightMethod.MSE)

    @property
    def _outliers(self) -> Held:
        return Held(self.outlier_bits, self.outlier_block, symmetric=True, mse=False)

    def _costs(
        self,
        model: ir.Model,
        users: Mapping[ir.Value, Sequence[Layer]],
        context: Context,
        findings: Findings,
    ) -> Iterator[tuple[ir.Value, OutputCost]]:
        """Yield what errors of each weight cost: seen on the calibration data, if there is any."""
        if context.calibration is None and self.by is not OutlierScore.ACTIVATION:
            findings.notes.append("without calibration data every input channel counts the same")
            yield from ((weight, OutputCost()) for weight in users)
            return
        calibration = required_calibration(context.calibration, f"{self.name}{{by={self.by.value}}}", model)
        weights = list(users)
        needs = [_requests(users[weight], model) for weight in weights]
        for chunk, grams in grams_in_chunks(model, needs, calibration, context.target):
            for position in chunk:
                seen = [grams[request] for request in needs[position]]
                finite = [gram.total for gram in seen if gram.finite and gram.total.any()]
                if finite:
                    yield weights[position], OutputCost(normalised(np.sum(finite, axis=0)))
                else:
                    reason = "nothing finite but zero is known of its input"
                    self._skip(users[weights[position]], reason, findings)

    def _split(self, layers: Sequence[Layer], cut: Cut, findings: Findings) -> None:
        for layer in (layer.current() for layer in layers):
            replace_value(layer.output, emit_cut(layer, cut))
            drop_unused([layer.node])
            findings.apply(layer.name, f"{cut} of the same size")

    def _note(self, chosen: Mapping[ir.Value, Cut]) -> str:
        apart = sum(cut.apart for cut in chosen.values())
        total = sum(cut.weights for cut in chosen.values())
        return f"{100 * apart / total:.1f} % of the weights of {len(chosen)} split layers stand apart"


def _requests(layers: Sequence[Layer], model: ir.Model) -> list[GramRequest]:
    """Return the Gram matrices of the inputs that can be looked at: of the main graph, not constant."""
    visible = [
        layer.input.name or ""
        for layer in layers
        if not layer.in_subgraph and not layer.input.is_initializer() and _is_of(layer.input, model)
    ]
    columns = layers[0].weight_array().shape[0]
    return [GramRequest(name, columns) for name in dict.fromkeys(visible)]


def _is_of(value: ir.Value, model: ir.Model) -> bool:
    producer = value.producer()
    return value in model.graph.inputs if producer is None else producer.graph is model.graph
