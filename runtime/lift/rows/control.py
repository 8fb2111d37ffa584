# SPDX-License-Identifier: Apache-2.0
"""If, Loop and Scan; a subgraph is (module, the values of the graphs around that it reads)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from splitfold.runtime.errors import UnsupportedError
from splitfold.runtime.lift.carried import integers
from splitfold.runtime.lift.row import Extra, Row, Rows

__all__ = ["ROWS"]

Subgraph = tuple[torch.nn.Module, tuple[Any, ...]]


def if_(condition: Any, *, then_branch: Subgraph, else_branch: Subgraph) -> tuple[Any, ...]:
    """If."""
    module, captured = then_branch if bool(np.asarray(condition).item()) else else_branch
    found: tuple[Any, ...] = module(*captured)
    return found


def loop(
    trips: Any, condition: Any, *states: Any, body: Subgraph, outputs: int, anchor: Tensor
) -> tuple[Any, ...]:
    """Loop: final states, then what each trip gives, stacked."""
    module, captured = body
    most = None if trips is None else integers(trips)[0]
    going = condition is None or bool(np.asarray(condition).item())
    rows: list[list[Tensor]] = [[] for _ in range(outputs - len(states))]
    trip = 0
    while going and (most is None or trip < most):
        count = torch.tensor(trip, device=anchor.device)
        more, *found = module(*captured, count, torch.tensor(True, device=anchor.device), *states)
        states = tuple(found[: len(states)])
        for row, value in zip(rows, found[len(states) :], strict=False):
            row.append(value)
        going, trip = bool(more), trip + 1
    if not trip and rows:
        raise UnsupportedError("a Loop that makes no trip: the shapes of its scan outputs are not known.")
    return (*states, *(torch.stack(row) for row in rows))


def scan(
    *values: Any,
    body: Subgraph,
    num_scan_inputs: int,
    scan_input_axes: tuple[int, ...] | None = None,
    scan_input_directions: tuple[int, ...] | None = None,
    scan_output_axes: tuple[int, ...] | None = None,
    scan_output_directions: tuple[int, ...] | None = None,
) -> tuple[Any, ...]:
    """Scan, opset 9: final states, then what each step gives, stacked."""
    module, captured = body
    states, inputs = values[: len(values) - num_scan_inputs], values[len(values) - num_scan_inputs :]
    axes = scan_input_axes or (0,) * num_scan_inputs
    backward = scan_input_directions or (0,) * num_scan_inputs
    steps = [
        tuple(reversed(value.unbind(axis))) if back else value.unbind(axis)
        for value, axis, back in zip(inputs, axes, backward, strict=True)
    ]
    rows: list[tuple[Any, ...]] = []
    for items in zip(*steps, strict=True):
        found = module(*captured, *states, *items)
        states = found[: len(states)]
        rows.append(found[len(states) :])
    gathered = list(zip(*rows, strict=True))
    out_axes = scan_output_axes or (0,) * len(gathered)
    flipped = scan_output_directions or (0,) * len(gathered)
    stacks = [
        torch.stack(tuple(reversed(row)) if back else row, axis)
        for row, axis, back in zip(gathered, out_axes, flipped, strict=True)
    ]
    return (*states, *stacks)


ROWS: Rows = {
    "If": Row(if_, host=(0,), many=True),
    "Loop": Row(loop, host=(0, 1), many=True, extras=(Extra.OUTPUTS, Extra.ANCHOR)),
    "Scan": Row(scan, many=True, since=9),
}
