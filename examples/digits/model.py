# SPDX-License-Identifier: Apache-2.0
"""A small pre-norm vision transformer for 8x8 grey images of handwritten digits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

IMAGE_SIZE = 8
PATCH_SIZE = 2
CLASSES = 10
TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2


class Attention(nn.Module):
    """Multi-head self-attention: float32 [batch, tokens, hidden] -> the same shape."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        if hidden % heads:
            raise ValueError(f"hidden ({hidden}) must be a multiple of heads ({heads})")
        self.heads = heads
        self.q = nn.Linear(hidden, hidden)
        self.k = nn.Linear(hidden, hidden)
        self.v = nn.Linear(hidden, hidden)
        self.proj = nn.Linear(hidden, hidden)

    def split(self, x: Tensor) -> Tensor:
        """[batch, tokens, hidden] -> [batch, heads, tokens, hidden / heads]."""
        batch, tokens, _ = x.shape
        return x.view(batch, tokens, self.heads, -1).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, hidden] -> [batch, tokens, hidden], float32."""
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = self.proj(mixed)
        return out


class Mlp(nn.Module):
    """Two linear layers with a GELU between: float32 [batch, tokens, hidden] -> the same shape."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden, inner)
        self.fc2 = nn.Linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, hidden] -> [batch, tokens, hidden], float32."""
        out: Tensor = self.fc2(functional.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """One pre-norm transformer block: float32 [batch, tokens, hidden] -> the same shape."""

    def __init__(self, hidden: int, heads: int, inner: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden)
        self.attn = Attention(hidden, heads)
        self.norm2 = nn.LayerNorm(hidden)
        self.mlp = Mlp(hidden, inner)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, hidden] -> [batch, tokens, hidden], float32."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class DigitsViT(nn.Module):
    """Digit classifier: float32 image [batch, 1, 8, 8] in 0..1 -> float32 logits [batch, 10]."""

    def __init__(self, hidden: int = 48, depth: int = 3, heads: int = 4, inner: int = 96) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, hidden, kernel_size=PATCH_SIZE, stride=PATCH_SIZE)
        self.position = nn.Parameter(torch.empty(1, TOKENS, hidden))
        self.blocks = nn.ModuleList(Block(hidden, heads, inner) for _ in range(depth))
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, CLASSES)
        nn.init.trunc_normal_(self.position, std=0.02)

    def embed(self, image: Tensor) -> Tensor:
        """[batch, 1, 8, 8] -> [batch, 16, hidden]: one token per 2x2 patch, position added."""
        patches: Tensor = self.patch(image)
        return patches.flatten(2).transpose(1, 2) + self.position

    def forward(self, image: Tensor) -> Tensor:
        """float32 [batch, 1, 8, 8] -> float32 logits [batch, 10], from the mean over the tokens."""
        x = self.embed(image)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x).mean(dim=1))
        return logits
