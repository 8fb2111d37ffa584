# SPDX-License-Identifier: Apache-2.0
"""The cheapest carriers: by rows, by margin, over both regimes, with the conversions between neighbours."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper
from small import WIDTH, mlp, samples

from splitfold.passes.base import Context, Findings
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.carrier_times import CarrierTimes
from splitfold.passes.casts import cheapest_with_casts
from splitfold.passes.choose_carriers import ChooseCarriersPass
from splitfold.passes.precision import Precision
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.costs.kernel import Case, Kernel, Shape
from splitfold.runtime.costs.machine import Machine
from splitfold.runtime.costs.table import KernelCosts, Sample
from splitfold.runtime.target import Target

UP, DOWN = "encoder.up", "encoder.down"
DYNAMIC, STATIC, BLOCKS = Precision.int8_dynamic(), Precision.int8_static(), Precision.blocks(8)


def _costs(times: dict[tuple[str, Shape], float]) -> KernelCosts:
    return KernelCosts(
        Machine("a processor", 2, 0, "1.0"),
        {Case(Kernel.parse(name), shape): Sample(ms, ms, ms, 3) for (name, shape), ms in times.items()},
    )


def _linear(times: dict[str, dict[int, float]]) -> KernelCosts:
    """Return costs that depend on the rows alone."""
    return _costs(
        {
            (f"matmul/{form}", (rows, *weight)): ms
            for form, by_rows in times.items()
            for rows, ms in by_rows.items()
            for weight in ((WIDTH, 64), (64, 8))
        }
    )


def _run(
    step: ChooseCarriersPass, costs: KernelCosts, *, rows: int | None = None, model: object = None
) -> tuple[ir.Model, Findings]:
    made = ir.from_proto(model or mlp())
    CanonicalizePass()(made)
    target = dataclasses.replace(Target.cpu(), costs=costs)
    calibration = None if rows is None else Calibration.of([{"x": samples(rows)}])
    return made, step.run(made, Context(target, calibration)).findings


TWO_REGIMES = {
    "int8-dynamic": {1: 4.0, 8: 4.0, 128: 10.0},
    "int8-static": {1: 5.0, 8: 5.0, 128: 9.9},
    "blocks-w8-b32-l4-zp": {1: 1.0, 8: 3.9, 128: 90.0},
}


@pytest.mark.parametrize(("rows", "done"), [(1, "MatMul weights in 8 bits"), (128, "MatMul dynamic int8")])
def test_the_cheapest_carrier_at_these_rows_is_taken(rows: int, done: str) -> None:
    _, found = _run(ChooseCarriersPass(rows=rows), _linear(TWO_REGIMES), rows=8)
    assert found.applied == [(UP, done), (DOWN, done)]


def test_rows_come_from_the_calibration_data_and_a_margin_keeps_the_preferred_one() -> None:
    assert {what for _, what in _run(ChooseCarriersPass(), _linear(TWO_REGIMES), rows=8)[1].applied} == {
        "MatMul dynamic int8"
    }
    bold = ChooseCarriersPass(margin=0.0)
    assert {what for _, what in _run(bold, _linear(TWO_REGIMES), rows=8)[1].applied} == {
        "MatMul weights in 8 bits"
    }


def test_without_rows_both_regimes_count_and_static_is_no_choice() -> None:
    """Dynamic int8 is at worst 4 times the fastest, blocks 9 times."""
    _, found = _run(ChooseCarriersPass(), _linear(TWO_REGIMES))
    assert {what for _, what in found.applied} == {"MatMul dynamic int8"}
    assert "without calibration data int8-static is no choice" in found.notes
    (reason,) = {why for layer, other, why in found.missed if (layer, other) == (UP, "w8")}
    assert "1.0000 ms at 1x32x64 and 90.0000 ms at 128x32x64, against 4.0000 ms" in reason


def test_the_record_says_over_what_and_by_how_much() -> None:
    _, found = _run(ChooseCarriersPass(rows=1), _linear(TWO_REGIMES), rows=8)
    assert (UP, "int8-static", "5.0000 ms at 1x32x64, against 1.0000 ms at 1x32x64 as w8") in found.missed
    (note,) = [item for item in found.notes if "kernel costs of" in item]
    beside = "8 all in int8-dynamic, 10 all in int8-static, 2 all in w8"
    assert note == f"2 w8: 2 ms ({beside}), by kernel costs of a processor"


def test_float_stays_where_it_is_cheapest_and_named() -> None:
    costs = _linear({"fp32": {8: 1.0}, "int8-dynamic": {8: 2.0}})
    model, found = _run(ChooseCarriersPass(choices=(Precision.float(), DYNAMIC)), costs, rows=8)
    assert not found.applied
    assert [layer for layer, _ in found.skipped] == [UP, DOWN]
    assert "MatMul" in {node.op_type for node in model.graph}


def test_a_carrier_without_costs_is_not_chosen_and_a_layer_without_any_is_told() -> None:
    _, found = _run(ChooseCarriersPass(), _linear({"int8-static": {8: 1.0}}), rows=8)
    assert {what for _, what in found.applied} == {"MatMul static int8"}
    _, found = _run(ChooseCarriersPass(), _costs({("cast/fp32", (1,)): 1.0}), rows=8)
    assert not found.applied
    assert {reason for _, reason in found.skipped} == {"no kernel costs are known of its carriers"}


def _convs() -> object:
    """Return three convolutions in a row, of 8 channels at 6 x 6."""
    nodes, names = [], ("first", "second", "third")
    for at, name in enumerate(names):
        nodes.append(
            helper.make_node(
                "Conv", [f"v{at}", f"k{at}"], [f"v{at + 1}"], name=f"/{name}/Conv", pads=[1, 1, 1, 1]
            )
        )
    rng = np.random.default_rng(0)
    weights = [
        helper.make_tensor(f"k{at}", 1, [8, 8, 3, 3], rng.standard_normal(576).astype(np.float32))
        for at in range(3)
    ]
    ends = [helper.make_tensor_value_info(name, 1, [1, 8, 6, 6]) for name in ("v0", "v3")]
    graph = helper.make_graph(nodes, "convs", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@pytest.mark.parametrize(("static", "applied"), [(0.4, 3), (0.9, 0)])
def test_convolutions_go_together_or_not_at_all(static: float, applied: int) -> None:
    """A conversion takes 0.5. Alone, 0.4 + 1.0 is slower than float's 1.0; three in a row pay for it once:
    3 * 0.4 + 1.0 against 3.0. At 0.9 they do not: 3.7."""
    shape = (1, 8, 8, 6, 6, 3, 1, 1)
    costs = _costs(
        {
            ("conv/fp32", shape): 1.0,
            ("conv/int8-static", shape): static,
            ("quantize/fp32", (288,)): 0.5,
            ("dequantize/fp32", (288,)): 0.5,
        }
    )
    model = ir.from_proto(_convs())
    CanonicalizePass()(model)
    data = Calibration.of([{"v0": np.random.default_rng(1).standard_normal((1, 8, 6, 6)).astype(np.float32)}])
    step = ChooseCarriersPass(choices=(Precision.float(), STATIC), margin=0.0)
    found = step.run(model, Context(dataclasses.replace(Target.cpu(), costs=costs), data)).findings
    assert len(found.applied) == applied
    assert len(found.skipped) == 3 - applied


def test_the_cut_finds_what_trying_everything_finds() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        count = 6
        times = [[float(item) for item in rng.uniform(0.1, 2.0, 2)] for _ in range(count)]
        sides = dict.fromkeys(range(count), (0, 1))
        pairs = {(at, at + 1): float(rng.uniform(0.0, 1.5)) for at in range(count - 1)} | {(0, 3): 0.4}

        def total(
            chosen: tuple[int, ...],
            times: list[list[float]] = times,
            pairs: dict[tuple[int, int], float] = pairs,
        ) -> float:
            saved = sum(time for (a, b), time in pairs.items() if chosen[a] == chosen[b] == 1)
            return sum(row[at] for row, at in zip(times, chosen, strict=True)) - saved

        best = min(itertools.product((0, 1), repeat=count), key=total)
        assert total(cheapest_with_casts(times, pairs, sides)) == pytest.approx(total(best))


def test_the_cost_over_two_regimes_is_the_worst_ratio() -> None:
    item = CarrierTimes("layer", ((1, 2, 2), (8, 2, 2)), {DYNAMIC: (2.0, 6.0), BLOCKS: (1.0, 24.0)})
    assert item.cost(DYNAMIC) == 2.0 * 6.0
    assert item.cost(BLOCKS) == 4.0 * 6.0
    alone = CarrierTimes("layer", ((8, 2, 2),), {DYNAMIC: (6.0,), BLOCKS: (24.0,)})
    assert (alone.cost(DYNAMIC), alone.cost(BLOCKS)) == (6.0, 24.0)


def test_options_that_make_no_sense_are_refused() -> None:
    for wrong in ({"choices": ()}, {"choices": (Precision.simulate(4),)}, {"rows": -1}, {"margin": -0.5}):
        with pytest.raises(ValueError):
            ChooseCarriersPass(**wrong)  # type: ignore[arg-type]
