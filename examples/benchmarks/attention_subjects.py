# SPDX-License-Identifier: Apache-2.0
"""What is trained with vanilla, clipped and gated attention: language models of characters, a small ViT."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from splitfold.compiler import substitute
from splitfold.compiler.debug.outliers.results import Outliers
from splitfold.examples.benchmarks.data import Feeds
from splitfold.examples.training.char_gpt import characters
from splitfold.examples.training.char_lm import Aim, CharLm, character_loss, drawn
from splitfold.examples.training.loop import Batch
from splitfold.examples.training.small_vit import SIDE, SmallVit, class_loss, fashion
from splitfold.passes.base import Pass
from splitfold.passes.clip_softmax import ClipSoftmaxPass
from splitfold.passes.gate_attention import GateAttentionPass, GateKind

__all__ = ["SUBJECTS", "VARIANTS", "Subject", "started", "without_gates"]

HELD_OUT = 1_000_003
"""Seed of what is held out; training draws with [seed, step]."""
CALIBRATION = 1_000_033
TEXTS, IMAGES = 16, 64
MARGIN = 2

VARIANTS: Mapping[str, Pass | None] = {
    "vanilla": None,
    "clipped": ClipSoftmaxPass(alpha=3.0),
    "gated": GateAttentionPass(kind=GateKind.LINEAR, init=0.5, keep=False),
}
"""Attention by name: the pass that makes it. Clipped at the middle of the paper's band, gated as its main
experiments."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A model and its data.

    Attributes:
        name: what tables call it.
        make: the module, in training mode, from torch's generator.
        batch: the batch of [seed, step].
        loss: of the module on a batch.
        held_out: batches that are not trained on.
        calibration: feeds from the training data.
        perplexity: whether the metric is the perplexity; else it is the accuracy in percent.
        rate, decay: of AdamW.
    """

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[Sequence[int]], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    held_out: Sequence[Batch]
    calibration: Sequence[Feeds]
    perplexity: bool
    rate: float
    decay: float

    @property
    def example(self) -> tuple[Tensor]:
        """An input of a few samples."""
        return (self.held_out[0][0][:4],)

    @property
    def metric(self) -> str:
        """What is measured."""
        return "perplexity" if self.perplexity else "accuracy, %"


def started(subject: Subject, variant: str, seed: int) -> nn.Module:
    """Return a fresh module of a variant; the weights that all variants have are equal for a seed."""
    torch.manual_seed(seed)
    module, step = subject.make(), VARIANTS[variant]
    if step is None:
        return module
    shapes = ({0: torch.export.Dim("batch")},)
    return substitute(module, step, example_inputs=subject.example, dynamic_shapes=shapes)


def without_gates(found: Outliers) -> dict[str, float]:
    """Infinity norm, kurtosis and the largest kurtosis of the layers that the vanilla model has too: a gate's
    own layer bears the name of its block."""
    gated = {block.layer for block in found.attention}
    layers = [layer for layer in found.layers if layer.layer not in gated]
    kurtoses = [layer.kurtosis for layer in layers]
    return {
        "infinity norm": max(layer.infinity_norm for layer in layers),
        "kurtosis": float(np.mean(kurtoses)),
        "largest kurtosis": max(kurtoses),
    }


def language(aim: Aim, quick: bool) -> Subject:
    """A model of characters of tinyshakespeare; the last tenth of the text is held out."""
    text, rest, count = characters()
    held_out = [drawn(rest, count, TEXTS, aim, [HELD_OUT, at]) for at in range(1 if quick else 16)]
    batches = (drawn(text, count, TEXTS, aim, [CALIBRATION, at]) for at in range(1 if quick else 4))
    return Subject(
        f"{aim.value} characters",
        functools.partial(CharLm, count, aim),
        lambda seed: drawn(text, count, TEXTS, aim, seed),
        character_loss,
        held_out,
        [{"ids": batch[0].numpy()} for batch in batches],
        perplexity=True,
        rate=2e-3 if aim is Aim.CAUSAL else 1e-3,
        decay=0.05,
    )


def vision(quick: bool) -> Subject:
    """The small ViT on Fashion-MNIST: images shifted by up to two pixels and mirrored."""
    (x, y), (images, labels) = fashion("train"), fashion("test")
    padded = np.pad(x, ((0, 0), (0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN)), constant_values=x.min())

    def batch(seed: Sequence[int]) -> Batch:
        rng = np.random.default_rng(seed)
        picks, (down, right) = rng.integers(0, len(x), IMAGES), rng.integers(0, 2 * MARGIN + 1, 2)
        cut = padded[picks, :, down : down + SIDE, right : right + SIDE]
        mirror = rng.random(IMAGES) < 0.5
        cut[mirror] = cut[mirror, :, :, ::-1]
        return torch.from_numpy(cut), torch.from_numpy(y[picks])

    some = np.linspace(0, len(images) - 1, 100 if quick else 2000).astype(int)
    held_out = [
        (torch.from_numpy(images[at]), torch.from_numpy(labels[at]))
        for at in np.split(some, max(1, len(some) // 100))
    ]
    drawn_images = np.random.default_rng(CALIBRATION).permutation(len(x))[: IMAGES if quick else 4 * IMAGES]
    calibration = [{"image": x[at]} for at in np.split(drawn_images, len(drawn_images) // IMAGES)]
    return Subject(
        "small ViT",
        SmallVit,
        batch,
        class_loss,
        held_out,
        calibration,
        perplexity=False,
        rate=1.5e-3,
        decay=0.05,
    )


SUBJECTS: Mapping[str, Callable[[bool], Subject]] = {
    "causal": functools.partial(language, Aim.CAUSAL),
    "masked": functools.partial(language, Aim.MASKED),
    "vit": vision,
}
"""By name, made from whether to be quick."""
