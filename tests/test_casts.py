# SPDX-License-Identifier: Apache-2.0
"""Conversions between float and static int8: the minimum cut against brute force, neighbours in a graph."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from seeded import parse_graph

from splitfold.compiler.planning import plan_precisions
from splitfold.passes.allocation import Allocation
from splitfold.passes.assign_precision import AssignPrecisionPass
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.casts import choose_with_casts, neighbours
from splitfold.passes.digraph import minimum_cut
from splitfold.passes.identity import name_layers
from splitfold.passes.layers import find_layers
from splitfold.passes.limits import Limit
from splitfold.passes.piece_times import PieceTimes
from splitfold.passes.spec import parse_pass

CHAIN = """<ir_version: 10, opset_import: ["" : 20]>
net (float[1,3,8,8] x) => (float[1,2] y)
<float[4,3,3,3] W1 = seeded, float[4,4,1,1] W2 = seeded, float[4,4,1,1] W3 = seeded, float[64,2] W4 = seeded>
{
  [one] a = Conv<strides=[2,2], pads=[1,1,1,1]>(x, W1)
  [act] b = Relu(a)
  [two] c = Conv(b, W2)
  [add] d = Add(c, b)
  [three] e = Conv(d, W3)
  [tanh] f = Tanh(e)
  [flat] g = Flatten(f)
  [four] y = MatMul(g, W4)
}
"""


def chain() -> ir.Model:
    model = ir.from_proto(parse_graph(CHAIN))
    name_layers(model)
    CanonicalizePass()(model)
    return model


def test_neighbours_are_those_with_integer_kernels_between_them() -> None:
    model = chain()
    layers = find_layers(model)[0]
    names = [layer.name for layer in layers]
    found = {(names[one], names[other]) for one, other in neighbours(model, layers)}
    assert found == {("one", "two"), ("one", "three"), ("two", "three")}  # Tanh has no integer kernel


_COST = st.integers(-20, 20).map(float)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(_COST, _COST), min_size=1, max_size=6),
    st.dictionaries(
        st.tuples(st.integers(0, 5), st.integers(0, 5)), st.integers(0, 15).map(float), max_size=8
    ),
)
def test_minimum_cut_is_the_least_of_all_sides(
    apart: list[tuple[float, float]], ties: dict[tuple[int, int], float]
) -> None:
    ties = {pair: cost for pair, cost in ties.items() if max(pair) < len(apart) and pair[0] != pair[1]}

    def cost(sides: tuple[bool, ...]) -> float:
        own = sum(both[side] for both, side in zip(apart, sides, strict=True))
        return own + sum(tie for (one, other), tie in ties.items() if sides[one] != sides[other])

    best = min(cost(sides) for sides in itertools.product((False, True), repeat=len(apart)))
    assert cost(minimum_cut(apart, ties)) == pytest.approx(best)


def test_a_negative_tie_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        minimum_cut([(0.0, 1.0), (1.0, 0.0)], {(0, 1): -1.0})


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_choices_with_casts_keep_the_budget_and_lie_on_the_hull(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 5))
    losses = [[0.0, float(data.draw(st.integers(1, 9)))] for _ in range(count)]
    times = [[0.0, float(data.draw(st.integers(-6, 4)))] for _ in range(count)]
    pairs = {(at, at + 1): float(data.draw(st.integers(0, 4))) for at in range(count - 1)}
    sides = dict.fromkeys(range(count), (0, 1))

    def spent(chosen: tuple[int, ...]) -> float:
        saved = sum(time for (one, other), time in pairs.items() if chosen[one] == chosen[other] == 1)
        return sum(row[at] for row, at in zip(times, chosen, strict=True)) - saved

    def lost(chosen: tuple[int, ...]) -> float:
        return sum(row[at] for row, at in zip(losses, chosen, strict=True))

    everything = list(itertools.product((0, 1), repeat=count))
    budget = float(data.draw(st.integers(-20, 0)))
    found = choose_with_casts(losses, times, pairs, sides, budget)
    fitting = [chosen for chosen in everything if spent(chosen) <= budget]
    assert (found is None) == (not fitting)
    if found is not None:
        assert spent(found) <= budget
        # nothing is at once less lossy and faster, and none of the same time less lossy
        assert not [
            chosen for chosen in everything if lost(chosen) < lost(found) and spent(chosen) <= spent(found)
        ]


def test_a_layer_of_a_pair_has_two_choices() -> None:
    with pytest.raises(ValueError, match="other choices"):
        choose_with_casts([[0.0, 1.0, 2.0]], [[0.0, 1.0, 2.0]], {}, {0: (0, 1)}, 1.0)


def test_a_budget_that_only_neighbours_together_keep_is_kept() -> None:
    """Each convolution alone is slower in int8, for its conversions; all three together are faster."""
    step = parse_pass(
        "assign-precision{choices=[fp32,int8-static],signal=local-error,budget=[1000ms]}",
        (AssignPrecisionPass,),
    )
    assert isinstance(step, AssignPrecisionPass)
    x = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    planning = plan_precisions(chain(), step, calibration=[{"x": x}])
    found = planning.allocation
    assert found.times is not None
    assert set(found.times.saved) == {("one", "two"), ("one", "three"), ("two", "three")}
    assert all(time > 0 for time in found.times.saved.values())
    more = {
        name: {item: 0.0 if item.is_float else 0.2 for item in own} for name, own in found.times.more.items()
    }
    times = PieceTimes(10.0, more, dict.fromkeys(found.times.saved, 0.4))
    plan = Allocation(found.subject, found.scores, found.losses, times).within([Limit.parse("9.5ms")])
    assert {str(plan.precisions[name]) for name in ("one", "two", "three")} == {"int8-static"}
    assert str(plan.precisions["four"]) == "fp32"
