# SPDX-License-Identifier: Apache-2.0
"""Lifting ONNX models into torch.fx: names, shapes, subgraphs, gradients, weights written back, refusals."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("torch", reason="lifting needs the extra 'torch'")

import torch
from lifting import largest_difference, model_of, reference
from random_graphs import random_model

from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.runtime.errors import UnsupportedError
from splitfold.runtime.feeds import Array, synthetic_feeds
from splitfold.runtime.lift import ORIGIN, VALUE, lift, lower_weights

HEAD = '<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>'


def _normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def _layer() -> ir.Model:
    """A dense layer whose rows are cut by sizes that come from the input's shape."""
    text = (
        f"{HEAD} m (float[n, t, 6] x) => (float[n, t, 2, 2] y) {{"
        " h = MatMul(x, w) c = Add(h, b) s = Shape<start = 0, end = 2>(c)"
        " two = Constant<value_ints = [2, 2]>() shape = Concat<axis = 0>(s, two) y = Reshape(c, shape) }"
    )
    model = model_of(text, w=_normal(6, 4), b=_normal(4))
    model.graph.initializers["w"].name = "dense.0.weight"
    model.graph.initializers["b"].name = "dense.0.bias"
    return model


# Names and structure


def test_names_are_kept() -> None:
    lifted = lift(_layer())
    assert lifted.parameters == {"dense.0.weight": "dense.0.weight", "dense.0.bias": "dense.0.bias"}
    assert set(dict(lifted.module.named_parameters())) == {"dense.0.weight", "dense.0.bias"}
    nodes = {node.name: node for node in lifted.module.graph.nodes}
    assert [nodes[lifted.values[name]].meta[VALUE] for name in ("x", "h", "y")] == ["x", "h", "y"]
    origin = nodes[lifted.values["h"]].meta[ORIGIN]
    assert (origin.op_type, origin.domain) == ("MatMul", "")
    assert nodes[lifted.values["h"]].target is torch.matmul
    assert set(lifted.module.state_dict()) == set(lifted.parameters)


def test_layers_of_the_canonical_form_are_in_the_origin() -> None:
    model = _layer()
    CanonicalizePass()(model)
    lifted = lift(model)
    layers = [
        n.meta[ORIGIN].metadata.get("splitfold.layers") for n in lifted.module.graph.nodes if ORIGIN in n.meta
    ]
    assert layers
    assert all(layers)


def test_odd_names_are_made_valid() -> None:
    model = _layer()
    for value, name in zip(
        (model.graph.inputs[0], *model.graph.initializers.values()),
        ("input.1", "a/b:0", "forward"),
        strict=True,
    ):
        value.name = name
    lifted = lift(model)
    assert lifted.inputs == ("input.1",)
    assert lifted.module.get_parameter(lifted.parameters["forward"]) is not None
    assert largest_difference(model, {"input.1": _normal(2, 3, 6)}, lifted) < 1e-6


def test_a_name_that_is_a_prefix_of_another_is_kept_apart() -> None:
    text = f"{HEAD} m (float[2] x) => (float[2] y) {{ a = Add(x, w)  y = Mul(a, v) }}"
    model = model_of(text, w=_normal(2), v=_normal(2, seed=1))
    model.graph.initializers["w"].name, model.graph.initializers["v"].name = "w", "w.v"
    lifted = lift(model)
    assert len(set(lifted.parameters.values())) == 2
    assert largest_difference(model, {"x": _normal(2)}, lifted) == 0


def test_shapes_stay_dynamic_and_are_computed_on_the_host() -> None:
    lifted = lift(_layer())
    for n, t in ((1, 2), (3, 5)):
        assert largest_difference(_layer(), {"x": _normal(n, t, 6)}, lifted) < 1e-6
    shape = next(n for n in lifted.module.graph.nodes if n.name == lifted.values["shape"])
    assert isinstance(lifted.record({"x": _normal(1, 2, 6)}, ["shape"])["shape"], np.ndarray)
    assert 2 in [number for part in shape.args for number in (part if isinstance(part, tuple) else ())]


def test_values_can_be_recorded() -> None:
    found = lift(_layer()).record({"x": _normal(2, 3, 6)}, ["h", "y"])
    assert found["h"].shape == (2, 3, 4)
    assert found["y"].requires_grad


def test_nodes_in_any_order() -> None:
    model = _layer()
    for node in list(model.graph)[:2]:
        model.graph.remove(node)
        model.graph.append(node)
    assert largest_difference(_layer(), {"x": _normal(1, 2, 6)}, lift(model)) < 1e-6


def test_random_models() -> None:
    for seed in range(12):
        model = random_model(seed)
        assert largest_difference(model, synthetic_feeds(model)) < 1e-4, seed


