# SPDX-License-Identifier: Apache-2.0
"""Signals from relevance and gradients: each from its formula, by an independent small computation."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("torch", reason="these signals need the extra 'torch'")

import torch
from encoder import encoder, token_batches
from lifting import model_of

from splitfold.passes.base import Context
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.carry_out import Carrying
from splitfold.passes.layers import Layer, LayerKind, find_layers
from splitfold.passes.precision import Precision
from splitfold.passes.signals.deviations import output_errors
from splitfold.passes.signals.gradients import Fisher, GradientActivation
from splitfold.passes.signals.held_weights import weight_errors
from splitfold.passes.signals.hessian import Hawq, HessianTrace, mean_traces
from splitfold.passes.signals.relevance import LayerRelevance, RelevanceError
from splitfold.passes.signals.signal import Basis, Signal, measured
from splitfold.passes.signals.subject import Subject, find_subject
from splitfold.passes.signals.table import SignalKind, make_signal
from splitfold.passes.signals.taylor import FirstOrderTaylor, SecondOrderTaylor
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.errors import CalibrationError, UnsupportedError
from splitfold.runtime.feeds import Array, Feeds
from splitfold.runtime.lift import Lifted, lift
from splitfold.runtime.lift.hessian import hessian_traces
from splitfold.runtime.relevance.propagate import propagate
from splitfold.runtime.relevance.targets import OwnDistance, UserTarget
from splitfold.runtime.session import Session

HEAD = '<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>'
SIMULATED = tuple(map(Precision.parse, ("fp32", "sim-w3", "sim-w5")))
KINDS = (
    SignalKind.RELEVANCE,
    SignalKind.RELEVANCE_ERROR,
    SignalKind.GRADIENT_ACTIVATION,
    SignalKind.TAYLOR,
    SignalKind.TAYLOR_2,
    SignalKind.FISHER,
    SignalKind.HESSIAN_TRACE,
    SignalKind.HAWQ_V2,
)
SQUARES = UserTarget(
    lambda outputs, _: outputs["y"].pow(2).flatten(1).sum(1) + outputs["y"].flatten(1).sum(1)
)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Array:
    return (scale * np.random.default_rng([seed, *shape]).standard_normal(shape)).astype(np.float32)


def subject_of(
    model: ir.Model, batches: list[Feeds] | None, choices: tuple[Precision, ...] = SIMULATED
) -> Subject:
    CanonicalizePass()(model)
    layers = [layer for layer in find_layers(model)[0] if layer.kind is not LayerKind.EMBEDDING]
    data = None if batches is None else Calibration.of(batches)
    return find_subject(model, layers, choices, Context(calibration=data), Carrying())


def image_model() -> ir.Model:
    """A grouped convolution of stride 2, a product of rows (three a sample) and a Gemm."""
    return model_of(
        f"{HEAD} m (float[n, 4, 6, 6] x) => (float[n, 3] y)"
        " { [conv] c = Conv<group = 2, strides = [2, 2]>(x, k, b)"
        " t = Tanh(c) r = Reshape(t, rows) [rowed] h = MatMul(r, w) g = Gelu(h)"
        " f = Flatten(g) [dense] y = Gemm(f, v, a) }",
        k=normal(6, 2, 2, 2, scale=0.5),
        b=normal(6, scale=0.1),
        rows=np.array([0, 3, 18]),
        w=normal(18, 5, scale=0.3),
        v=normal(15, 3, scale=0.3),
        a=normal(3),
    )


IMAGES: list[Feeds] = [{"x": normal(4, 4, 6, 6, seed=at)} for at in range(2)]


@cache
def images() -> Subject:
    return subject_of(image_model(), IMAGES)


@cache
def tokens(rows: int = 2) -> Subject:
    return subject_of(
        ir.from_proto(encoder(layers=1)),
        list(token_batches(rows)),
        tuple(map(Precision.parse, ("fp32", "int8-static", "int8-dynamic", "w4-b16", "w2-b16"))),
    )


def sample_gradients(lifted: Lifted, layer: Layer, feeds: Feeds) -> list[Array]:
    """The derivatives of the target by a layer's weight, one sample at a time, by torch alone."""
    parameter = dict(lifted.module.named_parameters())[lifted.parameters[layer.weight.name or ""]]
    found = []
    for at in range(len(feeds["x"])):
        outputs = lifted.run({"x": feeds["x"][at : at + 1]})
        (gradient,) = torch.autograd.grad(SQUARES.value(outputs, {}).sum(), parameter)
        found.append(gradient.double().numpy())
    return found


