# SPDX-License-Identifier: Apache-2.0
"""Layered drawings: edges point down, nodes keep their distance, simple graphs are drawn as one would."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitfold.passes.digraph import draw_layered

pairs = st.tuples(st.integers(0, 11), st.integers(0, 11)).filter(lambda pair: pair[0] < pair[1])


@settings(max_examples=60, deadline=None)
@given(st.lists(pairs, max_size=30))
def test_edges_point_down_and_nothing_overlaps(edges: list[tuple[int, int]]) -> None:
    drawn = draw_layered(12, edges)
    assert all(drawn.places[start][1] < drawn.places[end][1] for start, end in edges)
    by_row: dict[int, list[float]] = {}
    for x, row in drawn.places:
        by_row.setdefault(row, []).append(x)
    gaps = [b - a for row in by_row.values() for a, b in itertools.pairwise(sorted(row))]
    assert all(gap >= 1 - 0.01 for gap in gaps)
    assert min(x for x, _ in drawn.places) >= 0
    assert max(x for x, _ in drawn.places) <= drawn.width
    assert max(row for _, row in drawn.places) < drawn.layers
    for (start, end), bends in drawn.bends.items():
        rows = [row for _, row in bends]
        assert rows == list(range(drawn.places[start][1] + 1, drawn.places[end][1]))


def test_a_chain_is_straight() -> None:
    drawn = draw_layered(5, [(0, 1), (1, 2), (2, 3), (3, 4)])
    assert drawn.places == ((0.0, 0), (0.0, 1), (0.0, 2), (0.0, 3), (0.0, 4))


def test_a_diamond_is_symmetric_and_its_long_edge_passes_by() -> None:
    drawn = draw_layered(4, [(0, 1), (0, 2), (1, 3), (2, 3)])
    (top, _), (left, _), (right, _), (bottom, _) = drawn.places
    assert top == pytest.approx(bottom)
    assert abs(right - left) == pytest.approx(1)
    long = draw_layered(3, [(0, 1), (1, 2), (0, 2)])
    ((x, row),) = long.bends[0, 2]
    assert row == 1
    assert abs(x - long.places[1][0]) > 0.5


def test_crossings_are_undone() -> None:
    drawn = draw_layered(6, [(0, 5), (1, 4), (2, 3)])
    tops, bottoms = drawn.places[:3], drawn.places[3:][::-1]
    assert [x for x, _ in tops] == pytest.approx([x for x, _ in bottoms])


def test_a_source_stands_right_above_its_reader() -> None:
    drawn = draw_layered(4, [(0, 1), (1, 2), (3, 2)])
    assert drawn.places[3][1] == 1


def test_an_empty_graph_and_a_cycle() -> None:
    assert draw_layered(0, []).places == ()
    with pytest.raises(ValueError, match="cycle"):
        draw_layered(2, [(0, 1), (1, 0)])
