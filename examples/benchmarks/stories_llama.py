# SPDX-License-Identifier: Apache-2.0
"""stories260K as a `LlamaForCausalLM`, from the weights of its ONNX file, which has no cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from splitfold.runtime.feeds import Array

__all__ = ["stories_llama"]

WIDTH, INNER, LAYERS, HEADS, KEY_HEADS, WORDS, POSITIONS = 64, 172, 5, 8, 4, 512, 512
PARTS = (
    "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
"""Weights of a layer in the order in which the graph reads them."""


def stories_llama(path: Path) -> Any:
    """Return the model, in eval mode."""
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        max_position_embeddings=POSITIONS,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
    )
    module: Any = LlamaForCausalLM(config)
    module.load_state_dict(_named(list(_weights(ir.load(path)))))
    return module.eval()


def _weights(model: ir.Model) -> Iterator[Array]:
    """Yield the weights in the order in which the graph reads them; those of MatMul are [K, N]."""
    for node in model.graph:
        if node.op_type in ("Gather", "Mul", "MatMul"):
            for value in node.inputs:
                tensor = value.const_value if value is not None and value.is_initializer() else None
                if tensor is not None and tensor.size > 1:
                    yield tensor.numpy()


def _named(weights: list[Array]) -> dict[str, torch.Tensor]:
    names = ["embed_tokens", *(f"layers.{at}.{part}" for at in range(LAYERS) for part in PARTS), "norm"]
    found = {f"model.{name}.weight": array for name, array in zip(names, weights[:-1], strict=True)}
    found["lm_head.weight"] = weights[-1]
    return {name: torch.tensor(_turned(name, array)) for name, array in found.items()}


def _turned(name: str, array: Array) -> Array:
    """Return a weight as torch has it; channels that are rotated together stand side by side in the file,
    half a head apart in torch."""
    if array.ndim == 1 or "embed_tokens" in name:
        return np.array(array)
    rows = np.ascontiguousarray(array.T)
    if "q_proj" in name or "k_proj" in name:
        size = WIDTH // HEADS
        pairs = rows.reshape(-1, size // 2, 2, WIDTH)
        rows = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)
    return rows
