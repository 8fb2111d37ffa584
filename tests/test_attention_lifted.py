# SPDX-License-Identifier: Apache-2.0
"""Substituted attention can be trained: lifted, it computes the same, and gradients reach what is new."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="lifting needs the extra 'torch'")

import torch
from attention_graphs import attention_graph, outputs, seeded_feeds

from splitfold.passes.pipeline import Pipeline
from splitfold.runtime.lift import lift

TEXTS = [
    "clip-softmax{gamma=-0.2,zeta=1.1}",
    "gate-attention{kind=all-heads}",
    "gate-attention{kind=linear,keep=false}",
    "gate-attention{kind=mlp}",
    "replace-softmax{by=relu}",
    "replace-softmax{by=softplus}",
    "replace-softmax{by=linear}",
]


@pytest.mark.parametrize("text", TEXTS)
def test_lifted_it_is_the_same_and_has_gradients(text: str) -> None:
    model, _ = attention_graph()
    Pipeline.parse(text).run(model)
    feeds = seeded_feeds(empty_rows=True)
    (expected,) = outputs(model, feeds)
    lifted = lift(model)
    with torch.no_grad():
        (actual,) = lifted.module(*(torch.from_numpy(feeds[name]) for name in lifted.inputs))
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-3, atol=1e-4)
    parameters = dict(lifted.module.named_parameters())
    for parameter in parameters.values():
        if parameter.dtype.is_floating_point:
            parameter.requires_grad_(True)
    (result,) = lifted.module(*(torch.from_numpy(feeds[name]) for name in lifted.inputs))
    result.square().sum().backward()
    found = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    assert all(bool(torch.isfinite(grad).all()) for grad in found.values())
    if text.startswith("gate"):
        gates = [name for name in found if "gate" in name and "hidden" not in name and "factor" not in name]
        assert len(gates) == 2
        assert all(float(found[name].abs().max()) > 0 for name in gates)
