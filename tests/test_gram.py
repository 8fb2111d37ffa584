# SPDX-License-Identifier: Apache-2.0
"""Streamed Gram matrices: against X^T X of all tokens at once, in chunks, and where activations go wrong."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from seeded import parse_graph

from splitfold.passes.activation_stream import ActivationStream
from splitfold.passes.gram import Gram, GramRequest, gram_chunks, gram_limit, grams_in_chunks, stream_grams
from splitfold.passes.gram_loss import block_losses, diagonal_blocks, row_losses
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.errors import CalibrationError, SessionError
from splitfold.runtime.feeds import Array, Feeds
from splitfold.runtime.session import Session
from splitfold.runtime.target import Target

CPU = Target.cpu()
MODEL = """<ir_version: 10, opset_import: ["" : 20]>
net (float[batch,tokens,12] x, float[batch,tokens,40] other) => (float[batch,tokens,4] y, float[7] z)
<float[12,40] A = seeded, float[40,4] B = seeded, int64[1] wrong = {7}>
{
  h = MatMul(x, A)
  a = Relu(h)
  s = Add(a, other)
  y = MatMul(s, B)
  z = Reshape(y, wrong)
}
"""
"""Its last node fails on every input of another size than 7."""


def model() -> ir.Model:
    return ir.from_proto(parse_graph(MODEL))


def batches(count: int = 3) -> list[dict[str, Array]]:
    rng = np.random.default_rng(0)
    return [
        {
            "x": rng.standard_normal((2, 3 + size, 12)).astype(np.float32),
            "other": rng.standard_normal((2, 3 + size, 40)).astype(np.float32),
        }
        for size in range(count)
    ]


def grams(requests: list[GramRequest], data: Calibration) -> dict[GramRequest, Gram]:
    return stream_grams(ActivationStream(model(), data, CPU), requests)


def inputs_of_b(feeds: dict[str, Array]) -> Array:
    weight = model().graph.initializers["A"].const_value
    assert weight is not None
    hidden = np.maximum(feeds["x"].astype(np.float64) @ weight.numpy(), 0) + feeds["other"]
    return np.asarray(hidden.reshape(-1, 40))


def test_it_is_the_product_over_all_tokens() -> None:
    data = batches()
    whole, first = GramRequest("s", 40), GramRequest("x", 12)
    found = grams([whole, first], Calibration.of(data))
    tokens = np.concatenate([inputs_of_b(feeds) for feeds in data])
    np.testing.assert_allclose(found[whole].total, tokens.T @ tokens, rtol=1e-5, atol=1e-4)
    plain = np.concatenate([feeds["x"].reshape(-1, 12) for feeds in data]).astype(np.float64)
    np.testing.assert_allclose(found[first].total, plain.T @ plain, rtol=1e-5, atol=1e-4)
    assert found[whole].rows == found[first].rows == 2 * (3 + 4 + 5)
    assert found[whole].finite


def test_diagonal_blocks_are_those_of_the_whole() -> None:
    data = Calibration.of(batches())
    whole, parts = GramRequest("s", 40), GramRequest("s", 40, block=16)
    found = grams([whole, parts], data)
    assert found[parts].total.shape == (3, 16, 16)
    np.testing.assert_allclose(
        found[parts].total, diagonal_blocks(found[whole].total, 16), rtol=1e-5, atol=1e-4
    )
    assert not found[parts].total[2, 8:].any(), "padded columns take no part"
    assert parts.nbytes == found[parts].total.nbytes
    assert whole.nbytes == found[whole].total.nbytes


def test_only_the_part_that_leads_there_is_run() -> None:
    with pytest.raises(SessionError):
        Session(model()).run(batches()[0])
    assert grams([GramRequest("s", 40)], Calibration.of(batches()))


def test_the_model_is_left_alone() -> None:
    before = model()
    text = str(before.graph)
    stream_grams(ActivationStream(before, Calibration.of(batches()), CPU), [GramRequest("s", 40)])
    assert str(before.graph) == text


@pytest.mark.parametrize("bad", [np.inf, -np.inf, 1e25], ids=["inf", "minus inf", "overflow"])
def test_what_is_not_finite_is_said(bad: float) -> None:
    data = batches()
    data[1]["other"][0, 0, 3] = bad
    wrong, right = GramRequest("s", 40), GramRequest("x", 12)
    found = grams([wrong, right], Calibration.of(data))
    assert not found[wrong].finite
    assert not found[wrong].total.any()
    assert found[right].finite


def test_no_tokens_make_zeros() -> None:
    empty = {name: array[:0] for name, array in batches()[0].items()}
    found = grams([GramRequest("s", 40)], Calibration.of([empty]))
    gram = found[GramRequest("s", 40)]
    assert (gram.rows, gram.finite, gram.total.any()) == (0, True, False)


def test_a_batch_that_does_not_fit() -> None:
    data = Calibration.of([{"x": batches()[0]["x"]}]).checked(model())
    with pytest.raises(CalibrationError, match="lack the input 'other'"):
        grams([GramRequest("s", 40)], data)


# The stream below


def visited(stream: ActivationStream, *visits: list[str]) -> list[tuple[str, Array]]:
    seen: list[tuple[str, Array]] = []
    for names in visits:
        stream.visit(names, lambda name, array: seen.append((name, array)))
    return seen


def same(first: list[tuple[str, Array]], second: list[tuple[str, Array]]) -> None:
    def key(item: tuple[str, Array]) -> tuple[str, int]:
        return item[0], item[1].shape[1]

    assert sorted(map(key, first)) == sorted(map(key, second))
    for one, two in zip(sorted(first, key=key), sorted(second, key=key), strict=True):
        np.testing.assert_allclose(one[1], two[1], rtol=1e-6)


LIMIT = "splitfold.passes.activation_stream.holdable_bytes"


@pytest.mark.parametrize("limit", [1, 6000, 10**6], ids=["never", "for a while", "to the end"])
def test_walking_and_starting_over_see_the_same(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LIMIT, lambda model: limit)
    stream = ActivationStream(model(), Calibration.of(batches()), CPU)
    assert stream.walks == (limit > 1)
    found = visited(stream, ["x"], ["s", "h"], ["y"])
    assert stream.walks == (limit == 10**6)
    monkeypatch.setattr(LIMIT, lambda model: 1)
    same(found, visited(ActivationStream(model(), Calibration.of(batches()), CPU), ["x", "h", "s", "y"]))


def test_going_back_starts_over() -> None:
    stream = ActivationStream(model(), Calibration.of(batches()), CPU)
    found = visited(stream, ["s"], ["s"], ["h", "other"])
    assert not stream.walks
    assert [name for name, _ in found] == ["s"] * 6 + ["other", "h"] * 3
    tail = [(name, array) for name, array in found if name in ("other", "h")]
    same(tail, visited(ActivationStream(model(), Calibration.of(batches()), CPU), ["other", "h"]))


def test_the_data_is_read_once_while_it_walks() -> None:
    reads = []

    def source() -> list[Feeds]:
        reads.append(1)
        return [*batches()]

    visited(ActivationStream(model(), Calibration.of(source), CPU), ["x"], ["h"], ["s", "y"])
    assert len(reads) == 1


@pytest.mark.parametrize("limit", [1, 10**6], ids=["starting over", "walking"])
def test_inputs_with_defaults(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LIMIT, lambda model: limit)
    text = """<ir_version: 10, opset_import: ["" : 20]>
    net (float[b,3] x, float[3] k = {1, 2, 3}) => (float[b,3] y) { h = Mul(x, k) y = Relu(h) }
    """
    stream = ActivationStream(
        ir.from_proto(parse_graph(text)), Calibration.of([{"x": np.eye(3, dtype="f4")}]), CPU
    )
    found = dict(visited(stream, ["k"], ["y"]))
    np.testing.assert_array_equal(found["y"], np.diag([1, 2, 3]))
    np.testing.assert_array_equal(found["k"], [1, 2, 3])


def test_no_batch_at_all() -> None:
    with pytest.raises(CalibrationError, match="empty"):
        ActivationStream(model(), Calibration.of([]), CPU)


# Chunks


def test_chunks_keep_the_limit_and_the_order() -> None:
    a, b, c, d = (GramRequest(name, 10) for name in "abcd")
    needs = [[a], [a], [b], [c, d], [a]]
    assert gram_chunks(needs, 10**6) == [[0, 1, 2, 3, 4]]
    assert gram_chunks(needs, 2 * a.nbytes) == [[0, 1, 2], [3], [4]]
    assert gram_chunks(needs, 1) == [[0, 1], [2], [3], [4]], "one request never waits"
    assert gram_chunks([], 1) == []


def test_chunks_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = [[GramRequest("x", 12)], [GramRequest("s", 40)], [GramRequest("x", 12), GramRequest("other", 40)]]

    def gather() -> list[tuple[int, Array]]:
        return [
            (position, found[request].total)
            for chunk, found in grams_in_chunks(model(), needs, Calibration.of(batches()), CPU)
            for position in chunk
            for request in needs[position]
        ]

    at_once = gather()
    monkeypatch.setattr("splitfold.passes.gram.gram_limit", lambda model: 1)
    one_by_one = gather()
    assert [position for position, _ in at_once] == [position for position, _ in one_by_one] == [0, 1, 2, 2]
    for (_, first), (_, second) in zip(at_once, one_by_one, strict=True):
        np.testing.assert_array_equal(first, second)


def test_the_limit_follows_the_model() -> None:
    assert gram_limit(model()) == 64 * 2**20


def test_losses_are_those_of_the_outputs() -> None:
    rng = np.random.default_rng(1)
    x, errors = rng.standard_normal((50, 600)), rng.standard_normal((7, 600)).astype(np.float32)
    gram = x.T @ x
    outputs = np.square(errors @ x.T).sum(1)
    np.testing.assert_allclose(row_losses(errors, gram.astype(np.float32)), outputs, rtol=1e-3)
    parts = block_losses(errors.reshape(7, 20, 30), diagonal_blocks(gram, 30))
    expected = [np.square(errors[:, s : s + 30] @ x[:, s : s + 30].T).sum(1) for s in range(0, 600, 30)]
    np.testing.assert_allclose(parts, np.transpose(expected), rtol=1e-3)
