# SPDX-License-Identifier: Apache-2.0
"""A training loop with a budget of time or of steps: warm-up, cosine decay, the loss on a progress line."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


def train(
    model: nn.Module,
    batches: Iterator[Batch],
    loss: Callable[[nn.Module, Batch], Tensor],
    *,
    minutes: float,
    rate: float,
    decay: float = 0.05,
) -> int:
    """Train with AdamW until `minutes` are over and return the number of steps.

    The learning rate follows the clock, so the schedule is complete whatever the machine's speed; the model
    of one seed therefore differs between machines.
    """
    start = time.monotonic()
    return _train(
        model, batches, loss, lambda step: (time.monotonic() - start) / (60 * minutes), rate=rate, decay=decay
    )


def train_steps(
    model: nn.Module,
    batches: Iterator[Batch],
    loss: Callable[[nn.Module, Batch], Tensor],
    *,
    steps: int,
    rate: float,
    decay: float = 0.05,
) -> None:
    """Train with AdamW for `steps` steps: the model of one seed does not depend on the machine's speed."""
    _train(model, batches, loss, lambda step: step / steps, rate=rate, decay=decay)


def _train(
    model: nn.Module,
    batches: Iterator[Batch],
    loss: Callable[[nn.Module, Batch], Tensor],
    progress: Callable[[int], float],
    *,
    rate: float,
    decay: float,
) -> int:
    """Train until `progress`, a function of the steps done, reaches 1; return the number of steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay, betas=(0.9, 0.95))
    shown, step, mean = 0.0, 0, 0.0
    while (passed := progress(step)) < 1:
        warm = min(1.0, passed / 0.03)
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * (0.05 + 0.95 * (0.5 + 0.5 * math.cos(math.pi * passed)))
        batch = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(model, batch)
        optimizer.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        mean = value.item() if step == 1 else 0.98 * mean + 0.02 * value.item()
        if passed - shown > 0.05:
            shown = passed
            print(f"{100 * passed:4.0f} %  step {step}  loss {mean:.3f}", flush=True)
    return step
