# SPDX-License-Identifier: Apache-2.0
"""Outliers along the depth of a model, as an SVG picture."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from splitfold.compiler.debug.outliers.results import Outliers

__all__ = ["outliers_picture"]

_WIDTH, _LEFT, _ROW, _TOP, _BAR = 900, 330, 16, 64, 200
_GAP = 60
_NORMAL = 3.0


def outliers_picture(found: Outliers, title: str = "") -> str:
    """Return an SVG file: for each layer a bar for its infinity norm and one for its kurtosis, logarithmic,
    in order of the graph, and for each attention block the share of the first token, a cell a head.

    The same measurement gives the same text.
    """
    layers = list(found.by_layer().values())
    height = _TOP + _ROW * (len(layers) + len(found.attention) + 4)
    norms, kurtoses = [it.infinity_norm for it in layers], [it.kurtosis for it in layers]
    body = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" '
        'font-size="11">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        _text(_WIDTH / 2, 22, title, "middle", 14),
        _text(_LEFT, 46, f"infinity norm, up to {max(norms, default=0):.3g}"),
        _text(_LEFT + _BAR + _GAP, 46, f"kurtosis, up to {max(kurtoses, default=0):.3g} (normal: 3)"),
    ]
    for row, layer in enumerate(layers):
        y = _TOP + _ROW * row
        body += [
            _text(_LEFT - 8, y + 10, layer.layer, "end"),
            _bar(_LEFT, y, layer.infinity_norm, norms, "#2c5f8a"),
            _bar(_LEFT + _BAR + _GAP, y, layer.kurtosis, [_NORMAL, *kurtoses], "#b8532e"),
        ]
    y = _TOP + _ROW * (len(layers) + 2)
    if found.attention:
        body.append(_text(_LEFT, y - 6, "probability of the first token, a cell a head (white 0, black 1)"))
    for row, block in enumerate(found.attention):
        at = y + _ROW * row
        body.append(_text(_LEFT - 8, at + 10, f"{block.layer} ({block.first:.0%})", "end"))
        body += [_cell(_LEFT + 18 * head, at, share) for head, share in enumerate(block.heads)]
    return "\n".join([*body, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 11) -> str:
    return (
        f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" font-size="{size}">{html.escape(text)}</text>'
    )


def _bar(x: float, y: float, value: float, values: Sequence[float], colour: str) -> str:
    """Return a bar whose length is the place of `value` between the smallest and the largest, in decades."""
    positive = [it for it in values if it > 0]
    if value <= 0 or not positive:
        return ""
    low, high = math.log10(min(positive)) - 0.1, math.log10(max(positive))
    length = _BAR * (math.log10(value) - low) / max(high - low, 1e-9)
    return (
        f'<rect x="{x}" y="{y:.0f}" width="{max(length, 1):.1f}" height="{_ROW - 4}" fill="{colour}">'
        f"<title>{value:.4g}</title></rect>"
        f'<text x="{x + max(length, 1) + 4:.0f}" y="{y + 10:.0f}" fill="#555">{value:.3g}</text>'
    )


def _cell(x: float, y: float, share: float) -> str:
    shade = round(255 * (1 - min(max(share, 0.0), 1.0)))
    return (
        f'<rect x="{x}" y="{y:.0f}" width="16" height="{_ROW - 3}" fill="rgb({shade},{shade},{shade})" '
        f'stroke="#999"><title>{share:.3f}</title></rect>'
    )
