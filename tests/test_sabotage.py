# SPDX-License-Identifier: Apache-2.0
"""The sabotage suite: for every harm that a pass can do, the pass and the layer are named."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import ClassVar

import onnx_ir as ir
import pytest
from encoder import encoder, token_batches
from real_minilm import minilm, sentences
from sabotage import SABOTAGES, DropBias, DropResidual, RoughGelu, ScaleWeight, SwapInputs
from sabotage_base import Sabotage, set_tensor
from sabotage_breaks import Boast

from splitfold.compiler import compile
from splitfold.compiler.debug.bisect.bisection import bisect
from splitfold.compiler.debug.drift.measurement import drift
from splitfold.compiler.tolerance import Tolerance
from splitfold.passes.base import Context, Contract, Findings, Pass
from splitfold.passes.canonicalize import CanonicalizePass, name_all
from splitfold.passes.errors import Failure, FailureError
from splitfold.passes.identity import display_layer
from splitfold.passes.pipeline import Pipeline

SEEDS = (0, 1)
CASES = [
    pytest.param(kind(seed=index % len(SEEDS)), id=kind.name.removeprefix("sabotage-"))
    for index, kind in enumerate(SABOTAGES)
]
NUMERIC = [
    pytest.param(kind(seed=seed), id=f"{kind.name.removeprefix('sabotage-')}-{seed}")
    for kind in SABOTAGES
    for seed in SEEDS
    if kind.seen.numbers
]


@functools.cache
def _canonical(seed: int) -> ir.Model:
    model = ir.from_proto(encoder(seed=seed, layers=2))
    Pipeline.of(CanonicalizePass()).run(model)
    return model


def _harmed(step: Pass, model: ir.Model) -> ir.Model:
    after = model.clone()
    Pipeline.of(step).run(after)
    return after


def _tolerance(step: Pass) -> Tolerance:
    return Tolerance(cosine=None, sqnr_db=100 if step.contract is Contract.EXACT else 20)


def test_the_suite_is_large_and_no_step_gives_its_layer_away() -> None:
    assert len(SABOTAGES) >= 20
    assert len({kind.name for kind in SABOTAGES}) == len(SABOTAGES)
    for kind in SABOTAGES:
        for seed in SEEDS:
            step = kind(seed=seed)
            assert "encoder" not in str(step)
    planted = {kind(seed=seed).planted(_canonical(0)) for kind in SABOTAGES for seed in range(6)}
    assert len(planted) > 15


@pytest.mark.parametrize("step", [case for case in CASES if case.values[0].seen.kind])
def test_the_check_in_compile_names_pass_and_layer(step: Sabotage) -> None:
    model = _canonical(step.seed)
    with pytest.raises(FailureError) as caught:
        compile(model, token_batches()[0], pipeline=Pipeline.of(CanonicalizePass(), step), reproducers=None)
    assert caught.value.kind is Failure[step.seen.kind or ""]
    assert caught.value.culprit == str(step)
    if not isinstance(step, Boast):  # it harms no layer
        assert caught.value.layer == step.planted(model)
        assert step.planted(model) in str(caught.value)


@pytest.mark.parametrize("step", [case for case in CASES if not isinstance(case.values[0], Boast)])
def test_bisect_names_pass_and_layer(step: Sabotage) -> None:
    model = _canonical(step.seed)
    found = bisect(
        model,
        Pipeline.of(CanonicalizePass(), step),
        data=token_batches(),
        tolerance=_tolerance(step),
    )
    assert [culprit.step for culprit in found.culprits] == [str(step)]
    assert [item.layer for item in found.culprits[0].layers] == [step.planted(model)]
    assert found.culprits[0].minimal
    assert found.verdict is not None
    assert found.verdict.ok
    assert found.evaluations <= 4


@pytest.mark.parametrize("step", NUMERIC)
def test_drift_ranks_the_planted_layer_first(step: Sabotage) -> None:
    model = _canonical(step.seed)
    ranked = drift(model, _harmed(step, model), token_batches()).ranked()
    assert ranked[0].layer == step.planted(model)


@dataclass(frozen=True)
class Blunt(Pass):
    """A sabotage that cannot be told to leave a layer alone, and records nothing."""

    name: ClassVar[str] = "blunt"
    contract: ClassVar[Contract] = Contract.LOSSY
    inner: Sabotage = field(default_factory=ScaleWeight)

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""
        return self.inner.rewrite(model, context, Findings())


@pytest.mark.parametrize("kind", [ScaleWeight, DropBias, SwapInputs, DropResidual, RoughGelu])
def test_bisect_suspects_the_layer_of_a_pass_that_says_nothing(kind: type[Sabotage]) -> None:
    model, step = _canonical(2), kind(seed=2)
    found = bisect(
        model,
        Pipeline.of(CanonicalizePass(), Blunt(inner=step)),
        data=token_batches(),
        tolerance=Tolerance(cosine=None, sqnr_db=100),
    )
    assert found.culprits[0].suspects[0] == step.planted(model)
    assert found.pipeline == Pipeline.of(CanonicalizePass())


CULPRIT = "encoder.layer.3.output.dense"


@functools.cache
def _outlier() -> ir.Model:
    """Return MiniLM with an outlier channel in layer 3: no 8-bit grid for the whole tensor holds what
    output.dense reads there."""
    model = minilm().clone()
    named = model.clone()
    name_all(named, Findings())
    channel = 1306
    for node in named.graph:
        if display_layer(node) == CULPRIT and node.op_type == "MatMul":
            _change(model, node, channel, factor=1e-3)
        if display_layer(node) == CULPRIT.replace("output", "intermediate") and node.op_type == "Add":
            _change(model, node, channel, offset=300.0)
    return model


def _change(model: ir.Model, node: ir.Node, row: int, *, factor: float = 1.0, offset: float = 0.0) -> None:
    name = next(value.name for value in node.inputs if value is not None and value.is_initializer())
    value = model.graph.initializers[name or ""]
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    array[row] = array[row] * factor + offset
    set_tensor(value, array)


@pytest.mark.slow
def test_an_outlier_in_minilm_is_found_by_bisect() -> None:
    found = bisect(
        _outlier(),
        "canonicalize,quantize-activations",
        calibration=sentences(),
        data=sentences(),
        tolerance=Tolerance(cosine=0.93),
    )
    assert str(found.pipeline) == f"canonicalize,quantize-activations{{exclude=[{CULPRIT}]}}"
    assert len(found.culprits[0].applied) == 36
    assert found.evaluations <= 5


@pytest.mark.slow
def test_an_outlier_in_minilm_is_ranked_first_by_drift() -> None:
    made = compile(
        _outlier(),
        pipeline="canonicalize,quantize-activations",
        calibration=sentences(),
        tolerance=Tolerance(cosine=None),
    )
    assert drift(_outlier(), made, sentences()[:1]).ranked()[0].layer == CULPRIT


@pytest.mark.slow
def test_a_weight_of_minilm_scaled_by_a_hundredth_is_named() -> None:
    model = minilm().clone()
    Pipeline.of(CanonicalizePass()).run(model)
    step = ScaleWeight(seed=5)
    with pytest.raises(FailureError) as caught:
        compile(model, sentences()[0], pipeline=Pipeline.of(CanonicalizePass(), step), reproducers=None)
    assert caught.value.culprit == str(step)
    assert caught.value.layer == step.planted(model)
