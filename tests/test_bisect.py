# SPDX-License-Identifier: Apache-2.0
"""Bisection: which pass breaks a metric, for which layers, and the pipeline that works."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from encoder import encoder, token_batches
from onnx import numpy_helper
from sabotage_base import is_dense, set_tensor, weight_of

from splitfold.compiler import compile
from splitfold.compiler.debug.bisect import culprits
from splitfold.compiler.debug.bisect.bisection import Bisection, bisect
from splitfold.compiler.debug.bisect.judge import Evaluation
from splitfold.compiler.errors import BisectionError
from splitfold.compiler.tolerance import Tolerance
from splitfold.passes.base import Context, Contract, Findings, LayerPass, Pass, Require
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.errors import PassFailedError, SpecError
from splitfold.passes.identity import display_layer
from splitfold.passes.pipeline import Pipeline
from splitfold.passes.table import PASSES
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.errors import CalibrationError, SessionError
from splitfold.runtime.feeds import Array, Feeds
from splitfold.runtime.session import Session

STRICT = Tolerance(cosine=None, sqnr_db=80)
DENSE = [
    f"encoder.layer.{index}.{name}"
    for index in range(3)
    for name in (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )
]


@dataclass(frozen=True)
class ScalePass(LayerPass):
    """Says that it changes every dense layer, and scales those named.

    Args:
        layers: what is scaled, by 1.05.
        grouped: record query, key and value under one joint name.
    """

    name: ClassVar[str] = "scale"
    contract: ClassVar[Contract] = Contract.LOSSY
    layers: tuple[str, ...] = ()
    grouped: bool = False

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""
        nodes = {display_layer(node): node for node in model.graph if is_dense(node)}
        self.check_patterns(nodes)
        taken = [layer for layer in nodes if self.unwanted(layer) is None]
        for layer in taken:
            if layer in self.layers:
                set_tensor(nodes[layer].inputs[1], weight_of(nodes[layer]) * np.float32(1.05))
        for group in _groups(taken) if self.grouped else taken:
            findings.apply(group, "scaled")
        for layer in nodes:
            if layer not in taken:
                findings.skip(layer, "excluded by option")
        return bool(set(taken) & set(self.layers))


def _groups(layers: list[str]) -> Iterator[str]:
    while layers:
        path = layers[0].rpartition(".")[0]
        group = [layer for layer in layers if layer.rpartition(".")[0] == path]
        yield "+".join(group)
        layers = [layer for layer in layers if layer not in group]


@dataclass(frozen=True)
class BluntPass(Pass):
    """Scales one layer, and cannot be told to leave it."""

    name: ClassVar[str] = "blunt"
    contract: ClassVar[Contract] = Contract.LOSSY
    layer: str = ""

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""
        return ScalePass(layers=(self.layer,)).rewrite(model, context, findings)


@dataclass(frozen=True)
class StumblingPass(LayerPass):
    """Raises at one layer."""

    name: ClassVar[str] = "stumbling"
    contract: ClassVar[Contract] = Contract.LOSSY
    layer: str = ""

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""
        if self.unwanted(self.layer) is None:
            raise KeyError(42)
        return False


TEST_PASSES = (*PASSES, ScalePass, BluntPass, StumblingPass)


def _bisect(*steps: Pass, seed: int = 0, limit: int = 200) -> Bisection:
    return bisect(
        encoder(seed=seed), Pipeline.of(*steps), data=token_batches(), tolerance=STRICT, limit=limit
    )


def _layers(found: Bisection) -> list[set[str]]:
    return [{item.layer for item in culprit.layers} for culprit in found.culprits]


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_finds_the_culprit_layers(seed: int, guided: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not guided:
        monkeypatch.setattr(culprits, "suspects", lambda *_: ())
    random = np.random.default_rng(seed)
    planted = tuple(random.choice(DENSE, 1 + seed % 3, replace=False).tolist())
    scale = ScalePass(layers=planted)
    found = _bisect(CanonicalizePass(), ScalePass(), scale, ScalePass(exclude=("*key",)), seed=seed)
    assert [culprit.step for culprit in found.culprits] == [str(scale)]
    assert _layers(found) == [set(planted)]
    assert found.culprits[0].minimal
    assert not found.exhausted
    most = 4 + 4 * len(planted) if guided else 6 + 4 * len(planted) * math.log2(len(DENSE))
    assert found.evaluations <= most
    assert found.verdict is not None
    assert found.verdict.ok
    text = str(found.pipeline)
    assert Pipeline.parse(text, TEST_PASSES) == found.pipeline
    compile(
        encoder(seed=seed), token_batches()[0], pipeline=Pipeline.parse(text, TEST_PASSES), tolerance=STRICT
    )


def test_says_what_each_layer_does() -> None:
    planted = ("encoder.layer.0.output.dense", "encoder.layer.2.attention.self.value")
    culprit = _bisect(ScalePass(layers=planted)).culprits[0]
    for item in culprit.layers:
        assert item.taken is not None
        assert not item.taken.ok
    single = _bisect(ScalePass(layers=planted[:1])).culprits[0].layers[0]
    assert single.alone is not None
    assert single.alone.ok
    assert single.taken is not None
    assert not single.taken.ok


def test_passes_after_the_first_culprit_are_searched_too() -> None:
    first = ScalePass(layers=(DENSE[4],), exclude=(DENSE[0],))
    found = _bisect(first, ScalePass(layers=(DENSE[7], DENSE[8])), ScalePass())
    assert _layers(found) == [{DENSE[4]}, {DENSE[7], DENSE[8]}]
    assert found.pipeline is not None
    steps = [step for step in found.pipeline if isinstance(step, ScalePass)]
    assert steps[0].exclude == (DENSE[0], DENSE[4])
    assert set(steps[1].exclude) == {DENSE[7], DENSE[8]}
    assert steps[2].exclude == ()
    assert [bool(verdict and verdict.ok) for _, verdict in found.stages][-1] is False


def test_layers_recorded_as_a_group_are_excluded_together() -> None:
    found = _bisect(ScalePass(layers=(DENSE[1],), grouped=True))
    assert _layers(found) == [{"+".join(DENSE[:3])}]
    assert found.pipeline is not None
    assert found.pipeline.steps[0] == ScalePass(layers=(DENSE[1],), grouped=True, exclude=tuple(DENSE[:3]))


def test_a_layer_cannot_be_excluded_where_all_are_required() -> None:
    found = _bisect(ScalePass(layers=(DENSE[1],), require=Require.ALL))
    assert found.pipeline == Pipeline.of(ScalePass(layers=(DENSE[1],), exclude=(DENSE[1],)))
    with pytest.raises(PassFailedError, match="1 candidates were skipped"):
        _bisect(ScalePass(exclude=(DENSE[1],), require=Require.ALL))


def test_a_pass_that_knows_no_layers_is_left_out() -> None:
    blunt = BluntPass(layer=DENSE[9])
    found = _bisect(CanonicalizePass(), blunt, ScalePass())
    culprit = found.culprits[0]
    assert culprit.step == str(blunt)
    assert not culprit.layers
    assert culprit.reason == "it does not work layer by layer"
    assert set(culprit.applied) == set(DENSE)
    assert culprit.suspects[0] == DENSE[9]
    assert found.pipeline == Pipeline.of(CanonicalizePass(), ScalePass())
    assert found.left_out == (str(blunt),)


def test_a_pass_that_raises_is_the_culprit() -> None:
    found = _bisect(ScalePass(), StumblingPass(layer=DENSE[11]), ScalePass(layers=(DENSE[2],)))
    assert [culprit.step.partition("{")[0] for culprit in found.culprits] == ["stumbling", "scale"]
    assert found.culprits[0].error == "KeyError: 42"
    assert found.culprits[0].after is None
    assert _layers(found) == [{DENSE[11]}, {DENSE[2]}]
    assert found.verdict is not None
    assert found.verdict.ok


def _outlier(layer: str) -> onnx.ModelProto:
    """Return an encoder in which one input channel of `layer`, an ``output.dense``, is a hundred times the
    others: no grid of 8 bits for the whole tensor holds it."""
    model = encoder(seed=1)
    for weight in model.graph.initializer:
        if weight.name == layer.replace("output.dense", "intermediate.dense.bias"):
            weight.CopyFrom(_changed(weight, 300.0, add=True))
        if weight.name == f"{layer}.weight":
            weight.CopyFrom(_changed(weight, 1e-3, add=False))
    return model


def _changed(weight: onnx.TensorProto, number: float, *, add: bool) -> onnx.TensorProto:
    array = np.array(numpy_helper.to_array(weight))
    array[5] = array[5] + number if add else array[5] * number
    return numpy_helper.from_array(array, weight.name)


class Similarity:
    """A metric that counts how often it is asked: cosine of the outputs with those of the original."""

    def __init__(self, model: onnx.ModelProto, batches: list[Feeds]) -> None:
        self._batches = batches
        self._expected = self._outputs(Session(ir.from_proto(model)))
        self.calls = 0

    def _outputs(self, session: Session) -> Array:
        return np.concatenate([session.run(feeds)["y"].ravel() for feeds in self._batches])

    def __call__(self, session: Session) -> float:
        self.calls += 1
        found, expected = self._outputs(session), self._expected
        return float(found @ expected / np.linalg.norm(found) / np.linalg.norm(expected))


def test_an_outlier_comes_back_in_the_next_pass() -> None:
    layer = "encoder.layer.1.output.dense"
    model, batches = _outlier(layer), token_batches(4)
    metric, told = Similarity(model, batches), list[Evaluation]()
    found = bisect(
        model,
        "quantize-activations,quantize-dynamic",
        evaluate=metric,
        drop=0.01,
        calibration=batches,
        tell=told.append,
    )
    assert (
        str(found.pipeline)
        == f"quantize-activations{{exclude=[{layer}]}},quantize-dynamic{{exclude=[{layer}]}}"
    )
    assert found.verdict is not None
    assert found.verdict.value >= found.reference.value - 0.01
    assert metric.calls == found.evaluations
    assert found.evaluations <= 6
    assert [item.number for item in told if not item.cached] == list(range(1, found.evaluations + 1))
    assert sum(item.cached for item in told) == found.cached > 0


def test_the_limit_is_kept_and_the_best_known_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(culprits, "suspects", lambda *_: ())
    planted = (DENSE[3], DENSE[10], DENSE[17])
    whole = _bisect(ScalePass(layers=planted))
    for limit in range(3, whole.evaluations, 4):
        found = _bisect(ScalePass(), ScalePass(layers=planted), limit=limit)
        assert found.evaluations <= limit
        assert found.exhausted
        assert found.verdict is not None
        assert found.verdict.ok
        assert found.pipeline is not None
        if found.culprits and found.culprits[0].layers:
            assert set(planted) < {item.layer for item in found.culprits[0].layers}
            assert not found.culprits[0].minimal
            assert len(found.pipeline) == 2
        else:
            assert str(ScalePass(layers=planted)) in found.left_out


def test_nothing_to_bisect() -> None:
    with pytest.raises(BisectionError, match="nothing to bisect: the whole pipeline meets the limit"):
        _bisect(ScalePass())


def _raising(session: Session) -> float:
    raise ZeroDivisionError("no labels")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "neither evaluate nor data was given"),
        ({"evaluate": _raising, "data": token_batches()}, "both evaluate and data were given"),
        ({"evaluate": _raising, "tolerance": STRICT}, "a tolerance is on outputs and needs data"),
        ({"evaluate": _raising}, "evaluate raised ZeroDivisionError for the original model: no labels"),
        ({"evaluate": lambda session: math.nan}, "evaluate returned nan for the original model"),
        ({"evaluate": lambda session: -math.inf}, "evaluate returned -inf for the original model"),
        ({"evaluate": lambda session: "good"}, "evaluate returned a str for the original model"),
        ({"evaluate": lambda session: session.run({"x": np.ones(1)})}, "the original model does not run"),
        ({"evaluate": lambda session: 1.0, "drop": -1.0}, "drop is -1.0"),
        ({"evaluate": lambda session: 1.0, "drop": math.nan}, "drop is nan"),
        ({"evaluate": lambda session: 1.0, "limit": 2}, "limit is 2: at least 3"),
        ({"data": token_batches(), "tolerance": Tolerance(cosine=1.5)}, "does not meet the tolerance itself"),
    ],
)
def test_what_cannot_be_bisected(options: dict[str, object], message: str) -> None:
    with pytest.raises(BisectionError, match=message):
        bisect(encoder(), "canonicalize,quantize-dynamic", **options)  # type: ignore[arg-type]


def test_a_metric_that_raises_later_says_for_which_model() -> None:
    def metric(session: Session) -> float:
        if calls:
            raise ZeroDivisionError("no labels")
        calls.append(1)
        return 1.0

    calls: list[int] = []
    with pytest.raises(
        BisectionError, match="raised ZeroDivisionError for the model after legalize: no labels"
    ):
        bisect(encoder(), "quantize-dynamic", evaluate=metric)


def test_a_metric_that_is_nan_after_a_pass_is_broken() -> None:
    planted = DENSE[6]

    def metric(session: Session) -> float:
        outputs = session.run(token_batches()[0])["y"]
        return 1.0 if np.allclose(outputs, expected, atol=1e-4) else math.nan

    model = encoder()
    expected = Session(ir.from_proto(model)).run(token_batches()[0])["y"]
    found = bisect(model, Pipeline.of(ScalePass(layers=(planted,))), evaluate=metric)
    assert _layers(found) == [{planted}]


def test_a_model_that_the_metric_cannot_run_is_broken() -> None:
    def metric(session: Session) -> float:
        outputs = session.run(token_batches()[0])["y"]
        if not np.allclose(outputs, expected, atol=1e-4):
            raise SessionError("cannot run")
        return 1.0

    model = encoder()
    expected = Session(ir.from_proto(model)).run(token_batches()[0])["y"]
    found = bisect(model, Pipeline.of(ScalePass(layers=(DENSE[6],))), evaluate=metric)
    assert _layers(found) == [{DENSE[6]}]


def test_bad_input_of_the_passes_is_an_error_and_no_culprit() -> None:
    with pytest.raises(SpecError, match=r"no layer matches 'encoder.layer.9'"):
        _bisect(*Pipeline.parse("quantize-dynamic{exclude=[encoder.layer.9]}"))
    with pytest.raises(CalibrationError, match="quantize-activations"):
        _bisect(*Pipeline.parse("quantize-activations"))
    with pytest.raises(CalibrationError, match="ids"):
        bisect(encoder(), "quantize-dynamic", data=[{"words": np.ones((1, 2))}])
    with pytest.raises(CalibrationError, match="empty"):
        bisect(encoder(), "quantize-dynamic", data=Calibration(lambda: iter([])))