# Subgraphs

BRANCHES = (
    f"{HEAD} m (bool c, float[2] x) => (float[2] y) {{ h = Mul(x, w)"
    " y = If(c) <then_branch = t () => (float[2] p) { p = Add(h, w) },"
    " else_branch = e () => (float[2] q) { q = Sub(h, w) }> }"
)
LOOP = (
    f"{HEAD} m (int64 n, float[2] x) => (float[2] y, float[k, 2] rows) {{"
    " go = Constant<value_int = 1>() c = Cast<to = 9>(go)"
    " y, rows = Loop(n, c, x)"
    " <body = b (int64 i, bool more, float[2] h) => (bool m2, float[2] h2, float[2] r) {"
    " m2 = Identity(more) h2 = Mul(h, w) r = Identity(h2) }> }"
)
SCAN = (
    f"{HEAD} m (float[t, 2] x) => (float[2] y, float[t, 2] rows) {{"
    " zero = Constant<value_floats = [0.0, 0.0]>()"
    " y, rows = Scan<num_scan_inputs = 1, body = b (float[2] s, float[2] v) => (float[2] s2, float[2] r) {"
    " u = Mul(v, w) s2 = Add(s, u) r = Identity(s2) }>(zero, x) }"
)


@pytest.mark.parametrize("condition", [True, False])
def test_if(condition: bool) -> None:
    model = model_of(BRANCHES, w=_normal(2))
    feeds = {"c": np.array(condition), "x": _normal(2, seed=1)}
    lifted = lift(model)
    assert list(lifted.parameters) == ["w"], "a weight of the graph around is one parameter"
    assert largest_difference(model, feeds, lifted) < 1e-6
    (found,) = lifted.module(*(torch.from_numpy(np.array(feeds[name])) for name in lifted.inputs))
    found.sum().backward()
    expected = torch.tensor(feeds["x"]) + (1 if condition else -1)
    torch.testing.assert_close(lifted.module.get_parameter("w").grad, expected)


@pytest.mark.parametrize(("text", "first"), [(LOOP, np.array(3)), (SCAN, None)])
def test_loop_and_scan(text: str, first: Array | None) -> None:
    model = model_of(text, w=_normal(2))
    feeds = {"x": _normal(4, 2)} if first is None else {"n": first, "x": _normal(2)}
    lifted = lift(model)
    assert largest_difference(model, feeds, lifted) < 1e-6
    lifted.run(feeds)["y"].sum().backward()
    assert lifted.module.get_parameter("w").grad.abs().sum() > 0


# Gradients and training


def test_gradients_are_those_of_torch() -> None:
    lifted, x = lift(_layer()), torch.from_numpy(_normal(2, 3, 6)).requires_grad_()
    (y,) = lifted.module(x)
    y.square().sum().backward()
    weight, bias = (torch.from_numpy(a.copy()).requires_grad_() for a in (_normal(6, 4), _normal(4)))
    other = x.detach().clone().requires_grad_()
    (other @ weight + bias).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    torch.testing.assert_close(lifted.module.get_parameter("dense.0.weight").grad, weight.grad)
    torch.testing.assert_close(lifted.module.get_parameter("dense.0.bias").grad, bias.grad)


def test_what_is_trained() -> None:
    text = (
        f"{HEAD} m (float[2, 3, 4, 4] x) => (float[2, 3, 4, 4] y) {{"
        " n = BatchNormalization(x, g, b, mean, var) m = Add(n, mask) s = Mul(m, half)"
        " q = QuantizeLinear(s, step) d = DequantizeLinear(q, step) y = Add(d, shift) }"
    )
    mask = np.array([0, 0, 0, -np.inf], np.float32)
    weights = {name: np.abs(_normal(3)) for name in ("g", "b", "mean", "var")}
    model = model_of(
        text,
        **weights,
        mask=mask,
        half=np.array(0.5, np.float32),
        step=np.array([0.1], np.float32),
        shift=_normal(4),
    )
    trained = {name for name, p in lift(model).module.named_parameters() if p.requires_grad}
    assert trained == {"g", "b", "shift"}