def rounded(weight: Array, axis: int, bits: int) -> Array:
    """A weight after an asymmetric grid for each output channel, whose range holds 0."""
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    low, high = np.minimum(rows.min(1), 0)[:, None], np.maximum(rows.max(1), 0)[:, None]
    step = (high - low) / (2**bits - 1)
    zero = np.rint(-low / step)
    back = (np.clip(np.rint(rows / step) + zero, 0, 2**bits - 1) - zero) * step
    shape = np.moveaxis(weight, axis, 0).shape
    return np.moveaxis(back.reshape(shape), 0, axis)


def errors_of(layer: Layer) -> dict[Precision, Array]:
    weight = layer.weight_array()
    return {
        item: rounded(weight, layer.channel_axis, item.weight.bits) - weight
        for item in SIMULATED
        if item.weight is not None
    }


def close(found: Mapping[Precision, float], expected: Mapping[Precision, float], rel: float = 2e-3) -> None:
    assert found[Precision.float()] == 0
    assert {item: loss for item, loss in found.items() if not item.is_float} == {
        item: pytest.approx(loss, rel=rel) for item, loss in expected.items()
    }


# From the derivatives of single samples


def test_fisher_from_the_gradients_of_single_samples() -> None:
    found, lifted = Fisher(SQUARES).scores(images()), lift(images().model)
    assert found.basis is Basis.LOSS
    for layer in images().layers:
        gradients = [one for feeds in IMAGES for one in sample_gradients(lifted, layer, feeds)]
        diagonal = np.mean(np.square(gradients), axis=0)
        expected = {item: float((diagonal * error**2).sum()) for item, error in errors_of(layer).items()}
        close(found.by_choice[layer.name], expected)


def test_taylor_from_the_gradients_of_single_samples() -> None:
    """Also the form by outputs is the weight's gradient times what happens to the weight."""
    first, second = FirstOrderTaylor(SQUARES).scores(images()), SecondOrderTaylor(SQUARES).scores(images())
    lifted = lift(images().model)
    for layer in images().layers:
        gradients = [one for feeds in IMAGES for one in sample_gradients(lifted, layer, feeds)]
        changes = {
            item: [float((g * error).sum()) for g in gradients] for item, error in errors_of(layer).items()
        }
        close(
            first.by_choice[layer.name], {item: float(np.mean(np.abs(one))) for item, one in changes.items()}
        )
        close(
            second.by_choice[layer.name],
            {item: float(np.mean(np.square(one))) for item, one in changes.items()},
        )


def test_second_order_taylor_estimates_the_measured_error() -> None:
    """Where errors are small it is the squared relative error of the outputs, but for the noise."""
    subject = tokens(16)
    found, expected = SecondOrderTaylor().scores(subject).by_choice, output_errors(subject, "test")
    for item in map(Precision.parse, ("int8-static", "int8-dynamic", "w4-b16")):
        ratios = [found[layer.name][item] / expected[layer.name][item] for layer in subject.layers]
        assert np.exp(np.mean(np.log(ratios))) == pytest.approx(1, abs=0.3), str(item)
        assert max(ratios) < 3
        assert min(ratios) > 1 / 3


# Curvature


def exact_trace(lifted: Lifted, name: str, feeds: Feeds) -> float:
    parameter = dict(lifted.module.named_parameters())[lifted.parameters[name]]
    size = parameter.numel()

    def loss(flat: torch.Tensor) -> torch.Tensor:
        made = torch.func.functional_call(
            lifted.module,
            {lifted.parameters[name]: flat.reshape(parameter.shape)},
            (torch.tensor(feeds["x"]),),
        )[0]
        held = lifted.run(feeds)["y"].detach()
        return (made - held).square().sum() / (2 * held.square().sum())

    hessian = torch.autograd.functional.hessian(loss, parameter.detach().reshape(size))
    return float(torch.trace(hessian))


