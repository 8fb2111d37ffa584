# SPDX-License-Identifier: Apache-2.0
"""`capture_decoder`: a causal language model as an ONNX graph whose cache comes in and goes out."""

from __future__ import annotations

import enum
import re

import onnx_ir as ir

from splitfold.compiler.errors import CaptureError
from splitfold.runtime.cache import POSITIONS_KEY, CacheLayout

__all__ = ["Logits", "capture_decoder"]

_BATCH, _SEQUENCE, _PAST, _TOTAL = "batch", "sequence", "past", "past + sequence"
_SYMBOL = re.compile(r"[A-Za-z_]\w*")


class Logits(enum.Enum):
    """Which positions of a call the head computes."""

    LAST = "last"
    """The last one: what generation needs, and in a prefill much less work."""
    ALL = "all"
    """All of them: for perplexity."""


def capture_decoder(module: object, *, logits: Logits = Logits.LAST) -> ir.Model:
    """Return a causal language model of transformers as an ONNX graph with a cache, which `compile` takes.

    One graph serves prefill (an empty past) and decoding (one token). It is compared with torch at both.

    Its inputs are ``input_ids`` int64 [batch, sequence], ``attention_mask`` int64 [batch, past + sequence]
    (0 is padding, which stands on the left; positions are counted without it), and for each layer
    ``past.N.key`` and ``past.N.value`` float32 [batch, heads of keys, past, size]. Its outputs are ``logits``
    float32 [batch, sequence, vocabulary], or [batch, 1, vocabulary] for `Logits.LAST`, and ``present.N.key``
    and ``present.N.value`` [batch, heads of keys, past + sequence, size], the next call's past.

    Args:
        module: such as a `LlamaForCausalLM`, in eval mode and float32; it is not changed.
        logits: which positions the head computes.

    Raises:
        CaptureError: torch is missing, `module` is no causal language model whose layers all keep keys and
            values, torch.export cannot trace it, or the graph does not compute what torch does.
    """
    try:
        from splitfold.compiler.traced.decoder import trace_decoder
    except ImportError as error:
        raise CaptureError(
            "capturing a decoder needs torch and transformers: pip install 'splitfold[torch]' transformers"
        ) from error
    traced = trace_decoder(module, last=logits is Logits.LAST)
    _name_axes(traced.model, CacheLayout.standard(traced.layers))
    if traced.positions:
        traced.model.metadata_props[POSITIONS_KEY] = str(traced.positions)
    return traced.model


def _name_axes(model: ir.Model, layout: CacheLayout) -> None:
    """Replace the exporter's names of dynamic axes by ours, in all values of the model."""
    inputs = {value.name: value for value in model.graph.inputs}
    names: dict[str, str] = {}
    for name, axes in (
        ("input_ids", {0: _BATCH, 1: _SEQUENCE}),
        *((name, {0: _BATCH, 2: _PAST}) for name in layout.past),
    ):
        value = inputs[name]
        for axis, text in axes.items():
            dim = value.shape[axis] if value.shape is not None else None
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                names[dim.value] = text
    for value in _values(model):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(dim, names) for dim in value.shape])
    inputs["attention_mask"].shape = ir.Shape([_BATCH, _TOTAL])
    outputs = {value.name: value for value in model.graph.outputs}
    for past, present in zip(layout.past, layout.present, strict=True):
        shape = inputs[past].shape
        if shape is not None:
            outputs[present].shape = ir.Shape([_BATCH, shape[1], _TOTAL, shape[3]])


def _renamed(dim: int | ir.SymbolicDim, names: dict[str, str]) -> int | str | None:
    if isinstance(dim, int) or dim.value is None:
        return dim if isinstance(dim, int) else None
    return _SYMBOL.sub(lambda match: names.get(match[0], match[0]), dim.value)


def _values(model: ir.Model) -> list[ir.Value]:
    found = list(model.graph.inputs)
    for node in model.graph.all_nodes():
        found += node.outputs
    return found
