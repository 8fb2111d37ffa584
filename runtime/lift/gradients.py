# SPDX-License-Identifier: Apache-2.0
"""Derivatives of a target by the outputs, by inner values and by weights of a lifted model."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.fx

from splitfold.runtime.errors import UnsupportedError
from splitfold.runtime.feeds import Feeds
from splitfold.runtime.lift.lifted import ORIGIN, Lifted
from splitfold.runtime.padding import Padding

__all__ = [
    "Objective",
    "Recorded",
    "counted",
    "recorded",
    "squared_weight_gradients",
    "starting",
    "value_gradients",
]


class Objective(Protocol):
    """A differentiable function of a model's outputs."""

    def value(self, outputs: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
        """Return a float tensor of numbers to be added up."""


def starting(
    outputs: Mapping[str, torch.Tensor],
    given: Mapping[str, Any],
    target: Objective,
    padding: Padding,
    feeds: Feeds,
) -> dict[str, torch.Tensor]:
    """Return the derivative of `target`, summed over what counts, by each output, in its shape."""
    leaves = {name: output.detach().requires_grad_() for name, output in outputs.items()}
    with torch.enable_grad():
        total = counted(target.value(leaves, given), padding, feeds)
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }


def counted(values: torch.Tensor, padding: Padding, feeds: Feeds) -> torch.Tensor:
    """Return the sum of the numbers at positions that are not padding."""
    places = padding.without(
        {name: np.asarray(array) for name, array in feeds.items()},
        np.arange(values.numel()).reshape(tuple(values.shape)),
    )
    return values.flatten()[torch.from_numpy(places.reshape(-1)).to(values.device)].sum()


def value_gradients(
    lifted: Lifted,
    feeds: Feeds,
    objective: Objective,
    names: Sequence[str],
    padding: Padding | None = None,
) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """Return (value, derivative of the objective by it) for inner values by ONNX name, from one run forward
    and one backward.

    The derivative is None where no float output depends on the value by float operators, or the value on no
    weight; a name that is no computed value is left out.

    Args:
        lifted: the model; all of its parameters are set to take gradients.
        feeds: one batch.
        objective: summed over all positions that count.
        names: of the top-level graph.
        padding: which positions do not count.

    Raises:
        UnsupportedError: no output is a float tensor that depends on the weights.
    """
    known = [name for name in dict.fromkeys(names) if name in lifted.values]
    found = recorded(lifted, feeds, known)
    total = counted(objective.value(found.outputs, found.given), padding or Padding(), feeds)
    leading = [name for name in known if found.values[name].requires_grad]
    gradients = torch.autograd.grad(total, [found.values[name] for name in leading], allow_unused=True)
    by_name = dict(zip(leading, gradients, strict=True))
    return {name: (found.values[name].detach(), by_name.get(name)) for name in known}


@dataclass(frozen=True)
class Recorded:
    """A run whose values carry the graph of their derivatives.

    Attributes:
        values: by ONNX name, of those that were asked for.
        outputs: float outputs that depend on the weights, by name.
        given: inputs by name.
    """

    values: Mapping[str, torch.Tensor]
    outputs: Mapping[str, torch.Tensor]
    given: Mapping[str, Any]


def recorded(lifted: Lifted, feeds: Feeds, names: Sequence[str]) -> Recorded:
    """Run a model, all of whose parameters take gradients from then on, and return values by ONNX name.

    Raises:
        UnsupportedError: no output is a float tensor that depends on the weights.
    """
    for parameter in lifted.module.parameters():
        parameter.requires_grad_(True)
    given = dict(zip(lifted.inputs, lifted.arguments(feeds), strict=True))
    outputs = [name for name in lifted.outputs if name in lifted.values]
    with torch.enable_grad():
        values = lifted.record(given, {*names, *outputs})
    ends = {name: values[name] for name in outputs}
    ends = {name: end for name, end in ends.items() if isinstance(end, torch.Tensor) and end.requires_grad}
    if not ends:
        raise UnsupportedError(
            f"no output of the model ({', '.join(lifted.outputs)}) is computed from its weights by float "
            "operators alone: there is nothing for relevance or gradients to start from."
        )
    return Recorded(values, ends, given)


def squared_weight_gradients(
    lifted: Lifted, output: str, x: torch.Tensor, gradient: torch.Tensor, samples: int
) -> torch.Tensor:
    """Return the square of each sample's derivative by a layer's weight, summed over the samples, in the
    weight's shape: the diagonal of the empirical Fisher information, times the samples.

    Args:
        lifted: the model.
        output: ONNX name of what the layer (MatMul, Gemm, or Conv with a constant weight) computes.
        x: what the layer reads, the first axis made of samples.
        gradient: derivative of the objective by what it computes.
        samples: in the batch; where the first axis is a multiple of it, a sample has several rows, and where
            it is not, each row counts as a sample.
    """
    node = next(node for node in lifted.module.graph.nodes if node.name == lifted.values[output])
    weight = _held(lifted, node.args[1])
    rows = samples if x.shape[0] % samples == 0 else x.shape[0]
    if node.meta[ORIGIN].op_type in ("MatMul", "Gemm"):
        return _matrix_squares(
            x.reshape(rows, -1, x.shape[-1]), gradient.reshape(rows, -1, gradient.shape[-1])
        )
    total = torch.zeros_like(weight)
    for at in range(rows):
        leaf = weight.detach().requires_grad_()
        with torch.enable_grad():
            made = node.target(x[at : at + 1], leaf, **node.kwargs)
        (own,) = torch.autograd.grad(made, leaf, gradient[at : at + 1])
        total += own.square()
    return total


_LARGEST = 2**24
"""Numbers of per-sample derivatives that are held at once."""


def _matrix_squares(x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Return the sum over samples of the squares of x^T g, from [samples, rows, k] and [samples, rows, n]."""
    if x.shape[1] == 1:
        return x[:, 0].square().T @ gradient[:, 0].square()
    step = max(_LARGEST // (x.shape[-1] * gradient.shape[-1]), 1)
    total = x.new_zeros(x.shape[-1], gradient.shape[-1])
    for at in range(0, len(x), step):
        total += (x[at : at + step].transpose(1, 2) @ gradient[at : at + step]).square_().sum(0)
    return total


def _held(lifted: Lifted, node: torch.fx.Node) -> torch.Tensor:
    found: torch.Tensor = operator.attrgetter(str(node.target))(lifted.module)
    return found
