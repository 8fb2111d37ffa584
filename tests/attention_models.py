# SPDX-License-Identifier: Apache-2.0
"""Exports of small transformers by both exporters of torch, and what their attention really computes."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import warnings

import numpy as np
import onnx
import onnx_ir as ir
import torch
from zoo import ARCHITECTURES, Architecture

from splitfold.compiler.capture import capture_torch
from splitfold.passes.attention_block import Attention
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.runtime.feeds import Array, Feeds
from splitfold.runtime.session import Optimization, Session

__all__ = ["captured", "check_block", "draw", "scripted", "taps_of"]

_BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}


def captured(name: str) -> ir.Model:
    """Return an architecture exported with torch.export, canonical."""
    architecture = _BY_NAME[name]
    module, inputs = architecture.build()
    model = capture_torch(module, dict(inputs), architecture.dynamic_shapes).model
    CanonicalizePass()(model)
    return model


@functools.cache
def _scripted(name: str) -> onnx.ModelProto:
    architecture = _BY_NAME[name]
    module, inputs = architecture.build()
    target = io.BytesIO()
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module,
                (),
                target,
                kwargs=dict(inputs),
                input_names=list(inputs),
                output_names=["out"],
                dynamic_axes=_dynamic_axes(architecture, list(inputs)),
                opset_version=17,
                dynamo=False,
            )
    finally:
        logging.disable(disabled)
    return onnx.load_from_string(target.getvalue())


def _dynamic_axes(architecture: Architecture, names: list[str]) -> dict[str, dict[int, str]]:
    shapes = architecture.dynamic_shapes or {}
    return {name: {axis: f"{name}_{axis}" for axis in shapes.get(name) or {}} for name in names}


def scripted(name: str) -> ir.Model:
    """Return an architecture exported by the older exporter, which traces with TorchScript; canonical."""
    model = ir.from_proto(_scripted(name))
    CanonicalizePass()(model)
    return model


def draw(name: str, model: ir.Model, seed: int = 3) -> Feeds:
    """Return seeded inputs of an architecture, those that `model` has."""
    known = {value.name for value in model.graph.inputs}
    return {key: value.numpy() for key, value in _BY_NAME[name].draw(seed).items() if key in known}


def taps_of(model: ir.Model, feeds: Feeds, blocks: tuple[Attention, ...]) -> dict[str, Array]:
    """Run a model and return what every value of its blocks holds."""
    names = [value.name or "" for block in blocks for value in _values(block)]
    session = Session(model, threads=1, optimization=Optimization.OFF, taps=list(dict.fromkeys(names)))
    held = dict(session.run(feeds, taps=list(dict.fromkeys(names))))
    return held | dict(feeds)


def _values(block: Attention) -> list[ir.Value]:
    found = [block.context, block.query.value, block.key.value, block.value.value]
    if block.probabilities is not None and block.scores is not None:
        found += [block.scores, block.probabilities.softmax, block.probabilities.read]
    if block.merged is not None:
        found.append(block.merged)
    return [value for value in found if value.producer() is not None]


def check_block(block: Attention, held: dict[str, Array]) -> None:
    """Hold what is said of a decomposed block to the numbers that the runtime gave."""
    layout, found = block.layout, block.probabilities
    assert found is not None
    assert block.scores is not None
    read, values = held[found.read.name or ""], held[block.value.value.name or ""]
    context = held[block.context.name or ""]
    assert context.ndim == layout.rank
    np.testing.assert_allclose(read @ values, context, rtol=1e-4, atol=1e-5)
    softmax = held[found.softmax.name or ""]
    np.testing.assert_allclose(
        np.nan_to_num(softmax, nan=1 / softmax.shape[-1]).sum(found.axis), 1, rtol=1e-4
    )
    query, key = held[block.query.value.name or ""], held[block.key.value.name or ""]
    np.testing.assert_allclose(query @ key, held[block.scores.name or ""], rtol=1e-4, atol=1e-4)
    assert layout.value_size == context.shape[layout.size]
    assert layout.key_size == query.shape[-1]
    if layout.heads:
        assert np.prod([context.shape[axis] for axis in layout.heads]) == layout.count
    if block.merged is not None and layout.count is not None:
        assert held[block.merged.name or ""].shape[-1] == layout.count * context.shape[layout.size]
    assert block.causal == _is_causal(softmax)


def _is_causal(probabilities: Array) -> bool:
    queries, keys = probabilities.shape[-2:]
    rows, columns = np.triu_indices(queries, 1, keys)
    return queries == keys > 1 and not np.nan_to_num(probabilities)[..., rows, columns].any()
