# SPDX-License-Identifier: Apache-2.0
"""The smallest part that still fails: found within limits, and in a real model."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import planted
import pytest
from encoder import encoder, token_batches
from failing import LAYER, count, failed
from real_minilm import minilm, sentences

from splitfold.compiler import Pipeline, Tolerance
from splitfold.compiler.debug.reproduce.case import Case, Signature, attempt
from splitfold.compiler.debug.reproduce.reduce import Limits, reduce
from splitfold.compiler.debug.reproduce.rerun import Outcome, reproduce
from splitfold.compiler.realisation import Unrealised
from splitfold.passes.base import Pass
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.runtime.session import Session
from splitfold.runtime.target import Target


def _case(step: Pass) -> Case:
    model = ir.from_proto(encoder(layers=2))
    Pipeline.of(CanonicalizePass()).run(model)
    return Case(model, token_batches()[0], (), Pipeline.of(step), Target.cpu(), Tolerance(), Unrealised.FLOAT)


def _signature(case: Case) -> Signature:
    error = attempt(case)
    assert error is not None
    return Signature.of(error)


def test_limits_bind_and_what_was_found_is_kept() -> None:
    case = _case(planted.ScaleWeight(layer=LAYER))
    wanted = _signature(case)
    nothing = reduce([case], wanted, [LAYER], Limits(attempts=0))
    assert (nothing.case, nothing.exhausted) == (None, True)
    first = reduce([case], wanted, [LAYER], Limits(attempts=1))
    assert first.case is not None
    assert len(first.case.model.graph) == 2  # product and bias, not reduced further
    assert first.exhausted
    late = reduce([case], wanted, [LAYER], Limits(seconds=0))
    assert (late.case, late.attempts) == (None, 0)
    large = reduce([case], wanted, [], Limits(weight_bytes=10))
    assert (large.case, large.exhausted) == (None, False)


def test_without_a_hint_the_whole_is_searched() -> None:
    case = _case(planted.ScaleWeight(layer=LAYER))
    found = reduce([case], _signature(case), [])
    assert found.case is not None
    assert len(found.case.model.graph) == 1
    assert found.attempts < 60


def test_a_part_is_fed_with_what_the_whole_computes() -> None:
    case = _case(planted.ScaleWeight(layer=LAYER))
    found = reduce([case], _signature(case), [LAYER], Limits(attempts=1)).case
    assert found is not None
    assert found.feeds is not None
    (name,) = found.feeds
    tapped = Session(case.model, taps=[name]).run(case.feeds or {}, [name])
    np.testing.assert_allclose(found.feeds[name], tapped[name], atol=1e-5)


MINILM = "encoder.layer.3.output.dense"
MINILM_LAST = "encoder.layer.5.output.LayerNorm"
PLANTED = {
    planted.ScaleWeight: "moved",
    planted.BreakShape: "stopped",
    planted.Raising: "raised",
    planted.UntypedOutput: "invalid",
    planted.OneBit: "tolerance",
    planted.BadIndex: "stopped",
    planted.Int8AroundReshape: "not-deployed",
}


@pytest.mark.parametrize("kind", PLANTED, ids=lambda kind: kind.name)
def test_planted_failures_in_minilm_reduce_to_eight_nodes(
    kind: type[planted.Planted], tmp_path: Path
) -> None:
    feeds = {name: array[:2, :12] for name, array in sentences()[0].items()}
    attention = kind is planted.Int8AroundReshape
    layer = "encoder.layer.3.attention.self" if attention else MINILM
    model, start = minilm(), time.perf_counter()
    error, folder = failed(kind(layer=layer), model=model, place=tmp_path, example_inputs=feeds)
    print(f"{kind.name}: {len(model.graph)} > {count(folder)} nodes in {time.perf_counter() - start:.1f} s")
    assert error.kind.value == PLANTED[kind]
    assert error.culprit == str(kind(layer=layer))
    assert error.layer == (MINILM_LAST if kind is planted.UntypedOutput else layer)
    assert count(folder) <= 8
    assert reproduce(folder).outcome is Outcome.SAME
