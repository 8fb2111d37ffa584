# SPDX-License-Identifier: Apache-2.0
"""A causal language model of Hugging Face as a module whose cache is made of plain tensors."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from splitfold.compiler.capture import capture_torch, explain, quiet
from splitfold.compiler.errors import CaptureError
from splitfold.runtime.cache import CacheLayout, CacheShape
from splitfold.runtime.compare import deviation
from splitfold.runtime.feeds import Array
from splitfold.runtime.session import Optimization, Session

__all__ = ["Traced", "trace_decoder"]

_BATCH, _SEQUENCE, _PAST = 2, 3, 5
"""Sizes that the module is traced with; none is 0 or 1, which torch.export takes for fixed."""
_LIMIT = 1e-3
"""Relative L2 distance of the graph's logits from torch's."""

_WRAPPED = "module."
"""What names begin with in the wrapper below."""

Cache = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Traced:
    """What `trace_decoder` found.

    Attributes:
        model: the ONNX graph as exported, with the exporter's names.
        layers: how many layers keep keys and values.
        positions: how many positions the model knows; 0 where it does not say.
    """

    model: ir.Model
    layers: int
    positions: int


class CachedDecoder(nn.Module):
    """The user's module; keys and values of the past come as tensors and go as tensors.

    Args:
        module: a causal language model whose `forward` takes ``past_key_values``.
        last: only the logits of the last position are computed.
    """

    def __init__(self, module: nn.Module, *, last: bool) -> None:
        super().__init__()
        self.module = module
        self.known = inspect.signature(module.forward).parameters
        self.last = last

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past: Cache
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Return the logits, and the keys and values of the past and of these tokens.

        Args:
            input_ids: int64 [batch, sequence].
            attention_mask: int64 [batch, past + sequence]; 0 stands for padding, which comes first.
            past: keys and values [batch, heads, past, size] of each layer.
        """
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (keys, values) in enumerate(past):
            cache.update(keys, values, layer)
        named: dict[str, Any] = {
            "attention_mask": attention_mask,
            "past_key_values": cache,
            "use_cache": True,
        }
        if "position_ids" in self.known:
            positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
            named["position_ids"] = positions[:, past[0][0].shape[2] :]
        if self.last and "logits_to_keep" in self.known:
            named["logits_to_keep"] = 1
        found = self.module(input_ids=input_ids, **named)
        logits = found.logits[:, -1:] if self.last else found.logits
        return logits, _tensors(found.past_key_values)


def _tensors(cache: Any) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def trace_decoder(module: object, *, last: bool) -> Traced:
    """Return the ONNX graph of a causal language model with its cache as inputs and outputs, in the order
    of `CacheLayout`; it computes what torch does at a prefill and at a step after it.

    Raises:
        CaptureError: it is none, cannot be traced, or the graph computes something else.
    """
    checked = _checked(module)
    past = _example_past(checked)
    wrapped = CachedDecoder(checked, last=last).eval()
    ids = torch.arange(_BATCH * _SEQUENCE).reshape(_BATCH, _SEQUENCE) % 2
    mask = torch.ones(_BATCH, _PAST + _SEQUENCE, dtype=torch.int64)
    free = torch.export.Dim.AUTO
    shapes = {
        "input_ids": {0: free, 1: free},
        "attention_mask": {0: free, 1: free},
        "past": [({0: free, 2: free}, {0: free, 2: free}) for _ in past],
    }
    with _plain_attention(checked):
        model = capture_torch(wrapped, (ids, mask, past), shapes).model
    layout = CacheLayout.standard(len(past))
    _name(model, layout)
    _check(checked, model, layout, last=last)
    positions = getattr(getattr(checked, "config", None), "max_position_embeddings", None)
    return Traced(model, len(past), positions if isinstance(positions, int) else 0)


@contextlib.contextmanager
def _plain_attention(module: nn.Module) -> Iterator[None]:
    """Let the module write its attention out, which gives smaller graphs than torch's function for it: no
    guards against rows without any key, keys and values repeated once."""
    choose = getattr(module, "set_attn_implementation", None)
    before = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if choose is None or before in (None, "eager"):
        yield
        return
    with quiet():
        choose("eager")
    try:
        yield
    finally:
        with quiet():
            choose(before)


