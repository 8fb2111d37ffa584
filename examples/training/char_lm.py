# SPDX-License-Identifier: Apache-2.0
"""A character-level language model on tinyshakespeare, to see outliers grow: 4 blocks of width 256, 128
positions; causal with norms before the layers, as OPT, or masked with norms behind them, as BERT.

ids int64 [batch, 128] -> logits float32 [batch, 128, characters + 1]. The last tenth of the text is held out.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from splitfold.examples.benchmarks.data import Labels
from splitfold.examples.training.loop import Batch

__all__ = ["CONTEXT", "Aim", "CharLm", "character_loss", "drawn"]

HIDDEN, LAYERS, HEADS, INNER, CONTEXT = 256, 4, 4, 1024, 128
MASKED = 0.15
IGNORED = -100


class Aim(enum.Enum):
    """What is predicted."""

    CAUSAL = "causal"
    """The next character, from those before."""
    MASKED = "masked"
    """15 % of the characters, from all others."""


class Attention(nn.Module):
    """Self-attention."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.query, self.key, self.value = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
        self.output = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, positions, hidden] -> the same shape."""
        shape = (x.shape[0], x.shape[1], HEADS, HIDDEN // HEADS)
        q, k, v = (part(x).view(shape).transpose(1, 2) for part in (self.query, self.key, self.value))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        out: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """A block with its norms before its layers, or behind them."""

    def __init__(self, aim: Aim) -> None:
        super().__init__()
        self.first = aim is Aim.CAUSAL
        self.norm_attention, self.attention = nn.LayerNorm(HIDDEN), Attention(aim is Aim.CAUSAL)
        self.norm_mlp = nn.LayerNorm(HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, INNER), nn.Linear(INNER, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, positions, hidden] -> the same shape."""
        if self.first:
            x = x + self.attention(self.norm_attention(x))
            return x + self._mlp(self.norm_mlp(x))
        x = self.norm_attention(x + self.attention(x))
        out: Tensor = self.norm_mlp(x + self._mlp(x))
        return out

    def _mlp(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(functional.gelu(self.up(x)))
        return out


class CharLm(nn.Module):
    """The language model; its last id is the mask."""

    def __init__(self, count: int, aim: Aim) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(count + 1, HIDDEN), nn.Embedding(CONTEXT, HIDDEN)
        self.blocks = nn.ModuleList(Block(aim) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, count + 1)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [batch, positions] -> logits float32 [batch, positions, characters + 1]."""
        x = self.embedding(ids) + self.position.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x))
        return out


def drawn(text: Labels, count: int, size: int, aim: Aim, seed: Sequence[int]) -> Batch:
    """A seeded batch of windows of a text of `count` characters: ids and what is to be predicted, int64
    [size, CONTEXT] each; `IGNORED` where nothing is."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, len(text) - CONTEXT - 1, size)
    cut = np.stack([text[start : start + CONTEXT + 1] for start in starts])
    if aim is Aim.CAUSAL:
        return torch.from_numpy(cut[:, :-1].copy()), torch.from_numpy(cut[:, 1:].copy())
    ids = cut[:, :-1].copy()
    hidden = rng.random(ids.shape) < MASKED
    wanted = np.where(hidden, ids, IGNORED)
    how = rng.random(ids.shape)
    ids[hidden & (how < 0.8)] = count
    other = hidden & (how >= 0.9)
    ids[other] = rng.integers(0, count, int(other.sum()))
    return torch.from_numpy(ids), torch.from_numpy(wanted)


def character_loss(module: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of the characters that are predicted, in nats."""
    logits = module(batch[0])
    return functional.cross_entropy(logits.flatten(0, 1).float(), batch[1].flatten(), ignore_index=IGNORED)
