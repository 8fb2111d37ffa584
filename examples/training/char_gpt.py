# SPDX-License-Identifier: Apache-2.0
"""A character-level GPT on tinyshakespeare: RMS norm, SwiGLU, grouped-query attention, rotary positions,
about 10 million parameters.

    python -m splitfold.examples.training.char_gpt -o char_gpt.onnx

It reads `shared/data/text/tinyshakespeare` (or SPLITFOLD_SHARED), trains for 14 minutes on the CPU, and
writes the model as ONNX: ids int64 [batch, sequence] -> logits float32 [batch, sequence, characters]. The
last tenth of the text is held out.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from splitfold.compiler import compile
from splitfold.examples.benchmarks.data import shared
from splitfold.examples.training.loop import Batch, train

HIDDEN, LAYERS, HEADS, KV_HEADS, INNER = 320, 8, 8, 4, 864
CONTEXT = 128
HELD_OUT = 0.1


class RmsNorm(nn.Module):
    """Root-mean-square norm over the last axis."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """The norm of `x`, same shape."""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.gamma


def rotated(x: Tensor) -> Tensor:
    """Rotary positions: float [batch, heads, sequence, size] -> the same shape."""
    size = x.shape[-1]
    steps = torch.arange(x.shape[-2], dtype=torch.float32)
    angles = steps[:, None] * 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
    cos, sin = torch.cos(angles), torch.sin(angles)
    first, second = x[..., : size // 2], x[..., size // 2 :]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self) -> None:
        super().__init__()
        self.size = HIDDEN // HEADS
        self.q = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.k = nn.Linear(HIDDEN, KV_HEADS * self.size, bias=False)
        self.v = nn.Linear(HIDDEN, KV_HEADS * self.size, bias=False)
        self.o = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def split(self, x: Tensor, heads: int) -> Tensor:
        """[batch, sequence, heads x size] -> [batch, heads, sequence, size]."""
        return x.view(x.shape[0], x.shape[1], heads, self.size).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, sequence, hidden] -> the same shape."""
        q, k = rotated(self.split(self.q(x), HEADS)), rotated(self.split(self.k(x), KV_HEADS))
        v = self.split(self.v(x), KV_HEADS)
        k = k.repeat_interleave(HEADS // KV_HEADS, dim=1)
        v = v.repeat_interleave(HEADS // KV_HEADS, dim=1)
        scores = q @ k.transpose(-1, -2) / self.size**0.5
        ahead = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        shares = scores.masked_fill(ahead, -1e4).softmax(-1)
        mixed = (shares @ v).transpose(1, 2).flatten(2)
        out: Tensor = self.o(mixed)
        return out


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, INNER, bias=False)
        self.up = nn.Linear(HIDDEN, INNER, bias=False)
        self.down = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, sequence, hidden] -> the same shape."""
        out: Tensor = self.down(functional.silu(self.gate(x)) * self.up(x))
        return out


class Block(nn.Module):
    """A pre-norm block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_attention, self.attention = RmsNorm(HIDDEN), Attention()
        self.norm_mlp, self.mlp = RmsNorm(HIDDEN), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        """[batch, sequence, hidden] -> the same shape."""
        x = x + self.attention(self.norm_attention(x))
        out: Tensor = x + self.mlp(self.norm_mlp(x))
        return out


class CharGpt(nn.Module):
    """The language model."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, HIDDEN)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = RmsNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, characters, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                scale = 0.02 / (2 * LAYERS) ** 0.5 if name.endswith(("o.weight", "down.weight")) else 0.02
                nn.init.normal_(parameter, std=scale)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [batch, sequence] -> logits float32 [batch, sequence, characters]."""
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x))
        return out


def characters() -> tuple[np.ndarray, np.ndarray, int]:
    """Ids (int64) of the training text, of the held-out text, and the number of characters."""
    text = shared("data", "text", "tinyshakespeare", "input.txt").read_text(encoding="utf-8")
    known = sorted(set(text))
    number = {letter: at for at, letter in enumerate(known)}
    ids = np.array([number[letter] for letter in text], np.int64)
    border = int(len(ids) * (1 - HELD_OUT))
    return ids[:border], ids[border:], len(known)


def windows(ids: np.ndarray, size: int, seed: int) -> Iterator[Batch]:
    """Seeded random windows without end: (ids, next ids), int64 [size, CONTEXT] each."""
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(0, len(ids) - CONTEXT - 1, size)
        cut = torch.from_numpy(np.stack([ids[start : start + CONTEXT + 1] for start in starts]))
        yield cut[:, :-1], cut[:, 1:]


def next_character_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of the next character, in nats."""
    logits = model(batch[0])
    return functional.cross_entropy(logits.flatten(0, 1).float(), batch[1].flatten())


def main() -> int:
    """Train and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("char_gpt.onnx"))
    parser.add_argument("--minutes", type=float, default=14.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    text, held_out, count = characters()
    model = CharGpt(count)
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters, {len(text)} characters"
    )
    steps = train(model, windows(text, 24, given.seed), next_character_loss, minutes=given.minutes, rate=2e-3)
    model.eval()
    with torch.no_grad():
        found = [next_character_loss(model, next(windows(held_out, 32, seed))).item() for seed in range(8)]
    print(f"{steps} steps; held-out perplexity {np.exp(np.mean(found)):.3f} a character")
    example = torch.from_numpy(held_out[: 2 * CONTEXT].reshape(2, CONTEXT).copy())
    shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=512)},)
    compile(model, (example,), pipeline="canonicalize", dynamic_shapes=shapes).save_model(given.output)
    print(f"written {given.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
