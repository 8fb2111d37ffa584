# SPDX-License-Identifier: Apache-2.0
"""Which layers a quantization pass takes up, and for which reasons it leaves the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import onnx_ir as ir

from splitfold.passes.base import Findings, LayerPass
from splitfold.passes.layers import Layer, LayerKind, find_layers

__all__ = ["accurate_layers", "candidate_layers"]


def candidate_layers(
    step: LayerPass,
    model: ir.Model,
    findings: Findings,
    reason_against: Callable[[Layer], str | None],
    *,
    others: Iterable[str] = (),
) -> list[Layer]:
    """Return the MatMul, Gemm and Conv layers that `step` may take up, and record why it takes up none of the
    others.

    Args:
        step: the pass, for the user's patterns.
        model: model to look through, subgraphs included.
        findings: where the skipped layers go.
        reason_against: why a layer does not fit the pass's carrier, or None.
        others: names of what the pass takes up besides, which the user's patterns may mean too.

    Raises:
        SpecError: a pattern of the user matches no layer.
    """
    layers, refused = find_layers(model)
    step.check_patterns([*(layer.name for layer in layers), *(name for name, _ in refused), *others])
    findings.skipped.extend(refused)
    kept = []
    for layer in layers:
        if layer.kind is LayerKind.EMBEDDING:
            continue
        reason = step.unwanted(*layer.addresses) or reason_against(layer)
        if reason is None:
            kept.append(layer)
        else:
            findings.skip(layer.name, reason)
    return kept


def accurate_layers(
    layers: Sequence[Layer], measured: Mapping[str, float], min_sqnr: float, form: str, findings: Findings
) -> list[Layer]:
    """Return the layers whose measured SQNR (dB by layer name) reaches `min_sqnr`, and record the others and
    what was measured.

    `form` says for the reader what was measured, such as "static int8".
    """
    findings.measured.update(measured)
    kept = []
    for layer in layers:
        found = measured.get(layer.name, float("inf"))
        if found >= min_sqnr:
            kept.append(layer)
        else:
            findings.skip(
                layer.name, f"its {form} output has {found:.1f} dB SQNR, below min-sqnr={min_sqnr:g}"
            )
    return kept
