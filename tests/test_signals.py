# SPDX-License-Identifier: Apache-2.0
"""Signals: each against its formula by hand, an independent small implementation, or plain runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx_ir as ir
import pytest
from encoder import encoder, token_batches

from splitfold.passes.base import Context, Findings
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.carry_out import Carrying, carry_out
from splitfold.passes.expected_loss import ErrorModel, expected_losses, shifts
from splitfold.passes.layers import LayerKind, find_layers
from splitfold.passes.precision import Precision
from splitfold.passes.signals.activations import ActivationKurtosis, InfinityNorm
from splitfold.passes.signals.baselines import Random, Reversed, Uniform
from splitfold.passes.signals.deviations import _Counted, local_errors, output_errors
from splitfold.passes.signals.measured import LocalError, Sensitivity
from splitfold.passes.signals.signal import Basis, Scores, Signal, measured
from splitfold.passes.signals.subject import Subject, find_subject
from splitfold.passes.signals.table import SignalKind, make_signal
from splitfold.passes.signals.weights import Farms, WeightKurtosis, kurtosis, tail_exponent
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.compare import deviation
from splitfold.runtime.errors import CalibrationError
from splitfold.runtime.feeds import Array, Feeds
from splitfold.runtime.padding import Padding
from splitfold.runtime.session import Session

CHOICES = tuple(map(Precision.parse, ("fp32", "int8-static", "int8-dynamic", "w4-b16", "w2-b16")))


def small() -> ir.Model:
    model = ir.from_proto(encoder(layers=1))
    CanonicalizePass()(model)
    return model


def batches() -> list[Feeds]:
    return token_batches(2)


@cache
def subject() -> Subject:
    model = small()
    layers = [layer for layer in find_layers(model)[0] if layer.kind is not LayerKind.EMBEDDING]
    return find_subject(model, layers, CHOICES, Context(calibration=Calibration.of(batches())), Carrying())


def test_subject_knows_what_each_layer_can_have() -> None:
    found = subject()
    assert len(found.layers) == 6
    assert all(found.choices[layer.name] == CHOICES for layer in found.layers)
    assert not found.refused
    assert not found.lacking


def test_output_errors_are_those_of_the_whole_model_with_one_layer_quantized() -> None:
    """The pieces and the rest of the model give what running all of it does."""
    found, model = output_errors(subject(), "test"), small()
    context = Context(calibration=Calibration.of(batches()))
    reference = [Session(model).run(feeds)["y"] for feeds in batches()]
    for layer in subject().layers:
        for precision in CHOICES:
            changed = model.clone()
            carry_out(changed, {layer.name: precision}, context, Carrying(), Findings())
            actual = [Session(changed).run(feeds)["y"] for feeds in batches()]
            expected = deviation(reference, actual).relative ** 2
            assert found[layer.name][precision] == pytest.approx(expected, rel=2e-2, abs=1e-9), (
                f"{layer.name} in {precision}"
            )
            assert (expected == 0) == precision.is_float


def test_local_errors_are_those_of_the_layer_alone() -> None:
    found, model = local_errors(subject(), "test"), small()
    layer = next(layer for layer in find_layers(model)[0] if layer.name.endswith("intermediate.dense"))
    value, inputs = layer.output.name or "", layer.input.name or ""
    x = [Session(model).run(feeds, [inputs, value]) for feeds in batches()]
    weight = layer.weight_array()
    bias = model.graph.initializers["encoder.layer.0.intermediate.dense.bias"].const_value
    assert bias is not None
    reference = [run[value] + bias.numpy() for run in x]
    low = min(0.0, *(float(run[inputs].min()) for run in x))
    high = max(0.0, *(float(run[inputs].max()) for run in x))
    step = np.float32((high - low) / 255)
    zero = np.rint(-low / step)
    codes = [np.clip(np.rint(run[inputs] / step) + zero, 0, 255) for run in x]
    scale = np.abs(weight).max(0) / 127
    rounded = np.rint(weight / scale) * scale
    actual = [((code - zero) * step) @ rounded + bias.numpy() for code in codes]
    expected = deviation(reference, actual).relative ** 2
    own = found[layer.name]
    assert own[Precision.int8_static()] == pytest.approx(expected, rel=0.05)
    assert own[Precision.float()] == 0
    assert own[Precision.parse("w2-b16")] > own[Precision.parse("w4-b16")] > own[Precision.int8_static()]


def test_padding_does_not_count() -> None:
    """A position that the mask leaves out may be as wrong as it likes."""
    feeds = {"attention_mask": np.array([[1, 1, 0], [1, 0, 0]])}
    reference = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    actual = reference + 100 * (1 - feeds["attention_mask"])[..., None].astype(np.float32)
    counted = _Counted(Padding("attention_mask"), [feeds])
    assert counted.relative([[reference]], [[actual]]) == 0
    assert _Counted(Padding(), [feeds]).relative([[reference]], [[actual]]) > 1


def test_signals_of_losses_give_a_loss_for_each_choice() -> None:
    for signal in (Sensitivity(), LocalError()):
        found = measured(signal, subject())
        assert found.basis is Basis.LOSS
        assert found.seconds > 0
        assert expected_losses(found, subject(), ErrorModel.BITS) is found.by_choice
        assert all(set(own) == set(CHOICES) for own in found.by_choice.values())


def test_kurtosis_by_its_formula() -> None:
    values = np.array([1.0, 2.0, 3.0, 10.0], np.float32)
    mean = 4.0
    second = ((1 - mean) ** 2 + (2 - mean) ** 2 + (3 - mean) ** 2 + (10 - mean) ** 2) / 4
    fourth = ((1 - mean) ** 4 + (2 - mean) ** 4 + (3 - mean) ** 4 + (10 - mean) ** 4) / 4
    assert kurtosis(values) == pytest.approx(fourth / second**2, rel=1e-12)
    assert kurtosis(np.random.default_rng(0).standard_normal(200_000)) == pytest.approx(3, abs=0.05)
    assert kurtosis(np.full(5, 2.0)) == 1


def test_weight_kurtosis_of_each_layer() -> None:
    found = WeightKurtosis().scores(subject())
    layer = subject().layers[2]
    x = layer.weight_array().astype(np.float64).ravel()
    x = x - x.mean()
    assert found.by_layer[layer.name] == pytest.approx((x**4).mean() / (x**2).mean() ** 2, rel=1e-9)


def test_activation_statistics_over_all_batches_at_once() -> None:
    """Streamed batch by batch, they are those of all elements together."""
    kurtoses, norms = ActivationKurtosis().scores(subject()), InfinityNorm().scores(subject())
    for layer in subject().layers:
        name = layer.input.name or ""
        runs = [Session(subject().model).run(feeds, [name])[name] for feeds in batches()]
        x = np.concatenate([run.ravel() for run in runs]).astype(np.float64)
        centred = x - x.mean()
        assert norms.by_layer[layer.name] == pytest.approx(np.abs(x).max(), rel=1e-5)
        assert kurtoses.by_layer[layer.name] == pytest.approx(
            (centred**4).mean() / (centred**2).mean() ** 2, rel=1e-4
        )


def reference_tail(matrix: Array, size: int, steps: int) -> float:
    """FARMS again, in plain loops: eigenvalues of W^T W of the windows, then the best power law."""
    eigenvalues: list[float] = []
    rows = [round_down(i * (matrix.shape[0] - size) / (steps - 1)) for i in range(steps)]
    columns = [round_down(i * (matrix.shape[1] - size) / (steps - 1)) for i in range(steps)]
    for row in sorted(set(rows)):
        for column in sorted(set(columns)):
            window = matrix[row : row + size, column : column + size].astype(np.float64)
            eigenvalues += np.linalg.eigvalsh(window.T @ window).clip(0).tolist()
    x = sorted(value for value in eigenvalues if value > 0)
    logs = [math.log10(value) for value in x]
    width = (logs[-1] - logs[0]) / 100
    counts = [0] * 100
    for value in logs:
        counts[min(int((value - logs[0]) / width), 99)] += 1
    peak = 10 ** (logs[0] + counts.index(max(counts)) * width)
    best = (math.inf, math.inf)
    for start, least in enumerate(x):
        tail = x[start:]
        if not 0.95 * peak <= least <= 1.5 * peak or len(tail) < 10:
            continue
        alpha = 1 + len(tail) / (sum(math.log(value) for value in tail) - len(tail) * math.log(least))
        distance = max(
            abs(1 - (value / least) ** (1 - alpha) - index / len(tail)) for index, value in enumerate(tail)
        )
        best = min(best, (distance, alpha))
    return best[1]


def round_down(value: float) -> int:
    return int(value + 1e-9)


@pytest.mark.parametrize("shape", [(40, 60), (33, 90)])
def test_farms_against_a_second_implementation(shape: tuple[int, int]) -> None:
    random = np.random.default_rng(3)
    matrix = (random.standard_normal(shape) * random.lognormal(0, 1, shape[1])).astype(np.float32)
    found = tail_exponent(Farms(window=24, steps=3)._eigenvalues(matrix.astype(np.float64)))
    assert found == pytest.approx(reference_tail(matrix, 24, 3), rel=1e-3)


def test_tail_exponent_of_a_known_power_law() -> None:
    random = np.random.default_rng(0)
    for alpha in (2.0, 3.5):
        drawn = (1 - random.random(3_000)) ** (-1 / (alpha - 1))
        assert tail_exponent(drawn) == pytest.approx(alpha, rel=0.1)
    assert tail_exponent(np.ones(50)) == math.inf
    assert tail_exponent(np.arange(5.0)) == math.inf


def test_farms_gives_the_heavier_tail_the_higher_score() -> None:
    found = Farms(window=16).scores(subject())
    exponents = {layer.name: Farms(window=16).exponent(layer) for layer in subject().layers}
    assert sorted(found.by_layer, key=lambda name: found.by_layer[name]) == sorted(
        exponents, key=lambda name: -exponents[name]
    )


def test_shifts_are_even_by_rank_and_ties_share() -> None:
    assert shifts({"a": 5.0, "b": -1.0, "c": 7.0}) == {"a": 0.0, "b": -2.0, "c": 2.0}
    assert shifts({"a": 1.0, "b": 1.0}) == {"a": 0.0, "b": 0.0}
    assert shifts({"a": 1.0}) == {"a": 0.0}
    assert shifts({"a": -math.inf, "b": 0.0}) == {"a": -2.0, "b": 2.0}


def test_an_order_becomes_losses() -> None:
    layer = subject().layers[0]
    ranked = {item.name: float(at) for at, item in enumerate(subject().layers)}
    losses = expected_losses(Scores("order", Basis.ORDER, ranked), subject(), ErrorModel.BITS)[layer.name]
    count = layer.weight_array().size
    assert losses[Precision.parse("w4-b16")] == pytest.approx(count * 4.0**-2 * 4.0**-4)
    assert losses[Precision.int8_static()] == pytest.approx(count * 4.0**-2 * 2 * 4.0**-8)
    assert losses[Precision.float()] == 0


def test_an_importance_is_multiplied_with_the_measured_error() -> None:
    found = Scores("importance", Basis.IMPORTANCE, {layer.name: 3.0 for layer in subject().layers})
    losses, errors = expected_losses(found, subject(), ErrorModel.MEASURED), local_errors(subject(), "test")
    for layer in subject().layers:
        assert losses[layer.name] == {
            item: pytest.approx(3 * error) for item, error in errors[layer.name].items()
        }


def test_reversed_puts_the_ranks_upside_down() -> None:
    plain, turned = WeightKurtosis().scores(subject()), Reversed(WeightKurtosis()).scores(subject())
    up = sorted(plain.by_layer, key=lambda name: plain.by_layer[name])
    assert [turned.by_layer[name] for name in up] == [plain.by_layer[name] for name in reversed(up)]
    losses = Reversed(LocalError()).scores(subject())
    assert losses.by_choice[up[0]][Precision.float()] == 0
    assert set(losses.by_choice) == set(plain.by_layer)


def test_random_is_the_same_for_the_same_seed() -> None:
    assert Random(1).scores(subject()) == Random(1).scores(subject())
    assert Random(1).scores(subject()).by_layer != Random(2).scores(subject()).by_layer
    assert set(Uniform().scores(subject()).by_layer.values()) == {1.0}


@pytest.mark.parametrize("kind", SignalKind)
def test_every_signal_of_the_table_scores_every_layer(kind: SignalKind) -> None:
    found = measured(make_signal(kind), subject())
    assert set(found.by_layer) == {layer.name for layer in subject().layers}
    assert kind.value in make_signal(kind).name
    assert make_signal(kind, turned=True).name == f"reversed {make_signal(kind).name}"


@pytest.mark.parametrize("kind", [SignalKind.SENSITIVITY, SignalKind.LOCAL_ERROR, SignalKind.INFINITY_NORM])
def test_signals_that_need_data_say_so(kind: SignalKind) -> None:
    model = small()
    layers = [layer for layer in find_layers(model)[0] if layer.kind is not LayerKind.EMBEDDING]
    bare = find_subject(model, layers, CHOICES[3:], Context(), Carrying())
    with pytest.raises(CalibrationError, match=kind.value):
        measured(make_signal(kind), bare)


@dataclass(frozen=True)
class Broken(Signal):
    """A user's signal that leaves a layer out, or gives NaN."""

    value: float | None

    @property
    def name(self) -> str:
        return "broken"

    def scores(self, subject: Subject) -> Scores:
        names = [layer.name for layer in subject.layers]
        if self.value is None:
            return Scores(self.name, Basis.ORDER, dict.fromkeys(names[1:], 1.0))
        return Scores(self.name, Basis.ORDER, dict.fromkeys(names, self.value))


@pytest.mark.parametrize(("value", "words"), [(None, "no score for layer"), (math.nan, "gave NaN")])
def test_a_broken_signal_is_refused(value: float | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        measured(Broken(value), subject())
