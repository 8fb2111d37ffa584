# SPDX-License-Identifier: Apache-2.0
"""Grids in the loop of training: their numbers by formula, and straight-through gradients."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")

from seeded import feeds_for, parse_graph  # noqa: E402

from splitfold.runtime.lift import lift  # noqa: E402
from splitfold.runtime.training.fake_inputs import FakeInput  # noqa: E402
from splitfold.runtime.training.fake_weights import FakeWeight, WeightScale  # noqa: E402
from splitfold.runtime.training.in_loop import InLoop, put_in_loop  # noqa: E402

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_statistics_grid_is_that_of_the_released_code(bits: int) -> None:
    """s = 2 mean|w| a row; c = clip(w / s, -1, 1 - 1e-6); s (round(c n - 1/2) + 1/2) / n with n = 2^(b-1)."""
    w = RNG.standard_normal((5, 40)).astype(np.float32)
    s = 2 * np.abs(w).mean(1, keepdims=True)
    n = 2 ** (bits - 1)
    expected = s * (np.round(np.clip(w / s, -1, 1 - 1e-6) * n - 0.5) + 0.5) / n
    found = FakeWeight(bits, 0, WeightScale.STATISTICS)(torch.tensor(w)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert not (found == 0).any()


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_range_grid_is_symmetric_a_channel(axis: int) -> None:
    w = RNG.standard_normal((6, 7)).astype(np.float32)
    s = np.abs(w).max(1 - axis % 2, keepdims=True) / 7
    found = FakeWeight(4, axis, WeightScale.RANGE)(torch.tensor(w)).numpy()
    np.testing.assert_allclose(found, np.round(w / s) * s, atol=1e-6)


def test_gradients_pass_rounding_and_stop_where_a_weight_is_cut() -> None:
    w = torch.tensor([[0.1, -0.2, 0.3, 2.0]], requires_grad=True)  # s = 1.3: only the last is beyond
    FakeWeight(4, 0, WeightScale.STATISTICS)(w).sum().backward()
    np.testing.assert_allclose(w.grad.numpy(), [[1, 1, 1, 0]], atol=1e-6)
    zero = torch.zeros((2, 3), requires_grad=True)
    out = FakeWeight(4, 0, WeightScale.RANGE)(zero)
    assert torch.equal(out, torch.zeros((2, 3)))


def test_the_range_of_an_input_is_a_running_mean_while_training() -> None:
    reader = FakeInput(8, 0.9)
    reader.train()
    reader(torch.tensor([-1.0, 3.0]))
    assert (float(reader.low), float(reader.high)) == (-1.0, 3.0)
    reader(torch.tensor([0.5, 5.0]))
    assert float(reader.low) == pytest.approx(-0.9)  # the range always holds zero
    assert float(reader.high) == pytest.approx(0.9 * 3 + 0.1 * 5)
    reader.eval()
    x = np.array([-4.0, -0.9, 0.0, 1.234, 9.0], np.float32)
    scale = (3.2 + 0.9) / 255
    zero = np.round(0.9 / scale)
    expected = (np.clip(np.round(x / scale) + zero, 0, 255) - zero) * scale
    given = torch.tensor(x, requires_grad=True)
    out = reader(given)
    np.testing.assert_allclose(out.detach().numpy(), expected, atol=1e-6)
    assert (float(reader.low), float(reader.high)) == pytest.approx((-0.9, 3.2))
    out.sum().backward()
    np.testing.assert_allclose(given.grad.numpy(), [0, 1, 1, 1, 0], atol=1e-6)


TEXT = """<ir_version: 10, opset_import: ["" : 20]>
net (float[2,4,5,5] x) => (float[b,3] y)
<float[6,2,3,3] K = seeded, float[54,8] W = seeded, float[3,8] V = seeded, float[3] c = seeded,
 int64[2] shape = {2, 54}>
{
  h = Conv<group = 2>(x, K)
  f = Reshape(h, shape)
  a = MatMul(f, W)
  y = Gemm<transB = 1>(a, V, c)
}
"""


def test_each_layer_has_a_grid_an_output_channel() -> None:
    model = ir.from_proto(parse_graph(TEXT))
    feeds = feeds_for(model)
    lifted = lift(model)
    grids = put_in_loop(lifted, InLoop(4, None))
    assert {name: grid.axis for name, grid in grids.items()} == {"K": 0, "W": -1, "V": 0}
    held = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}

    def rounded(w: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
        s = np.abs(w).max(axes, keepdims=True) / 7
        return np.round(w / s) * s

    conv = torch.nn.functional.conv2d(
        torch.tensor(feeds["x"]), torch.tensor(rounded(held["K"], (1, 2, 3))), groups=2
    )
    a = conv.numpy().reshape(2, 54) @ rounded(held["W"], (0,))
    expected = a @ rounded(held["V"], (1,)).T + held["c"]
    np.testing.assert_allclose(lifted.run(feeds)["y"].detach().numpy(), expected, rtol=1e-4, atol=1e-4)


def test_what_two_layers_read_has_one_grid() -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]>
net (float[b,4] x) => (float[b,3] y)
<float[4,3] W = seeded, float[4,3] V = seeded>
{
  p = MatMul(x, W)
  q = MatMul(x, V)
  r = MatMul(x, W)
  s = Add(p, q)
  y = Add(s, r)
}
"""
    lifted = lift(ir.from_proto(parse_graph(text)))
    put_in_loop(lifted, InLoop(8, 8))
    kinds = [type(module).__name__ for module in lifted.module.modules()]
    assert kinds.count("FakeInput") == 1
    assert kinds.count("FakeWeight") == 2
