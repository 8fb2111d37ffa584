# SPDX-License-Identifier: Apache-2.0
"""A small pre-norm vision transformer on Fashion-MNIST.

    python -m splitfold.examples.training.small_vit -o small_vit.onnx

It reads `shared/data/images/fashion_mnist` (or SPLITFOLD_SHARED), trains for a few minutes on the CPU and
writes the model as ONNX: image float32 [batch, 1, 28, 28], (x / 255 - 0.2860) / 0.3530 -> logits float32
[batch, 10].
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
from splitfold.examples.benchmarks.data import Floats, Labels, shared
from splitfold.examples.training.loop import Batch, train

HIDDEN, LAYERS, HEADS, INNER, PATCH, SIDE = 128, 6, 4, 256, 4, 28


class Attention(nn.Module):
    """Self-attention, one fused layer for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.proj = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, hidden] -> the same shape."""
        batch, tokens, _ = x.shape
        whole = self.qkv(x).view(batch, tokens, 3, HEADS, HIDDEN // HEADS).permute(2, 0, 3, 1, 4)
        q, k, v = whole[0], whole[1], whole[2]
        shares = (q @ k.transpose(-1, -2) / (HIDDEN // HEADS) ** 0.5).softmax(-1)
        out: Tensor = self.proj((shares @ v).transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """A pre-norm block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(HIDDEN), Attention()
        self.norm2 = nn.LayerNorm(HIDDEN)
        self.fc1, self.fc2 = nn.Linear(HIDDEN, INNER), nn.Linear(INNER, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, hidden] -> the same shape."""
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))
        return out


class SmallVit(nn.Module):
    """The classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, HIDDEN, PATCH, PATCH)
        self.position = nn.Parameter(0.02 * torch.randn(1, (SIDE // PATCH) ** 2, HIDDEN))
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, 10)

    def forward(self, image: Tensor) -> Tensor:
        """float32 [batch, 1, 28, 28] -> logits float32 [batch, 10]."""
        x = self.patch(image).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x).mean(1))
        return out


def fashion(part: str) -> tuple[Floats, Labels]:
    """Images float32 [n, 1, 28, 28], normalised, and labels of ``train`` or ``test``."""
    with np.load(shared("data", "images", "fashion_mnist", f"{part}.npz")) as archive:
        x, y = archive["x"].reshape(-1, 1, SIDE, SIDE), archive["y"].astype(np.int64)
    return ((x.astype(np.float32) / 255 - 0.2860) / 0.3530).astype(np.float32), y


def shuffled(x: Floats, y: Labels, size: int, seed: int) -> Iterator[Batch]:
    """Seeded batches without end, shifted by up to two pixels and mirrored at random."""
    rng = np.random.default_rng(seed)
    padded = np.pad(x, ((0, 0), (0, 0), (2, 2), (2, 2)), constant_values=x.min())
    while True:
        picks = rng.integers(0, len(x), size)
        down, right = rng.integers(0, 5, 2)
        cut = padded[picks, :, down : down + SIDE, right : right + SIDE]
        mirror = rng.random(size) < 0.5
        cut[mirror] = cut[mirror, :, :, ::-1]
        yield torch.from_numpy(cut), torch.from_numpy(y[picks])


def class_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy."""
    return functional.cross_entropy(model(batch[0]).float(), batch[1])


def main() -> int:
    """Train and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("small_vit.onnx"))
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    x, y = fashion("train")
    model = SmallVit()
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters, {len(x)} images")
    steps = train(model, shuffled(x, y, 128, given.seed), class_loss, minutes=given.minutes, rate=1.5e-3)
    model.eval()
    images, labels = fashion("test")
    with torch.no_grad():
        hits = [
            (model(torch.from_numpy(images[at : at + 500])).argmax(1).numpy() == labels[at : at + 500]).mean()
            for at in range(0, len(images), 500)
        ]
    print(f"{steps} steps; test accuracy {100 * np.mean(hits):.2f} %")
    shapes = ({0: torch.export.Dim("batch")},)
    compile(
        model, (torch.from_numpy(images[:4]),), pipeline="canonicalize", dynamic_shapes=shapes
    ).save_model(given.output)
    print(f"written {given.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
