# SPDX-License-Identifier: Apache-2.0
"""Traces of the Hessian of an objective by the weights of a lifted model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from splitfold.runtime.feeds import Feeds
from splitfold.runtime.lift.gradients import Objective, counted, recorded
from splitfold.runtime.lift.lifted import Lifted
from splitfold.runtime.padding import Padding

__all__ = ["hessian_traces"]

_SMALLEST = 1e-4
"""Share of the largest trace below which sizes count alike."""


def hessian_traces(
    lifted: Lifted,
    feeds: Feeds,
    objective: Objective,
    weights: Sequence[str],
    *,
    probes: int = 1,
    seed: int = 0,
    padding: Padding | None = None,
    sizes: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Return an estimate of the trace of the objective's Hessian by each weight: v^T H v for random signs v
    (Hutchinson, 1990), all weights at once, as their cross terms vanish on average.

    A weight on which no float output depends is left out.

    Args:
        lifted: the model; all of its parameters are set to take gradients.
        feeds: one batch.
        objective: summed over all positions that count; it is differentiated twice.
        weights: names of initializers.
        probes: random sign vectors, each one double backward run.
        seed: of the signs.
        padding: which positions do not count.
        sizes: by weight, about how large its trace is; all alike by default. Signs are scaled by
            the inverse root, so that cross terms with weights of large traces do not drown those of small
            ones; the estimate stays unbiased.

    Raises:
        UnsupportedError: no output is a float tensor that depends on the weights.
    """
    modules = dict(lifted.module.named_parameters())
    named = [name for name in dict.fromkeys(weights) if name in lifted.parameters]
    parameters = [modules[lifted.parameters[name]] for name in named]
    found = recorded(lifted, feeds, ())
    total = counted(objective.value(found.outputs, found.given), padding or Padding(), feeds)
    first = torch.autograd.grad(total, parameters, create_graph=True, allow_unused=True)
    traces = {name: 0.0 for name, gradient in zip(named, first, strict=True) if gradient is not None}
    curved = [at for at, gradient in enumerate(first) if gradient is not None and gradient.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    scales = _scales([(sizes or {}).get(named[at], 1.0) for at in curved])
    for _ in range(probes if curved else 0):
        signs = [_signs(parameters[at], generator) * scale for at, scale in zip(curved, scales, strict=True)]
        second = torch.autograd.grad(
            [first[at] for at in curved],
            [parameters[at] for at in curved],
            signs,
            retain_graph=True,
            allow_unused=True,
        )
        for at, sign, own, scale in zip(curved, signs, second, scales, strict=True):
            traces[named[at]] += 0.0 if own is None else float((own * sign).sum()) / (probes * scale**2)
    return traces


def _scales(sizes: Sequence[float]) -> list[float]:
    largest = max(map(abs, sizes), default=0.0) or 1.0
    return [max(abs(size) / largest, _SMALLEST) ** -0.5 for size in sizes]


def _signs(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    drawn = torch.randint(2, like.shape, generator=generator)
    return (drawn.to(like.dtype) * 2 - 1).to(like.device)
