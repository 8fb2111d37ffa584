# SPDX-License-Identifier: Apache-2.0
"""The training loop: the same seed gives the same weights, stopped in between or not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from splitfold.runtime.lift.lifted import Lifted
from splitfold.runtime.training.annealing import settled
from splitfold.runtime.training.batches import Data, Place, walk
from splitfold.runtime.training.checkpoint import State, read_checkpoint, write_checkpoint
from splitfold.runtime.training.errors import TrainingError
from splitfold.runtime.training.fake_weights import FakeWeight
from splitfold.runtime.training.in_loop import Annealing

__all__ = ["Checkpoints", "Loss", "Optimizer", "Schedule", "Step", "train"]

Loss: TypeAlias = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]
"""Maps the model's outputs and the batch, tensors by name, to a scalar."""
Optimizer: TypeAlias = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
"""Makes the optimiser of these parameters; its learning rates are multiplied by the schedule."""


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then a cosine down to a floor.

    Args:
        warmup: share of the steps until the full rate.
        floor: share of the rate that is left at the end.
    """

    warmup: float = 0.05
    floor: float = 0.05

    def __post_init__(self) -> None:
        if not (0 <= self.warmup < 1 and 0 <= self.floor <= 1):
            raise ValueError(f"{self}: warmup is at least 0 and below 1, floor 0 to 1.")

    def __call__(self, step: int, steps: int) -> float:
        """Return the share of the rate at `step` (from 0) of `steps`."""
        warm = self.warmup * steps
        if step < warm:
            return (step + 1) / (warm + 1)
        passed = (step - warm) / max(1.0, steps - warm)
        return self.floor + (1 - self.floor) * (0.5 + 0.5 * math.cos(math.pi * passed))


@dataclass(frozen=True)
class Step:
    """One step as shown: its number (from 1) of how many, its loss, and the norm of the gradient."""

    number: int
    steps: int
    loss: float
    gradient: float


@dataclass(frozen=True)
class Checkpoints:
    """Where a run is kept, every how many steps, and the digest of what it depends on."""

    path: Path
    every: int
    key: str


@dataclass
class _Run:
    """What changes from step to step."""

    lifted: Lifted
    optimizer: torch.optim.Optimizer
    rates: list[float]
    place: Place = field(default_factory=Place)
    done: int = 0

    def state(self, key: str) -> State:
        module, optimizer = self.lifted.module.state_dict(), self.optimizer.state_dict()
        return State(key, self.done, self.place, module, optimizer, torch.get_rng_state())

    def take_up(self, state: State) -> None:
        self.lifted.module.load_state_dict(state.module)
        self.optimizer.load_state_dict(state.optimizer)
        torch.set_rng_state(state.random)
        self.done, self.place = state.step, state.place


def train(
    lifted: Lifted,
    data: Data,
    loss: Loss,
    steps: int,
    *,
    optimizer: Optimizer,
    schedule: Schedule,
    clip_norm: float,
    seed: int,
    grids: Mapping[str, FakeWeight],
    annealing: Annealing | None,
    checkpoints: Checkpoints | None,
    observer: Callable[[Step], None],
) -> None:
    """Train the parameters of a lifted model that require gradients, in place.

    Args:
        lifted: the model.
        data: see `Data`.
        loss: see `Loss`.
        steps: of the optimiser.
        optimizer: see `Optimizer`.
        schedule: of its rates.
        clip_norm: largest norm of all gradients together; 0 is no limit.
        seed: of the order of the data, and of torch.
        grids: of the weights that are quantized in the loop, by parameter.
        annealing: how training ends.
        checkpoints: where the run is kept and taken up again.
        observer: called after each step.

    Raises:
        TrainingError: see there.
    """
    parameters = {name: it for name, it in lifted.module.named_parameters() if it.requires_grad}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = optimizer(parameters.values())
        run = _Run(lifted, made, [group["lr"] for group in made.param_groups])
        kept = read_checkpoint(checkpoints.path, checkpoints.key) if checkpoints else None
        if kept is not None:
            run.take_up(kept)
        batches = walk(data, seed, run.place)
        lifted.module.train()
        try:
            while run.done < steps:
                _rate(run, schedule(run.done, steps))
                moving = annealing is not None and run.done >= steps - annealing.steps
                held = settled(parameters, grids, annealing.barrier) if annealing and moving else {}
                run.place, batch = next(batches)
                seen = _step(run, batch, loss, parameters, clip_norm)
                _put_back(parameters, held)
                run.done += 1
                observer(Step(run.done, steps, *seen))
                if checkpoints and (run.done % checkpoints.every == 0 or run.done == steps):
                    write_checkpoint(checkpoints.path, run.state(checkpoints.key))
        finally:
            lifted.module.eval()


def _rate(run: _Run, share: float) -> None:
    for group, rate in zip(run.optimizer.param_groups, run.rates, strict=True):
        group["lr"] = rate * share


def _step(
    run: _Run,
    batch: Mapping[str, Tensor],
    loss: Loss,
    parameters: Mapping[str, nn.Parameter],
    clip_norm: float,
) -> tuple[float, float]:
    """Do one step of the optimiser; return the loss and the norm of the gradient before it was clipped."""
    missing = [name for name in run.lifted.inputs if name not in batch]
    if missing:
        raise TrainingError(f"step {run.done + 1}: the batch lacks the input '{missing[0]}'.")
    value = _loss(loss, run.lifted.run(batch), batch, run.done + 1)
    run.optimizer.zero_grad(set_to_none=True)
    value.backward()  # type: ignore[no-untyped-call]
    norm = float(nn.utils.clip_grad_norm_(parameters.values(), clip_norm or math.inf))
    if not math.isfinite(norm):
        name = next(_unfinished(parameters))
        raise TrainingError(f"step {run.done + 1}: the gradient of '{name}' is not finite. Lower the rate.")
    run.optimizer.step()
    return float(value.detach()), norm


def _loss(loss: Loss, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor], step: int) -> Tensor:
    value = loss(outputs, batch)
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise TrainingError(f"step {step}: the loss is a scalar tensor, but the function gave {shape}.")
    if not torch.isfinite(value):
        number = float(value.detach())
        raise TrainingError(f"step {step}: the loss is {number}. Lower the rate, or check the data.")
    if not value.requires_grad:
        raise TrainingError(f"step {step}: the loss does not depend on anything that is trained.")
    return value.reshape(())


def _unfinished(parameters: Mapping[str, nn.Parameter]) -> Iterator[str]:
    for name, parameter in parameters.items():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            yield name


def _put_back(parameters: Mapping[str, nn.Parameter], held: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Put back the weights that may not move: where the mask is set, the numbers before the step."""
    with torch.no_grad():
        for name, (mask, before) in held.items():
            parameters[name].copy_(torch.where(mask, before, parameters[name]))
