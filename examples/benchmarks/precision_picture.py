# SPDX-License-Identifier: Apache-2.0
"""A signal's scores and the bits that they buy, along the depth of models: one SVG picture."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from splitfold.passes.allocation import Allocation
from splitfold.passes.plan import PrecisionPlan

__all__ = ["Panel", "depth_picture", "panel"]

WIDTH, LEFT, RIGHT, TITLE, GAP = 860, 60, 12, 34, 12
SCORES, BITS, NAMES = 110, 80, 128
"""Heights of the parts of a panel: scores, bits, names of layers."""
HIGHEST = 8
LINE, DOT, BAR, GRID, INK = "#2c5f8a", "#2c5f8a", "#e0a458", "#dddddd", "#222222"


@dataclass(frozen=True)
class Panel:
    """One model.

    Attributes:
        title: above it.
        layers: names, in the order of execution.
        scores: of each, drawn on a logarithmic axis; 0 is drawn at its foot.
        bits: of each layer's weights.
    """

    title: str
    layers: tuple[str, ...]
    scores: tuple[float, ...]
    bits: tuple[int, ...]


def panel(title: str, allocation: Allocation, plan: PrecisionPlan) -> Panel:
    """The panel of a plan."""
    layers = [layer.name for layer in allocation.subject.layers]
    return Panel(
        title,
        tuple(layers),
        tuple(allocation.scores.by_layer[name] for name in layers),
        tuple(plan.precisions[name].weight_bits for name in layers),
    )


def depth_picture(panels: Sequence[Panel], signal: str) -> str:
    """Return the SVG file; the same panels give the same text."""
    height = TITLE + SCORES + GAP + BITS + NAMES
    body = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height * len(panels)}" '
        'font-family="sans-serif" font-size="10">',
        f'<rect width="{WIDTH}" height="{height * len(panels)}" fill="white"/>',
    ]
    for position, one in enumerate(panels):
        body += [f'<g transform="translate(0 {position * height})">', *_drawn(one, signal), "</g>"]
    return "\n".join([*body, "</svg>"]) + "\n"


def _drawn(one: Panel, signal: str) -> list[str]:
    count = len(one.layers)
    step = (WIDTH - LEFT - RIGHT) / count
    across = [LEFT + step * (at + 0.5) for at in range(count)]
    top, foot = TITLE + SCORES + GAP, TITLE + SCORES + GAP + BITS
    return [
        f'<text x="{LEFT}" y="18" font-size="13" fill="{INK}">{html.escape(one.title)}</text>',
        *_score_lines(one, across, signal),
        *_bit_bars(one, across, step, foot),
        f'<text x="14" y="{(top + foot) / 2}" transform="rotate(-90 14 {(top + foot) / 2})" '
        'text-anchor="middle">bits</text>',
        *(
            f'<text x="{x + 3:.1f}" y="{foot + 8}" transform="rotate(-60 {x + 3:.1f} {foot + 8})" '
            f'text-anchor="end">{html.escape(short(name))}</text>'
            for x, name in zip(across, one.layers, strict=True)
        ),
    ]


def _score_lines(one: Panel, across: Sequence[float], signal: str) -> list[str]:
    logs = [math.log10(score) for score in one.scores if score > 0] or [0.0]
    low, high = math.floor(min(logs)), math.ceil(max(logs))
    high = max(high, low + 1)

    def down(value: float) -> float:
        return TITLE + SCORES * (1 - (value - low) / (high - low))

    made = []
    for power in range(low, high + 1):
        y = down(power)
        made += [
            f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="{GRID}"/>',
            f'<text x="{LEFT - 5}" y="{y + 3:.1f}" text-anchor="end">1e{power}</text>',
        ]
    points = [
        (x, down(math.log10(score) if score > 0 else low))
        for x, score in zip(across, one.scores, strict=True)
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    middle = TITLE + SCORES / 2
    return [
        *made,
        f'<polyline points="{line}" fill="none" stroke="{LINE}" stroke-width="1.5"/>',
        *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{DOT}"/>' for x, y in points),
        f'<text x="14" y="{middle}" transform="rotate(-90 14 {middle})" text-anchor="middle">'
        f"{html.escape(signal)}</text>",
    ]


def _bit_bars(one: Panel, across: Sequence[float], step: float, foot: float) -> list[str]:
    made = []
    for bits in (2, 4, HIGHEST):
        y = foot - BITS * bits / HIGHEST
        made += [
            f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="{GRID}"/>',
            f'<text x="{LEFT - 5}" y="{y + 3:.1f}" text-anchor="end">{bits}</text>',
        ]
    width = 0.7 * step
    for x, bits in zip(across, one.bits, strict=True):
        tall = BITS * bits / HIGHEST
        made.append(
            f'<rect x="{x - width / 2:.1f}" y="{foot - tall:.1f}" width="{width:.1f}" height="{tall:.1f}" '
            f'fill="{BAR}"/>'
        )
        made.append(f'<text x="{x:.1f}" y="{foot - tall + 10:.1f}" text-anchor="middle">{bits}</text>')
    return made


def short(name: str) -> str:
    """A layer's name from its number on: ``encoder.layer.0.attention.self.query`` ->
    ``0.attention.self.query``; the last part where there is no number."""
    parts = name.split(".")
    at = next((place for place, part in enumerate(parts[:-1]) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[at:])