def test_hutchinson_against_the_exact_trace() -> None:
    model = image_model()
    CanonicalizePass()(model)
    lifted, feeds = lift(model), IMAGES[0]
    names = [layer.weight.name or "" for layer in find_layers(model)[0]]
    exact = {name: exact_trace(lifted, name, feeds) for name in names}
    for sizes in (None, exact):
        found = hessian_traces(lifted, feeds, OwnDistance(), names, probes=300, sizes=sizes)
        assert found == {name: pytest.approx(trace, rel=0.15) for name, trace in exact.items()}


def test_the_trace_of_a_quadratic_is_exact() -> None:
    """y = x w: the Hessian of half of |y|^2 is x^T x, whose trace random signs give without an error only
    where it is diagonal."""
    model = model_of(f"{HEAD} m (float[n, 4] x) => (float[n, 5] y) {{ y = MatMul(x, w) }}", w=normal(4, 5))
    half = UserTarget(lambda outputs, _: outputs["y"].square().sum(1) / 2)
    feeds = {"x": np.diag(np.array([1, 2, 3, 4], np.float32))}
    found = hessian_traces(lift(model), feeds, half, ["w"], probes=1)
    assert found["w"] == pytest.approx(5 * (1 + 4 + 9 + 16), rel=1e-5)


def test_hawq_and_the_trace_as_an_importance() -> None:
    traces = mean_traces(images(), OwnDistance(), 4, 0, "test")
    losses, importance = Hawq().scores(images()), HessianTrace().scores(images())
    assert (losses.basis, importance.basis) == (Basis.LOSS, Basis.IMPORTANCE)
    lifted, names = lift(images().model), [layer.weight.name or "" for layer in images().layers]
    sizes = hessian_traces(lifted, IMAGES[0], OwnDistance(), names)
    runs = [
        hessian_traces(lifted, feeds, OwnDistance(), names, probes=4, seed=at + 1, sizes=sizes)
        for at, feeds in enumerate(IMAGES)
    ]
    for layer in images().layers:
        mean = float(np.mean([run[layer.weight.name or ""] for run in runs])) / layer.weight_array().size
        assert traces[layer.name] == pytest.approx(mean, rel=1e-4)
        expected = {item: max(mean, 0) * float((error**2).sum()) for item, error in errors_of(layer).items()}
        close(losses.by_choice[layer.name], expected)
        assert importance.by_layer[layer.name] == pytest.approx(
            max(mean, 0) * float((layer.weight_array() ** 2).sum()), rel=1e-4
        )


# Relevance and its control


def test_gradient_times_activation_by_its_formula() -> None:
    found, lifted = GradientActivation(SQUARES).scores(images()), lift(images().model)
    sums = dict.fromkeys(found.by_layer, 0.0)
    for feeds in IMAGES:
        values = lifted.record(feeds, [layer.output.name or "" for layer in images().layers] + ["y"])
        total = SQUARES.value(values, {}).sum()
        for layer in images().layers:
            value = values[layer.output.name or ""]
            (gradient,) = torch.autograd.grad(total, value, retain_graph=True)
            sums[layer.name] += float((value.detach() * gradient).abs().sum())
    assert found.by_layer == {
        name: pytest.approx(one / sum(sums.values()), rel=1e-4) for name, one in sums.items()
    }


def relevances(subject: Subject, batches: list[Feeds]) -> dict[str, list[Array]]:
    names = {layer.name: layer.output.name or "" for layer in subject.layers}
    runs = [propagate(lift(subject.model), feeds, names=tuple(names.values())) for feeds in batches]
    return {layer: [run.values[name] for run in runs] for layer, name in names.items()}


def test_relevance_of_a_layer_is_its_share_of_the_magnitude() -> None:
    found = LayerRelevance().scores(tokens())
    sums = {
        layer: sum(float(np.abs(one).sum()) for one in arrays)
        for layer, arrays in relevances(tokens(), token_batches(2)).items()
    }
    assert found.basis is Basis.IMPORTANCE
    assert found.by_layer == {
        name: pytest.approx(one / sum(sums.values()), rel=1e-4) for name, one in sums.items()
    }


