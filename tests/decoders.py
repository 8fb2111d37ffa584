# SPDX-License-Identifier: Apache-2.0
"""Small random causal language models of Hugging Face, and what they compute of a whole sequence."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import torch
import transformers

from splitfold.compiler.decoder import Logits, capture_decoder
from splitfold.runtime.feeds import Array

__all__ = ["POSITIONS", "VOCABULARY", "build", "captured", "whole"]

VOCABULARY, POSITIONS = 97, 32
_WIDTH, _HEADS, _KEY_HEADS = 32, 4, 2


def _llama() -> torch.nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=_WIDTH,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=_HEADS,
            num_key_value_heads=_KEY_HEADS,
            max_position_embeddings=POSITIONS,
            initializer_range=0.3,
        )
    )


def _gpt2() -> torch.nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=_WIDTH,
            n_layer=1,
            n_head=_HEADS,
            n_positions=POSITIONS,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def _opt() -> torch.nn.Module:
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=_WIDTH,
            ffn_dim=64,
            num_hidden_layers=1,
            num_attention_heads=_HEADS,
            max_position_embeddings=POSITIONS,
            word_embed_proj_dim=_WIDTH,
            init_std=0.3,
        )
    )


def _mistral() -> torch.nn.Module:
    return transformers.MistralForCausalLM(
        transformers.MistralConfig(
            vocab_size=VOCABULARY,
            hidden_size=_WIDTH,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=_HEADS,
            num_key_value_heads=_KEY_HEADS,
            max_position_embeddings=POSITIONS,
            sliding_window=4,
        )
    )


_MAKERS: dict[str, Callable[[], torch.nn.Module]] = {
    "llama": _llama,
    "gpt2": _gpt2,
    "opt": _opt,
    "mistral": _mistral,
}


@functools.cache
def build(name: str) -> torch.nn.Module:
    """Return the model, in eval mode."""
    torch.manual_seed(0)
    return _MAKERS[name]().eval()


@functools.cache
def _captured(name: str, logits: Logits) -> ir.Model:
    return capture_decoder(build(name), logits=logits)


def captured(name: str, logits: Logits = Logits.ALL) -> ir.Model:
    """Return a copy of its graph with a cache."""
    return _captured(name, logits).clone()


def whole(name: str, ids: Array, mask: Array) -> Array:
    """Return torch's logits [batch, sequence, vocabulary] of a whole sequence, without a cache."""
    positions = np.clip(mask.cumsum(1) - 1, 0, None)
    with torch.no_grad():
        found = build(name)(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            position_ids=torch.tensor(positions),
            use_cache=False,
        )
    return np.asarray(found.logits.numpy())
