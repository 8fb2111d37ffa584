# SPDX-License-Identifier: Apache-2.0
"""Training of one seeded model in steps that can be stopped at any time and gone on with later."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from splitfold.examples.training.loop import Batch

__all__ = ["Cell", "train_cell"]

_WARM = 0.05
_MEAN = 0.98


@dataclass(frozen=True)
class Cell:
    """One model to train.

    Attributes:
        batch: the batch of a step, from 0.
        loss: of the module on a batch.
        steps: of AdamW.
        rate: the highest, after warm-up; a cosine goes down to a twentieth.
        decay: weight decay.
        every: steps between two looks, and between two checkpoints.
        look: what is measured of the module, in eval mode, after so many steps.
    """

    batch: Callable[[int], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    steps: int
    rate: float
    decay: float
    every: int
    look: Callable[[nn.Module, int], dict[str, float]]

    def rate_at(self, step: int) -> float:
        """The learning rate of a step."""
        warm = min(1.0, (step + 1) / (_WARM * self.steps))
        return self.rate * warm * (0.05 + 0.95 * (0.5 + 0.5 * math.cos(math.pi * step / self.steps)))


def train_cell(module: nn.Module, cell: Cell, file: Path) -> list[dict[str, float]]:
    """Train, in place, or go on where `file` says that training stopped; return what was looked at.

    The looks are also written beside it, as JSON.
    """
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=cell.rate, weight_decay=cell.decay, betas=(0.9, 0.95)
    )
    looks: list[dict[str, float]] = []
    start, mean = 0, math.nan
    if file.is_file():
        held: dict[str, Any] = torch.load(file, weights_only=True)
        module.load_state_dict(held["module"])
        optimizer.load_state_dict(held["optimizer"])
        start, mean, looks = held["step"], held["mean"], held["looks"]
    for step in range(start, cell.steps):
        value = _step(module, optimizer, cell, step)
        mean = value if math.isnan(mean) else _MEAN * mean + (1 - _MEAN) * value
        if (step + 1) % cell.every == 0 or step + 1 == cell.steps:
            module.eval()
            looks.append({"step": step + 1, "loss": mean, **cell.look(module, step + 1)})
            module.train()
            kept = {"module": module.state_dict(), "optimizer": optimizer.state_dict()}
            part = file.with_suffix(".part")
            torch.save({**kept, "step": step + 1, "mean": mean, "looks": looks}, part)
            part.replace(file)
            file.with_suffix(".json").write_text(json.dumps(looks, indent=1), encoding="utf-8")
    return looks


def _step(module: nn.Module, optimizer: torch.optim.Optimizer, cell: Cell, step: int) -> float:
    for group in optimizer.param_groups:
        group["lr"] = cell.rate_at(step)
    with torch.autocast("cpu", torch.bfloat16):
        value = cell.loss(module, cell.batch(step))
    optimizer.zero_grad(set_to_none=True)
    value.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    return value.item()
