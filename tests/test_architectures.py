# SPDX-License-Identifier: Apache-2.0
"""Small random-weight models of many Hugging Face architectures, exported here, through the `int8` preset."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="the architectures need the extra 'torch'")
pytest.importorskip("transformers", reason="the architectures need transformers (extra 'minilm')")

from zoo import ARCHITECTURES, Architecture

from splitfold.compiler import Tolerance, compile, presets
from splitfold.compiler.capture import capture_torch
from splitfold.passes.identity import layers_of
from splitfold.passes.layers import find_layers
from splitfold.runtime.compare import deviation
from splitfold.runtime.session import Session

_CHOSEN = (
    "bert", "roberta", "distilbert", "albert", "electra", "deberta-v2", "mpnet", "mobilebert", "modernbert",
    "gpt2", "opt", "llama", "qwen2", "gemma", "phi", "gpt-neox", "bloom", "falcon",
    "t5-encoder", "bart-encoder", "vit", "swin", "beit", "dinov2", "segformer",
    "resnet", "convnext", "mobilenet-v2", "regnet-y", "wav2vec2", "whisper-encoder", "clip-text",
    "clip-vision",
)  # fmt: skip
_COSINES: dict[str, float] = {}
"""Output cosine by architecture, filled by the tests below and judged as a whole by the last one."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture", [a for a in ARCHITECTURES if a.name in _CHOSEN], ids=lambda a: a.name
)
def test_int8_compiles_and_explains_every_layer(architecture: Architecture) -> None:
    module, inputs = architecture.build()
    captured = capture_torch(module, dict(inputs), architecture.dynamic_shapes)
    calibration = [_feeds(architecture, seed) for seed in range(1, 9)]
    held_out = _feeds(architecture, 100)
    artifact = compile(
        captured.model,
        held_out,
        pipeline=presets.int8(),
        calibration=calibration,
        tolerance=Tolerance(cosine=None),
    )
    _check_explained(artifact.records, captured.model, artifact.model)
    reference, actual = Session(captured.model).run(held_out), artifact.session().run(held_out)
    _COSINES[architecture.name] = deviation(reference.values(), actual.values()).cosine
    assert _COSINES[architecture.name] > 0.95


def _feeds(architecture: Architecture, seed: int) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in architecture.draw(seed).items()}


def _check_explained(records: object, before: object, after: object) -> None:
    """Every layer with weights is applied or skipped with a reason, and every node still knows its layers."""
    told = {
        layer
        for record in records  # type: ignore[attr-defined]
        for layer, what in (*record.applied, *record.skipped)
        if what and record.text.startswith("quantize")
    }
    layers, refused = find_layers(after)  # type: ignore[arg-type]
    assert {layer.name for layer in layers} | {name for name, _ in refused} <= told
    assert all(layers_of(node) for graph in after.graphs() for node in graph)  # type: ignore[attr-defined]


@pytest.mark.slow
def test_nine_in_ten_reach_a_cosine_of_0_99() -> None:
    if len(_COSINES) < 25:
        pytest.skip("judged only where at least 25 architectures ran in this process")
    good = sum(cosine >= 0.99 for cosine in _COSINES.values())
    assert good >= 0.9 * len(_COSINES), sorted(_COSINES.items(), key=lambda item: item[1])[:5]