def test_weights_come_back() -> None:
    model = _layer()
    before = {name: value.const_value.numpy().copy() for name, value in model.graph.initializers.items()}
    lifted = lift(model)
    assert not lower_weights(lifted, model)
    feeds = {"x": _normal(2, 3, 6)}
    optimizer = torch.optim.SGD(lifted.module.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        lifted.run(feeds)["y"].square().sum().backward()
        optimizer.step()
    assert all(np.array_equal(model.graph.initializers[n].const_value.numpy(), a) for n, a in before.items())
    assert lower_weights(lifted, model)
    assert not lower_weights(lifted, model)
    assert largest_difference(model, feeds, lifted) < 1e-6
    assert not any(
        np.array_equal(model.graph.initializers[n].const_value.numpy(), a) for n, a in before.items()
    )


@pytest.mark.parametrize("kind", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE])
def test_the_element_type_of_a_weight_is_kept(kind: ir.DataType) -> None:
    text = f"{HEAD} m (float[2, 3] x) => (float[2, 4] y) {{ c = Cast<to = 1>(w) y = MatMul(x, c) }}"
    model = model_of(text, w=_normal(3, 4))
    value = model.graph.initializers["w"]
    value.const_value = ir.tensor(_normal(3, 4).astype(kind.numpy()), dtype=kind, name="w")
    value.dtype = kind
    lifted = lift(model)
    assert not lower_weights(lifted, model)
    with torch.no_grad():
        lifted.module.get_parameter("w").mul_(2)
    assert lower_weights(lifted, model)
    assert value.const_value.dtype is kind
    twice = _normal(3, 4).astype(kind.numpy()).astype(np.float64) * 2
    np.testing.assert_array_equal(value.const_value.numpy().astype(np.float64), twice)


def test_weights_of_subgraphs_and_constants_come_back() -> None:
    text = (
        f"{HEAD} m (bool c, float[2] x) => (float[2] y) {{ y = If(c) <then_branch = t () => (float[2] p)"
        " <float[2] inner = {1.0, 2.0}> { p = Mul(x, inner) },"
        " else_branch = e () => (float[2] q) { k = Constant<value_floats = [3.0, 4.0]>() q = Mul(x, k) }> }"
    )
    model = ir.from_onnx_text(text)
    lifted = lift(model)
    assert set(lifted.parameters) == {"y/then_branch/inner", "y/else_branch/k"}
    with torch.no_grad():
        for parameter in lifted.module.parameters():
            parameter.mul_(2)
    assert lower_weights(lifted, model)
    for condition, factor in ((True, [2, 4]), (False, [6, 8])):
        found = reference(model, {"c": np.array(condition), "x": np.ones(2, np.float32)})["y"]
        np.testing.assert_array_equal(found, np.array(factor, np.float32))


def test_weights_of_another_model_are_refused() -> None:
    text = f"{HEAD} m (float[2] x) => (float[2] y) {{ y = Mul(x, v) }}"
    with pytest.raises(ValueError, match=r"no constant 'dense\.0\.weight' of shape \[6, 4\]"):
        lower_weights(lift(_layer()), model_of(text, v=_normal(2)))


# What is refused


def test_an_operator_without_a_row_is_named() -> None:
    text = (
        f"{HEAD} m (float[2] x) => (float[2] y, float[2] z) {{ [first] y = Bernoulli(x)"
        " [second] z = RandomNormalLike(x) }"
    )
    model = ir.from_onnx_text(text)
    model.graph[0].metadata_props["splitfold.layers"] = '["encoder.gate"]'
    with pytest.raises(UnsupportedError) as raised:
        lift(model)
    assert "'first' (Bernoulli) of layer 'encoder.gate'" in str(raised.value)
    assert "Also refused: RandomNormalLike" in str(raised.value)


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ("y = Add<unheard = 1>(x, x)", "attribute 'unheard'"),
        ("y = com.microsoft.FusedMatMul<transBatchA = 1>(x, x)", "transposed batch axes"),
        ("y = Cast<to = 8>(x)", "STRING"),
        ("q = QuantizeLinear<output_dtype = 17>(x, s) y = DequantizeLinear(q, s)", "FLOAT8E4M3FN"),
        ("s2 = If(c) <then_branch = t () => (float[2] p) { p = Bernoulli(x) },"
         " else_branch = e () => (float[2] q) { q = Neg(x) }> y = Neg(s2)", "Bernoulli"),
    ],
)  # fmt: skip
def test_attributes_types_and_subgraphs_are_checked(node: str, words: str) -> None:
    model = ir.from_onnx_text(f"{HEAD} m (float[2] x, float s, bool c) => (y) {{ {node} }}")
    with pytest.raises(UnsupportedError, match=words):
        lift(model)


def test_a_newer_opset_is_refused() -> None:
    model = _layer()
    model.opset_imports[""] = 99
    with pytest.raises(UnsupportedError, match="opset 99"):
        lift(model)


def test_a_missing_torch_names_the_extra() -> None:
    code = "import sys; sys.modules['torch'] = None\nimport splitfold.runtime.lift"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "lifting a model needs torch: pip install 'splitfold[torch]'" in done.stderr