def _checked(module: object) -> nn.Module:
    """Return the module, or raise `CaptureError` where it is no causal language model that can be traced."""
    if not isinstance(module, nn.Module):
        raise CaptureError(f"cannot capture a {type(module).__name__}: pass a torch module.")
    name, known = type(module).__name__, inspect.signature(module.forward).parameters
    if missing := [word for word in ("input_ids", "attention_mask", "past_key_values") if word not in known]:
        raise CaptureError(
            f"{name}.forward takes no {missing[0]}: a decoder is a causal language model of transformers "
            "(AutoModelForCausalLM)."
        )
    if module.training:
        raise CaptureError(f"{name} is in training mode: call .eval() first.")
    if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        raise CaptureError(
            f"{name} has an encoder: only models of a decoder alone are captured with a cache."
        )
    wrong = next((key for key, it in module.named_parameters() if it.dtype is not torch.float32), None)
    if wrong is not None:
        raise CaptureError(f"parameter '{wrong}' of {name} is not float32: call .float() first.")
    return module


def _example_past(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Return a past of random keys and values, of the shapes that the module itself gives."""
    try:
        with quiet(), torch.no_grad():
            ids = torch.zeros(1, 2, dtype=torch.int64)
            cache = module(input_ids=ids, use_cache=True).past_key_values
    except Exception as error:
        raise CaptureError(explain(module, error)) from error
    name = type(module).__name__
    pairs = [(getattr(it, "keys", None), getattr(it, "values", None)) for it in getattr(cache, "layers", ())]
    if not pairs:
        raise CaptureError(f"{name} returns no cache of keys and values ({type(cache).__name__}).")
    for at, pair in enumerate(pairs):
        if any(not isinstance(it, Tensor) or it.ndim != 4 or it.shape[2] != 2 for it in pair):
            raise CaptureError(
                f"layer {at} of {name} keeps something else than keys and values of all positions "
                f"({type(cache.layers[at]).__name__}): it cannot be captured with a cache."
            )
    draw = torch.Generator().manual_seed(0)
    return [(_past_like(keys, draw), _past_like(values, draw)) for keys, values in pairs if keys is not None]


def _past_like(one: Any, draw: torch.Generator) -> Tensor:
    return torch.randn(_BATCH, one.shape[1], _PAST, one.shape[3], generator=draw)


def _name(model: ir.Model, layout: CacheLayout) -> None:
    """Give inputs and outputs the layout's names, and layers and weights those that they have in the user's
    module."""
    outputs = ("logits", *layout.present)
    if len(model.graph.outputs) != len(outputs) or len(model.graph.inputs) != 2 + len(layout.past):
        found = f"{len(model.graph.inputs)} inputs and {len(model.graph.outputs)} outputs"
        raise CaptureError(
            f"the captured graph has {found}, not {2 + len(layout.past)} and {len(outputs)}: the module does "
            "not read or return its cache."
        )
    for value, name in zip(model.graph.inputs[2:], layout.past, strict=True):
        value.name = name
    for value, name in zip(model.graph.outputs, outputs, strict=True):
        value.name = name
    for weight in list(model.graph.initializers.values()):
        if (weight.name or "").startswith(_WRAPPED):
            weight.name = (weight.name or "").removeprefix(_WRAPPED)
    for node in model.graph.all_nodes():
        for key, text in node.metadata_props.items():
            node.metadata_props[key] = text.replace(f"'{_WRAPPED}", "'").replace("'module', ", "")


def _check(module: nn.Module, model: ir.Model, layout: CacheLayout, *, last: bool) -> None:
    """Raise `CaptureError` where a prefill of four tokens and a step of one are not what torch computes of
    all five at once."""
    ids = torch.tensor([[1, 0, 1, 1, 0]])
    with quiet(), torch.no_grad():
        expected = module(input_ids=ids, use_cache=False).logits.numpy()
    session = Session(model, optimization=Optimization.OFF)
    first = session.run(_feeds(ids[:, :4].numpy(), 4) | CacheShape.of(model).empty())
    past = {name: first[made] for name, made in zip(layout.past, layout.present, strict=True)}
    second = session.run(_feeds(ids[:, 4:].numpy(), 5) | past)
    begin = 3 if last else 0
    for what, found, wanted in (
        ("a prefill", first["logits"], expected[:, begin:4]),
        ("a step after it", second["logits"], expected[:, 4:]),
    ):
        fits = found.shape == wanted.shape
        if not fits or deviation([wanted], [found]).relative > _LIMIT:
            much = deviation([wanted], [found]) if fits else f"shape {found.shape}, not {wanted.shape}"
            raise CaptureError(
                f"the captured graph is not the torch model: {what} gives other logits than the whole "
                f"sequence in torch ({much})."
            )


def _feeds(ids: Array, length: int) -> dict[str, Array]:
    return {"input_ids": ids, "attention_mask": torch.ones(1, length, dtype=torch.int64).numpy()}