def test_relevance_times_error_element_by_element() -> None:
    found, by_layer = RelevanceError().scores(images()), relevances(images(), IMAGES)
    total = sum(float(np.abs(one).sum()) for arrays in by_layer.values() for one in arrays)
    for layer in images().layers:
        for item, error in errors_of(layer).items():
            changed = images().model.clone()
            tensor = ir.tensor((layer.weight_array() + error).astype(np.float32), name=layer.weight.name)
            changed.graph.initializers[layer.weight.name or ""].const_value = tensor
            expected = 0.0
            for feeds, relevance in zip(IMAGES, by_layer[layer.name], strict=True):
                name = layer.output.name or ""
                x = Session(images().model).run(feeds, [layer.input.name or "", name])
                part = Session(changed).run(feeds, [layer.input.name or "", name])
                if not np.array_equal(x[layer.input.name or ""], part[layer.input.name or ""]):
                    pytest.fail("the layer's input moved")
                moved = np.square(part[name] - x[name], dtype=np.float64)
                expected += float((np.abs(relevance) * moved).sum() / np.mean(np.square(x[name])))
            assert found.by_choice[layer.name][item] == pytest.approx(expected / total, rel=2e-3)


# What is held


def test_weights_are_read_back_from_every_carrier() -> None:
    for layer in tokens().layers:
        weight = layer.weight_array()
        found = weight_errors(tokens(), layer, "test")
        step = np.abs(weight).max(0) / 127
        for item in (Precision.int8_static(), Precision.int8_dynamic()):
            assert found[item] == pytest.approx(np.rint(weight / step) * step - weight, abs=1e-6)
        for bits in (4, 2):
            blocks = weight.T.reshape(weight.shape[1], -1, 16)
            flat = blocks.reshape(-1, 16)
            expected = rounded(flat, 0, bits).reshape(weight.shape[1], -1).T - weight
            item = Precision.blocks(bits, 16)
            differing = np.abs(found[item] - expected) > 1e-4
            assert differing.mean() < 0.02  # the side of a tie
        assert not found[Precision.float()].any()


def test_weights_of_a_convolution_are_read_back() -> None:
    subject = subject_of(image_model(), IMAGES, (Precision.float(), Precision.int8_static()))
    layer = next(layer for layer in subject.layers if layer.kind is LayerKind.CONV)
    weight = layer.weight_array()
    step = np.abs(weight).reshape(6, -1).max(1).reshape(6, 1, 1, 1) / 127
    found = weight_errors(subject, layer, "test")[Precision.int8_static()]
    assert found == pytest.approx(np.rint(weight / step) * step - weight, abs=1e-6)


# Refusals


@pytest.mark.parametrize("kind", KINDS)
def test_signals_say_what_they_need(kind: SignalKind, monkeypatch: pytest.MonkeyPatch) -> None:
    signal = make_signal(kind)
    with pytest.raises(CalibrationError, match=kind.value):
        measured(signal, subject_of(image_model(), None))
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "splitfold.runtime.lift")
    with pytest.raises(
        UnsupportedError, match=rf"the signal {kind.value} needs torch: pip install 'splitfold\[torch\]'"
    ):
        measured(signal, images())


@pytest.mark.parametrize("kind", KINDS)
def test_operators_that_cannot_be_lifted_are_named(kind: SignalKind) -> None:
    model = model_of(
        f"{HEAD} m (float[n, 3] x) => (float[3, 3] y)"
        " { [dense] h = MatMul(x, w) [turned] y = com.microsoft.Inverse(h) }",
        w=normal(3, 3),
    )
    subject = subject_of(model, [{"x": normal(3, 3)}])
    with pytest.raises(UnsupportedError, match=f"the signal {kind.value} .*'turned' .*Inverse"):
        measured(make_signal(kind), subject)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_without_a_path_is_named(kind: SignalKind) -> None:
    """A table looked up is all that the float output comes from; the layer only leads to a class."""
    model = model_of(
        f"{HEAD} m (int64[n] ids, float[n, 4] x) => (float[n, 8] y, int64[n, 1] z)"
        " { y = Gather(table, ids) [dense] h = MatMul(x, w) z = ArgMax<axis = 1>(h) }",
        table=normal(9, 8),
        w=normal(4, 3),
    )
    subject = subject_of(model, [{"ids": np.array([1, 2]), "x": normal(2, 4)}])
    with pytest.raises(UnsupportedError, match=f"the signal {kind.value} finds no .* layer 'dense'"):
        measured(make_signal(kind), subject)


@pytest.mark.parametrize(
    "signal", [FirstOrderTaylor(), SecondOrderTaylor(), Fisher()], ids=lambda one: one.name
)
def test_random_draws_are_seeded(signal: Signal) -> None:
    assert signal.scores(images()).by_choice == signal.scores(images()).by_choice
