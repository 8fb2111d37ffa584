# SPDX-License-Identifier: Apache-2.0
"""Recurrent networks: RNN, GRU and LSTM, step by step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from splitfold.runtime.lift.row import Row, Rows

__all__ = ["ROWS"]

Activation = Callable[[Tensor], Tensor]
State = tuple[Tensor, ...]
Step = Callable[[Tensor, State], State]
"""Takes the projected input of one step [batch, gates * hidden] and states [batch, hidden]."""
Numbers = tuple[float, ...]


@dataclass(frozen=True)
class _Options:
    """The attributes that all three share."""

    hidden: int
    direction: str
    layout: int
    clip: float | None
    functions: list[Activation]

    def limited(self, x: Tensor) -> Tensor:
        """Return the input of an activation, clipped where asked for."""
        return x if self.clip is None else x.clamp(-self.clip, self.clip)


_PLAIN: dict[str, Activation] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "softsign": F.softsign,
    "softplus": F.softplus,
}
_ONE: dict[str, tuple[Callable[[Tensor, float], Tensor], float]] = {
    "leakyrelu": (F.leaky_relu, 0.01),
    "elu": (F.elu, 1.0),
    "thresholdedrelu": (lambda x, alpha: torch.where(x > alpha, x, torch.zeros_like(x)), 1.0),
}
_TWO: dict[str, tuple[Callable[[Tensor, float, float], Tensor], float, float]] = {
    "affine": (lambda x, alpha, beta: alpha * x + beta, 1.0, 0.0),
    "scaledtanh": (lambda x, alpha, beta: alpha * torch.tanh(beta * x), 1.0, 1.0),
    "hardsigmoid": (lambda x, alpha, beta: torch.clamp(alpha * x + beta, 0, 1), 0.2, 0.5),
}


def _activations(names: tuple[str, ...], alphas: Numbers | None, betas: Numbers | None) -> list[Activation]:
    """Return the functions of these names; each takes the next alpha and beta, if it has one."""
    alpha, beta = iter(alphas or ()), iter(betas or ())
    return [_activation(name.lower(), alpha, beta) for name in names]


def _activation(name: str, alpha: Iterator[float], beta: Iterator[float]) -> Activation:
    if name in _ONE:
        one, usual = _ONE[name]
        return functools.partial(_with_one, one, next(alpha, usual))
    if name in _TWO:
        two, first, second = _TWO[name]
        return functools.partial(_with_two, two, next(alpha, first), next(beta, second))
    return _PLAIN[name]


def _with_one(function: Callable[[Tensor, float], Tensor], alpha: float, x: Tensor) -> Tensor:
    return function(x, alpha)


def _with_two(
    function: Callable[[Tensor, float, float], Tensor], alpha: float, beta: float, x: Tensor
) -> Tensor:
    return function(x, alpha, beta)


def _run(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    lengths: Tensor | None,
    initial: list[Tensor | None],
    options: _Options,
    step_of: Callable[[int, list[Activation]], Step],
) -> tuple[Tensor, ...]:
    """Run all directions; return (all hidden states, then the last of each state)."""
    if options.layout:
        x = x.transpose(0, 1)
        initial = [None if state is None else state.transpose(0, 1) for state in initial]
    directions = len(w)
    zeros = x.new_zeros(directions, x.shape[1], options.hidden)
    starts = [zeros if state is None else state for state in initial]
    each = len(options.functions) // directions
    rows, lasts = [], []
    for index in range(directions):
        functions = options.functions[index * each : (index + 1) * each]
        projected = F.linear(x, w[index], None if b is None else b[index, : w.shape[1]])
        backward = options.direction == "reverse" or index == 1
        states = tuple(start[index] for start in starts)
        outputs, last = _run_direction(projected, states, lengths, step_of(index, functions), backward)
        rows.append(outputs)
        lasts.append(last)
    all_hidden = torch.stack(rows, 1)  # [time, directions, batch, hidden]
    final = [torch.stack(state) for state in zip(*lasts, strict=True)]
    if options.layout:
        return all_hidden.permute(2, 0, 1, 3), *(state.transpose(0, 1) for state in final)
    return all_hidden, *final


def _run_direction(
    projected: Tensor, states: State, lengths: Tensor | None, step: Step, backward: bool
) -> tuple[Tensor, State]:
    times = range(len(projected))
    outputs: list[Tensor] = []
    for time in reversed(times) if backward else times:
        found = step(projected[time], states)
        shown = found[0]
        if lengths is not None:
            inside = (time < lengths).unsqueeze(1)
            found = tuple(torch.where(inside, new, old) for new, old in zip(found, states, strict=True))
            shown = torch.where(inside, shown, torch.zeros_like(shown))
        states = found
        outputs.append(shown)
    return torch.stack(outputs[::-1] if backward else outputs), states


def lstm(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    initial_h: Tensor | None = None,
    initial_c: Tensor | None = None,
    peepholes: Tensor | None = None,
    *,
    activation_alpha: Numbers | None = None,
    activation_beta: Numbers | None = None,
    activations: tuple[str, ...] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    input_forget: int = 0,
    layout: int = 0,
) -> tuple[Tensor, ...]:
    """LSTM, opset 7, gates in the order input, output, forget, cell: (all hidden, last hidden, last cell)."""
    hidden = r.shape[-1]
    functions = _activations(
        activations or ("Sigmoid", "Tanh", "Tanh") * len(w), activation_alpha, activation_beta
    )
    options = _Options(hidden, direction, layout, clip, functions)

    def step_of(index: int, functions: list[Activation]) -> Step:
        f, g, h = functions
        bias = None if b is None else b[index, 4 * hidden :]
        peep = (0, 0, 0) if peepholes is None else torch.split(peepholes[index], hidden)

        def step(projected: Tensor, state: State) -> State:
            old_h, old_c = state
            i, o, forget, c = torch.split(projected + F.linear(old_h, r[index], bias), hidden, -1)
            i = f(options.limited(i + peep[0] * old_c))
            forget = 1 - i if input_forget else f(options.limited(forget + peep[2] * old_c))
            new_c = forget * old_c + i * g(options.limited(c))
            o = f(options.limited(o + peep[1] * new_c))
            return o * h(new_c), new_c

        return step

    return _run(x, w, b, lengths, [initial_h, initial_c], options, step_of)


def gru(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    activation_alpha: Numbers | None = None,
    activation_beta: Numbers | None = None,
    activations: tuple[str, ...] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
    linear_before_reset: int = 0,
) -> tuple[Tensor, ...]:
    """GRU, opset 7, gates in the order update, reset, hidden: (all hidden, last hidden)."""
    hidden = r.shape[-1]
    functions = _activations(activations or ("Sigmoid", "Tanh") * len(w), activation_alpha, activation_beta)
    options = _Options(hidden, direction, layout, clip, functions)

    def step_of(index: int, functions: list[Activation]) -> Step:
        f, g = functions
        gates, last = torch.split(r[index], [2 * hidden, hidden])
        biases: Any = (None, None) if b is None else torch.split(b[index, 3 * hidden :], [2 * hidden, hidden])

        def step(projected: Tensor, state: State) -> State:
            (old,) = state
            given, given_h = torch.split(projected, [2 * hidden, hidden], -1)
            both = f(options.limited(given + F.linear(old, gates, biases[0])))
            update, reset = torch.split(both, hidden, -1)
            if linear_before_reset:
                inner = reset * F.linear(old, last, biases[1])
            else:
                inner = F.linear(reset * old, last, biases[1])
            return ((1 - update) * g(options.limited(given_h + inner)) + update * old,)

        return step

    return _run(x, w, b, lengths, [initial_h], options, step_of)


def rnn(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    activation_alpha: Numbers | None = None,
    activation_beta: Numbers | None = None,
    activations: tuple[str, ...] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
) -> tuple[Tensor, ...]:
    """RNN, opset 7: (all hidden, last hidden)."""
    hidden = r.shape[-1]
    functions = _activations(activations or ("Tanh",) * len(w), activation_alpha, activation_beta)
    options = _Options(hidden, direction, layout, clip, functions)

    def step_of(index: int, functions: list[Activation]) -> Step:
        bias = None if b is None else b[index, hidden:]

        def step(projected: Tensor, state: State) -> State:
            return (functions[0](options.limited(projected + F.linear(state[0], r[index], bias))),)

        return step

    return _run(x, w, b, lengths, [initial_h], options, step_of)


ROWS: Rows = {
    "GRU": Row(gru, many=True, since=7),
    "LSTM": Row(lstm, many=True, since=7),
    "RNN": Row(rnn, many=True, since=7),
}
