# SPDX-License-Identifier: Apache-2.0
"""The weight methods as a pass: options, what is seen of the layers, and what is said where nothing is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from seeded import parse_graph
from small import mlp, samples, saved

from splitfold.compiler import compile
from splitfold.passes.affine import unpack_codes
from splitfold.passes.base import Context
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.errors import SpecError
from splitfold.passes.layers import find_layers
from splitfold.passes.pipeline import PassRecord, Pipeline
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.compare import deviation
from splitfold.runtime.digest import content_digest
from splitfold.runtime.errors import CalibrationError
from splitfold.runtime.feeds import Array, Feeds
from splitfold.runtime.session import Session

HEAD = '<ir_version: 10, opset_import: ["" : 20]>\n'
WITH_DATA = ["awq", "gptq", "dgq"]


def graph(text: str) -> ir.Model:
    model = ir.from_proto(parse_graph(HEAD + text))
    CanonicalizePass()(model)
    return model


def quantized(model: ir.Model, options: str, feeds: list[Feeds] | None) -> PassRecord:
    calibration = None if feeds is None else Calibration.of(feeds)
    pipeline = Pipeline.parse(f"quantize-weights{{{options}}}")
    return pipeline.run(model, Context(calibration=calibration))[0]


def done(record: PassRecord) -> dict[str, str]:
    return dict(record.applied)


def seeded(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("method=gptp", "option method=gptp is not one of rtn, mse, awq, gptq, dgq.*Did you mean 'gptq'"),
        ("act-order=true", "act-order is an option of method=gptq, not of method=rtn"),
        ("method=dgq,damping=0.1", "damping is an option of method=gptq, not of method=dgq"),
        ("method=awq,ranges=whole", "ranges is an option of method=gptq, not of method=awq"),
        ("method=gptq,damping=0.0", "damping is 0.0; it lies above 0"),
        ("method=gptq,damping=nan", "damping is nan; it lies above 0"),
        ("method=dgq,bits=8", "bits is 8; with method=dgq it may be 2, 3 or 4"),
        ("method=dgq,symmetric=true", "symmetric is no option of method=dgq"),
        ("form=int8-static", "form=int8-static needs method=dgq, not rtn"),
        ("method=dgq,form=int8-token,accuracy-level=1", "accuracy-level is an option of form=nbits"),
        ("method=dgq,expand=offline", "expand is an option of the int8 forms, not of form=nbits"),
        ("method=dgq,form=qdq,bits=2", "form=qdq holds 3, 4 and 8 bits, not 2"),
    ],
)
def test_options_that_do_not_fit(options: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Pipeline.parse(f"quantize-weights{{{options}}}")


@pytest.mark.parametrize("options", ["method=awq", "method=gptq", "method=dgq", "method=dgq,form=int8-token"])
def test_data_is_asked_for(options: str) -> None:
    model = graph("net (float[b,32] x) => (float[b,8] y) <float[32,8] W = seeded> { y = MatMul(x, W) }")
    with pytest.raises(CalibrationError, match=r"quantize-weights\{method=\w+\} needs calibration data"):
        quantized(model, options, None)


@pytest.mark.parametrize("method", ["rtn", "mse"])
def test_data_is_not_asked_for_where_it_is_not_looked_at(method: str) -> None:
    model = graph("net (float[b,32] x) => (float[b,8] y) <float[32,8] W = seeded> { y = MatMul(x, W) }")
    assert quantized(model, f"method={method}", None).applied


def test_no_layer_needs_no_data() -> None:
    model = graph("net (float[b,32] x) => (float[b,32] y) { y = Relu(x) }")
    assert not quantized(model, "method=gptq", None).modified


# What the methods are worth

DEEP = """
net (float[batch,48] x) => (float[batch,20] y)
<float[48,64] A = seeded, float[64] b = seeded, float[64,40] B = seeded, float[40,20] C = seeded>
{
  [one] h = Gemm(x, A, b)
  r = Relu(h)
  [two] s = MatMul(r, B)
  t = Tanh(s)
  [three] y = MatMul(t, C)
}
"""


def correlated(count: int, seed: int) -> list[Feeds]:
    mix = np.random.default_rng(7).standard_normal((8, 48))
    rng = np.random.default_rng(seed)
    return [
        {"x": (rng.standard_normal((32, 8)) @ mix + 0.1 * rng.standard_normal((32, 48))).astype(np.float32)}
        for _ in range(count)
    ]


def test_data_helps_on_data_not_seen() -> None:
    """On new inputs of the same kind: gptq beats awq, awq and mse beat rtn, each by a margin."""
    held_out = correlated(4, seed=99)
    reference = [Session(graph(DEEP)).run(feeds)["y"] for feeds in held_out]
    found = {}
    for method in ("rtn", "mse", "awq", "gptq"):
        model = graph(DEEP)
        quantized(model, f"method={method},bits=2,block=16,accuracy-level=1", correlated(8, seed=1))
        session = Session(model)
        found[method] = deviation(reference, [session.run(feeds)["y"] for feeds in held_out]).sqnr_db
    print(found)
    assert found["gptq"] > found["awq"] + 1
    assert found["awq"] > found["rtn"] + 0.5
    assert found["mse"] > found["rtn"] + 0.5


@pytest.mark.parametrize("options", ["method=gptq", "method=awq", "method=dgq", "method=gptq,act-order=true"])
def test_the_result_does_not_depend_on_the_chunks(options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def codes() -> dict[str, Array]:
        model = graph(DEEP)
        quantized(model, options, correlated(3, seed=1))
        return {
            name: value.const_value.numpy()
            for name, value in model.graph.initializers.items()
            if value.const_value is not None
        }

    whole = codes()
    monkeypatch.setattr("splitfold.passes.gram.gram_limit", lambda model: 1)
    for name, array in codes().items():
        np.testing.assert_array_equal(array, whole[name])


# Shared weights

SHARED = """
net (float[batch,32] x) => (float[batch,32] y)
<float[32,32] W = seeded>
{
  [first] h = MatMul(x, W)
  [act] a = Relu(h)
  [second] y = MatMul(a, W)
}
"""


@pytest.mark.parametrize("method", WITH_DATA)
def test_a_shared_weight_is_rounded_once_for_all_its_inputs(method: str) -> None:
    model = graph(SHARED)
    record = quantized(model, f"method={method}", [{"x": seeded(64, 32)}])
    assert done(record) == dict.fromkeys(("first", "second"), f"MatMul weights in 4 bits by {method}")
    assert [name for name in model.graph.initializers if name.startswith("W_int4")] == ["W_int4"]


def test_both_inputs_of_a_shared_weight_count() -> None:
    """A copy with the second input cut off, and the same with the first, give other codes than both."""

    def codes(text: str, feeds: Feeds) -> Array:
        model = graph(text)
        quantized(model, "method=gptq,bits=3", [feeds])
        held = model.graph.initializers["W_int4"].const_value
        assert held is not None
        return unpack_codes(held.numpy(), 4, 32)

    x = seeded(64, 32)
    single = "net (float[b,32] x) => (float[b,32] y) <float[32,32] W = seeded> { [only] y = MatMul(x, W) }"
    weight = graph(single).graph.initializers["W"].const_value
    assert weight is not None
    second = np.maximum(x @ weight.numpy(), 0)
    both = codes(SHARED, {"x": x})
    assert (both != codes(single, {"x": x})).any()
    assert (both != codes(single, {"x": second})).any()
    np.testing.assert_array_equal(both, codes(single, {"x": np.concatenate([x, second])}))


# What cannot be seen


@pytest.mark.parametrize("method", WITH_DATA)
@pytest.mark.parametrize(("operator", "size"), [("Exp", 1e4), ("Neg", 1e25)], ids=["inf", "overflow"])
def test_infinities_fall_back_with_the_reason(method: str, operator: str, size: float) -> None:
    text = f"""
    net (float[b,32] x) => (float[b,8] y, float[b,8] z)
    <float[32,8] W = seeded, float[32,8] V = seeded, float size = {{{size}}}>
    {{ [good] y = MatMul(x, W)  [scale] s = Mul(x, size)  [act] a = {operator}(s)  [bad] z = MatMul(a, V) }}
    """
    record = quantized(graph(text), f"method={method}", [{"x": seeded(16, 32)}])
    instead = "by dgq on the weights alone" if method == "dgq" else f"by mse, not {method}"
    reason = "calibration saw NaN, infinity or overflow in 'a'"
    assert done(record) == {
        "good": f"MatMul weights in 4 bits by {method}",
        "bad": f"MatMul weights in 4 bits {instead}: {reason}",
    }


@pytest.mark.parametrize("method", WITH_DATA)
def test_an_input_of_zeros(method: str) -> None:
    model = graph("net (float[b,32] x) => (float[b,8] y) <float[32,8] W = seeded> { [d] y = MatMul(x, W) }")
    record = quantized(model, f"method={method}", [{"x": np.zeros((4, 32), np.float32)}])
    assert "'x' is zero in all of the calibration data" in done(record)["d"]


@pytest.mark.parametrize("method", WITH_DATA)
def test_layers_in_subgraphs(method: str) -> None:
    text = """
    net (float[2,32] x, bool flag) => (float[2,8] y, float[2,8] z)
    <float[32,8] W = seeded, float[32,8] V = seeded>
    {
      [choice] y = If(flag)
        <then_branch = then () => (float[2,8] a) { [inner] a = MatMul(x, W) },
         else_branch = else () => (float[2,8] b) { [other] c = MatMul(x, W) [neg] b = Neg(c) }>
      [outer] z = MatMul(x, V)
    }
    """
    model = graph(text)
    record = quantized(model, f"method={method}", [{"x": seeded(2, 32), "flag": np.array(True)}])
    assert done(record)["outer"] == f"MatMul weights in 4 bits by {method}"
    assert "it stands in a subgraph, whose activations cannot be seen" in done(record)["inner"]
    assert np.isfinite(Session(model).run({"x": seeded(2, 32), "flag": np.array(False)})["y"]).all()


@pytest.mark.parametrize("form", ["int8-dynamic", "int8-token"])
@pytest.mark.parametrize("expand", ["load", "offline"])
def test_int8_forms_in_subgraphs(form: str, expand: str) -> None:
    text = """
    net (float[2,32] x, bool flag) => (float[2,8] y, float[2,8] z)
    <float[32,8] W = seeded>
    {
      [outer] z = MatMul(x, W)
      [choice] y = If(flag)
        <then_branch = then () => (float[2,8] a) { [inner] a = MatMul(x, W) },
         else_branch = else () => (float[2,8] b) { [neg] b = Neg(z) }>
    }
    """
    model = graph(text)
    feeds = {"x": seeded(2, 32), "flag": np.array(True)}
    quantized(model, f"method=dgq,form={form},expand={expand}", [feeds])
    found = Session(model).run(feeds)
    np.testing.assert_allclose(found["y"], found["z"], rtol=1e-5)


def test_int8_static_leaves_what_no_grid_can_hold() -> None:
    text = """
    net (float[b,32] x) => (float[b,8] y, float[b,8] z)
    <float[32,8] W = seeded, float[32,8] V = seeded, float big = {1e30}>
    { [good] y = MatMul(x, W)  [scale] s = Mul(x, big)  [bad] z = MatMul(s, V) }
    """
    record = quantized(graph(text), "method=dgq,form=int8-static", [{"x": seeded(16, 32)}])
    assert list(done(record)) == ["good"]
    assert [layer for layer, _ in record.skipped] == ["bad"]
    assert "'s'" in record.skipped[0][1]


# Sizes that do not fit


@pytest.mark.parametrize("k", [1, 7, 33, 50])
@pytest.mark.parametrize("method", ["mse", *WITH_DATA])
def test_blocks_that_do_not_divide_k(method: str, k: int) -> None:
    model = graph(
        f"net (float[b,{k}] x) => (float[b,3] y) <float[{k},3] W = seeded> {{ [d] y = MatMul(x, W) }}"
    )
    feeds = {"x": seeded(64, k)}
    reference = Session(model).run(feeds)["y"]
    record = quantized(model, f"method={method},accuracy-level=1", [feeds])
    assert done(record)["d"].endswith(f"by {method}")
    found = deviation([reference], [Session(model).run(feeds)["y"]])
    assert found.sqnr_db > 15


@pytest.mark.parametrize("method", ["mse", *WITH_DATA])
def test_a_single_column(method: str) -> None:
    model = graph("net (float[b,40] x) => (float[b,1] y) <float[40,1] W = seeded> { [d] y = MatMul(x, W) }")
    feeds = {"x": seeded(64, 40)}
    reference = Session(model).run(feeds)["y"]
    quantized(model, f"method={method}", [feeds])
    assert deviation([reference], [Session(model).run(feeds)["y"]]).sqnr_db > 15


# From end to end


@pytest.mark.parametrize(
    "options",
    [
        "method=gptq,bits=3",
        "method=awq",
        "method=dgq",
        "method=dgq,form=int8-static",
        "method=dgq,form=int8-dynamic",
        "method=dgq,form=int8-token,expand=offline",
    ],
)
def test_compile_realises_and_verifies(tmp_path: Path, options: str) -> None:
    path = saved(mlp(), tmp_path / "model.onnx")
    data = [{"x": samples(24)}]
    pipeline = f"quantize-weights{{{options}}}"
    artifact = compile(path, pipeline=pipeline, calibration=data)
    realised = artifact.manifest["realised"]
    assert set(realised) == {"encoder.up", "encoder.down"}
    assert all(item["low_bit"] for item in realised.values()), realised
    assert not artifact.manifest["put_back"]
    again = compile(path, pipeline=pipeline, calibration=data)
    assert content_digest(again.model) == content_digest(artifact.model), "it is not deterministic"


def test_layers_are_found_once_more_after_the_opset_is_raised() -> None:
    model = graph(DEEP)
    record = quantized(model, "method=dgq,form=int8-token,only=[two]", correlated(2, seed=1))
    assert list(done(record)) == ["two"]
    assert {layer.name for layer in find_layers(model)[0]} == {"one", "three"}
