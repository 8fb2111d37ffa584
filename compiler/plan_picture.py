# SPDX-License-Identifier: Apache-2.0
"""The Pareto front of a plan as an SVG picture: size against expected loss."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from splitfold.passes.allocation import Allocation
from splitfold.passes.plan import PrecisionPlan

__all__ = ["front_picture"]

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 640, 400, 84, 52, 36, 20
_TICKS = 5
_POINTS = 400


def front_picture(allocation: Allocation, plan: PrecisionPlan | None = None, title: str = "") -> str:
    """Return an SVG file of the front, the sizes of the model in MB, losses on a logarithmic axis; `plan` is
    marked. The same front gives the same text."""
    points = _points(allocation)
    marked = [] if plan is None else [((plan.bytes + allocation.rest_bytes) / 1e6, plan.loss)]
    drawn = [(x, math.log10(y)) for x, y in (*points, *marked) if y > 0]
    if not drawn:
        drawn = [(x, 0.0) for x, _ in points] or [(0.0, 0.0)]
    x_range, y_range = _range([x for x, _ in drawn]), _range([y for _, y in drawn])

    def place(x: float, y: float) -> str:
        return f"{_across(x, x_range):.1f},{_down(y, y_range):.1f}"

    line = " ".join(place(x, math.log10(y)) for x, y in points if y > 0)
    dots = [_dot(_across(x, x_range), _down(math.log10(y), y_range)) for x, y in marked if y > 0]
    body = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_WIDTH / 2}" y="20" text-anchor="middle" font-size="14">{html.escape(title)}</text>',
        *_axes(x_range, y_range),
        f'<polyline points="{line}" fill="none" stroke="#2c5f8a" stroke-width="2"/>',
        *dots,
        "</svg>",
    ]
    return "\n".join(filter(None, body)) + "\n"


def _points(allocation: Allocation) -> list[tuple[float, float]]:
    front = allocation.front
    step = max(1, len(front) // _POINTS)
    chosen = sorted({*range(0, len(front), step), len(front) - 1})
    return [
        ((float(front.sizes[at]) + allocation.rest_bytes) / 1e6, float(front.losses[at])) for at in chosen
    ]


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _across(x: float, ends: tuple[float, float]) -> float:
    return _LEFT + (x - ends[0]) / (ends[1] - ends[0]) * (_WIDTH - _LEFT - _RIGHT)


def _down(y: float, ends: tuple[float, float]) -> float:
    return _HEIGHT - _BOTTOM - (y - ends[0]) / (ends[1] - ends[0]) * (_HEIGHT - _BOTTOM - _TOP)


def _dot(across: float, down: float) -> str:
    return f'<circle cx="{across:.1f}" cy="{down:.1f}" r="5" fill="#c0392b"/>'


def _axes(x_range: tuple[float, float], y_range: tuple[float, float]) -> list[str]:
    made = []
    for tick in range(_TICKS):
        share = tick / (_TICKS - 1)
        x = x_range[0] + share * (x_range[1] - x_range[0])
        y = y_range[0] + share * (y_range[1] - y_range[0])
        across, down = _across(x, x_range), _down(y, y_range)
        made += [
            f'<line x1="{across:.1f}" y1="{_TOP}" x2="{across:.1f}" y2="{_HEIGHT - _BOTTOM}" stroke="#ddd"/>',
            f'<text x="{across:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{x:.4g}</text>',
            f'<line x1="{_LEFT}" y1="{down:.1f}" x2="{_WIDTH - _RIGHT}" y2="{down:.1f}" stroke="#ddd"/>',
            f'<text x="{_LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{10**y:.2g}</text>',
        ]
    middle = (_HEIGHT - _BOTTOM + _TOP) / 2
    below = f'x="{(_WIDTH + _LEFT) / 2}" y="{_HEIGHT - 12}"'
    beside = f'x="18" y="{middle}" transform="rotate(-90 18 {middle})"'
    made.append(f'<text {below} text-anchor="middle">weights of the model, MB</text>')
    made.append(f'<text {beside} text-anchor="middle">expected loss</text>')
    return made
