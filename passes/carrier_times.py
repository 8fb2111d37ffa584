# SPDX-License-Identifier: Apache-2.0
"""What each carrier of each layer takes by kernel costs, and the cheapest choice over the whole graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from splitfold.passes.casts import cheapest_with_casts
from splitfold.passes.estimated_times import carrier_kernel, conversion_times
from splitfold.passes.kernel_cases import ConcreteShapes, layer_shape
from splitfold.passes.layers import Layer, LayerKind
from splitfold.passes.piece_times import saved_conversions
from splitfold.passes.precision import Precision
from splitfold.passes.signals.subject import Subject
from splitfold.runtime.costs.kernel import Shape
from splitfold.runtime.costs.table import KernelCosts

__all__ = ["CarrierTimes", "cheapest_carriers", "find_times"]


@dataclass(frozen=True)
class CarrierTimes:
    """What the carriers of one layer take, in milliseconds.

    Attributes:
        layer: its name.
        shapes: of the layer, one for each regime of rows.
        times: by precision, one for each regime; a static int8 convolution pays for its conversions.
        cast: what quantizing the layer's input and back takes: neighbours in codes save it. 0 for a linear
            layer, which gives float whatever its neighbours are.
    """

    layer: str
    shapes: tuple[Shape, ...]
    times: Mapping[Precision, tuple[float, ...]]
    cast: float = 0.0

    def cost(self, precision: Precision) -> float:
        """Return the worst ratio, over the regimes, of a carrier's time to that of the fastest, times the
        latter in the last regime: with one regime its time."""
        fastest = [min(times[at] for times in self.times.values()) for at in range(len(self.shapes))]
        ratio = max(time / best for time, best in zip(self.times[precision], fastest, strict=True))
        return ratio * fastest[-1]


def find_times(
    subject: Subject, costs: KernelCosts, shapes: ConcreteShapes, rows: Sequence[int]
) -> tuple[dict[str, CarrierTimes], dict[str, str]]:
    """Return the times of the layers of `subject` by name, and why the others have none.

    Args:
        subject: layers, and the choices that each can have.
        costs: of the kernels.
        shapes: of the model's values.
        rows: of linear layers, one for each regime; empty is those of `shapes`.
    """
    found, reasons = {}, {}
    for piece in subject.pieces:
        layer, name = piece.layer, piece.layer.name
        own = _shapes(layer, shapes, rows)
        if not own:
            reasons[name] = "its shape is not known: give rows or calibration data"
            continue
        times = {item: _times(costs, layer, item, own) for item in subject.choices[name]}
        known = {item: time for item, time in times.items() if time is not None}
        if not known:
            reasons[name] = "no kernel costs are known of its carriers"
            continue
        cast = 0.0
        if layer.kind is LayerKind.CONV and Precision.int8_static() in known:
            there, back = (_conversions(costs, shapes.size(value)) for value in (layer.input, layer.output))
            known[Precision.int8_static()] = tuple(
                time + there[0] + back[1] for time in known[Precision.int8_static()]
            )
            cast = sum(there)
        found[name] = CarrierTimes(name, own, known, cast)
    return found, reasons


def _shapes(layer: Layer, shapes: ConcreteShapes, rows: Sequence[int]) -> tuple[Shape, ...]:
    if rows and layer.is_linear:
        depth, columns = (int(size) for size in layer.weight_array().shape)
        return tuple((count, depth, columns) for count in rows)
    shape = layer_shape(layer, shapes)
    return () if shape is None else (shape,) * max(len(rows), 1)


def _times(
    costs: KernelCosts, layer: Layer, precision: Precision, shapes: Sequence[Shape]
) -> tuple[float, ...] | None:
    kernel = carrier_kernel(layer, precision)
    found = [None if kernel is None else costs.estimate(kernel, shape) for shape in shapes]
    times = tuple(item.milliseconds for item in found if item is not None)
    return times if len(times) == len(shapes) else None


def _conversions(costs: KernelCosts, elements: int | None) -> tuple[float, float]:
    """Return milliseconds of quantizing and of dequantizing; 0 where they are not known."""
    return (conversion_times(costs, elements) if elements else None) or (0.0, 0.0)


def cheapest_carriers(
    subject: Subject, times: Mapping[str, CarrierTimes], margin: float
) -> dict[str, Precision]:
    """Return the precision of each layer that `times` holds: together the cheapest, conversions between
    neighbouring convolutions included; of carriers within `margin` the one that was named first."""
    layers = [piece.layer for piece in subject.pieces if piece.layer.name in times]
    open_to = [list(times[layer.name].times) for layer in layers]
    rows = [
        [times[layer.name].cost(item) * (1 + margin * at) for at, item in enumerate(own)]
        for layer, own in zip(layers, open_to, strict=True)
    ]
    both = {Precision.float(), Precision.int8_static()}
    sides = {
        at: (own.index(Precision.float()), own.index(Precision.int8_static()))
        for at, own in enumerate(open_to)
        if layers[at].kind is LayerKind.CONV and set(own) == both
    }
    places = {layer.name: at for at, layer in enumerate(layers)}
    saved = saved_conversions(subject, {name: item.cast for name, item in times.items() if item.cast})
    pairs = {
        (places[one], places[other]): time
        for (one, other), time in saved.items()
        if one in places and other in places and {places[one], places[other]} <= sides.keys()
    }
    chosen = cheapest_with_casts(rows, pairs, sides)
    return {layer.name: own[at] for layer, own, at in zip(layers, open_to, chosen, strict=True)}
