# SPDX-License-Identifier: Apache-2.0
"""`finetune`: train an ONNX model, or the parts that a substitution added, and get an ONNX model back."""

from __future__ import annotations

import enum
import fnmatch
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from splitfold.compiler.source import read_graph
from splitfold.passes.errors import SpecError
from splitfold.passes.identity import layers_of, name_layers
from splitfold.passes.provenance import stands_for
from splitfold.runtime.digest import content_digest
from splitfold.runtime.errors import did_you_mean

if TYPE_CHECKING:
    from splitfold.runtime.lift import Lifted
    from splitfold.runtime.training import Data, InLoop, Loss, Optimizer, Schedule, Step

__all__ = ["Trained", "finetune"]

logger = logging.getLogger(__name__)

_SHOWN = 20
"""How often the loss is logged in one run."""


class Trained(enum.Enum):
    """Which weights are trained."""

    ALL = "all"
    """All that a layer reads."""
    ADDED = "added"
    """Those that passes added, such as gates: what only nodes read that stand for no original value."""


def finetune(
    model: object,
    data: Data,
    loss: Loss,
    steps: int,
    *,
    train: Trained = Trained.ALL,
    only: Sequence[str] = (),
    rate: float = 1e-4,
    optimizer: Optimizer | None = None,
    schedule: Schedule | None = None,
    clip_norm: float = 1.0,
    seed: int = 0,
    in_loop: InLoop | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    observer: Callable[[Step], None] | None = None,
) -> ir.Model:
    """Train a model on the CPU and return it with other weights: same operators, names and shapes.

    `compile` and every pass take the result. The same arguments give the same weights on one machine, also
    where the run was stopped and taken up again from its checkpoint.

    Args:
        model: `onnx_ir.Model`, `onnx.ModelProto` or path of a float model; it is left alone.
        data: batches: names to arrays, the model's inputs and whatever `loss` needs; see `Data`.
        loss: maps the outputs and the batch (torch tensors by name) to a scalar tensor.
        steps: of the optimiser, one batch each.
        train: which weights.
        only: layer patterns (shell wildcards): of these weights, those that a matching layer reads. A layer
            that is left out keeps its weights bit for bit.
        rate: learning rate of the default optimiser.
        optimizer: makes another one from the parameters; default AdamW without weight decay.
        schedule: of the learning rate; default 5 % warm-up, then a cosine down to 5 %.
        clip_norm: largest norm of all gradients together; 0 is no limit.
        seed: of the order of the data, and of torch.
        in_loop: what is quantized while training; it says which weights come back.
        checkpoint: file that the run is kept in, each `checkpoint_every` steps; one there is taken up.
        observer: called after each step; the log has the loss some twenty times.

    Raises:
        CaptureError, UnsupportedError: the model is no ONNX model, or holds what cannot be trained through.
        SpecError: a pattern matches no layer.
        TrainingError: there is nothing to train, the data or the loss do not fit, or training diverged.
        ImportError: torch is not installed (`splitfold[torch]`).
    """
    if steps < 1 or checkpoint_every < 1:
        raise ValueError(f"steps ({steps}) and checkpoint_every ({checkpoint_every}) are at least 1.")
    kept = None if checkpoint is None else (Path(checkpoint), checkpoint_every)
    run = _Run(steps, train, only, rate, optimizer, schedule, clip_norm, seed, in_loop, kept, observer)
    result, _ = read_graph(model)
    run.train(result, data, loss)
    return result


@dataclass(frozen=True)
class _Run:
    """How a model is trained: see `finetune`."""

    steps: int
    which: Trained
    only: Sequence[str]
    rate: float
    optimizer: Optimizer | None
    schedule: Schedule | None
    clip_norm: float
    seed: int
    in_loop: InLoop | None
    kept: tuple[Path, int] | None
    """File of the checkpoint, and the steps between two writings."""
    observer: Callable[[Step], None] | None

    def train(self, model: ir.Model, data: Data, loss: Loss) -> None:
        """Train `model` in place."""
        from splitfold.runtime.lift import lift, lower_weights
        from splitfold.runtime.training import loop
        from splitfold.runtime.training.batches import fitting
        from splitfold.runtime.training.errors import TrainingError
        from splitfold.runtime.training.in_loop import put_in_loop
        from splitfold.runtime.training.on_grid import adamw, put_on_grid

        lifted = lift(model)
        held = _freeze(lifted, set(_wanted(model, self.which, self.only)))
        if not held:
            raise TrainingError(
                f"no weight is to be trained (train={self.which.value}, only={list(self.only)})."
            )
        key = _key(model, held, self.steps, self.seed, self.rate, self.in_loop)
        grids = put_in_loop(lifted, self.in_loop) if self.in_loop is not None else {}
        loop.train(
            lifted,
            fitting(data, model),
            loss,
            self.steps,
            optimizer=self.optimizer or adamw(self.rate),
            schedule=self.schedule or loop.Schedule(),
            clip_norm=self.clip_norm,
            seed=self.seed,
            grids=grids,
            annealing=self.in_loop.annealing if self.in_loop is not None else None,
            checkpoints=loop.Checkpoints(*self.kept, key) if self.kept is not None else None,
            observer=_told(self.steps, self.observer),
        )
        put_on_grid(lifted, grids)
        lower_weights(lifted, model)


def _wanted(model: ir.Model, train: Trained, only: Sequence[str]) -> Iterator[str]:
    """Yield the names of the initializers to train; inside of subgraphs all count as the original's."""
    named = model.clone()
    name_layers(named)
    known = sorted({layer for node in named.graph for layer in layers_of(node)})
    for pattern in only:
        if not fnmatch.filter(known, pattern):
            raise SpecError(f"finetune: no layer matches '{pattern}'.{did_you_mean(pattern, known)}")
    for name, value in named.graph.initializers.items():
        readers = [use.node for use in value.uses()]
        layers = {layer for node in readers for layer in layers_of(node)}
        added = all(stands_for(output) is None for node in readers for output in node.outputs)
        fits = not only or any(fnmatch.filter(layers, pattern) for pattern in only)
        if readers and fits and (added or train is Trained.ALL):
            yield name


def _freeze(lifted: Lifted, wanted: set[str]) -> list[str]:
    """Let only parameters of these initializers be trained; return which those are."""
    parameters = dict(lifted.module.named_parameters())
    trained = {lifted.parameters[name] for name in wanted if name in lifted.parameters}
    for name, parameter in parameters.items():
        parameter.requires_grad_(parameter.requires_grad and name in trained)
    return sorted(name for name, parameter in parameters.items() if parameter.requires_grad)


def _key(model: ir.Model, trained: Sequence[str], *settings: object) -> str:
    text = repr((content_digest(model), list(trained), *settings))
    return hashlib.sha256(text.encode()).hexdigest()


def _told(steps: int, observer: Callable[[Step], None] | None) -> Callable[[Step], None]:
    every = max(1, steps // _SHOWN)

    def tell(step: Step) -> None:
        if step.number % every == 0 or step.number == 1:
            logger.info("step %d of %d: loss %.4g, gradient %.3g", *vars(step).values())
        if observer is not None:
            observer(step)

    return tell
