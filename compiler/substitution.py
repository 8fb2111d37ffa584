# SPDX-License-Identifier: Apache-2.0
"""`substitute`: put clipped or gated attention into a torch module, for a training loop of one's own."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from splitfold.compiler.errors import CaptureError, SubstitutionError
from splitfold.passes.base import Contract, Pass

if TYPE_CHECKING:
    from splitfold.compiler.traced.module import Module, TracedModule

__all__ = ["substitute"]

logger = logging.getLogger(__name__)


def substitute(
    module: Module, *steps: Pass, example_inputs: object, dynamic_shapes: object = None
) -> TracedModule:
    """Return a module that computes what passes make of `module`, to be trained in any loop.

    The module is traced with torch.export (torch.fx's own symbolic trace stops at sizes that depend on
    inputs, at masks and at most models of Hugging Face), as it trains, so that dropouts are kept. Its
    attention is found on its ONNX form, where the passes rewrite it, and what they add is put into the trace:
    `compile` of the trained module, and the passes on what `compile` makes of `module`, give the same graph.

    The result has the parameters and buffers of `module` under their names, copied, and new ones, such as
    ``blocks.0.attention.gate.weight``: `load_state_dict` of weights that were trained without takes
    ``strict=False``. `train` and `eval` switch all dropouts and batch norms; everything else is as `module`
    computes it while training, control flow included. Attention that torch computes in one function
    (`scaled_dot_product_attention`) stays so where a pass leaves it in one piece, as gates do, and is written
    out otherwise. It can be copied but not pickled: keep its `state_dict`.

    Args:
        module: traced in training mode, whatever its mode; it is left alone.
        steps: passes of `Contract.SEMANTIC`, such as `ClipSoftmaxPass` and `GateAttentionPass`, in order.
        example_inputs: a tuple, a mapping of keyword inputs, or ``(tuple, mapping)``; keyword inputs are
            given in the same order later.
        dynamic_shapes: dynamic axes, as `torch.export.export` takes them; other sizes are fixed.

    Raises:
        CaptureError: torch is missing or cannot trace the module, it draws random numbers other than by
            dropout, or it computes something else in training mode even without.
        SubstitutionError: a step is not about training, or none of them found anything to substitute; the
            message says why not.
        SpecError: a pattern of a step matches no layer.
    """
    try:
        from splitfold.compiler.traced.substitution import substituted
    except ImportError as error:
        raise CaptureError("substituting in a module needs torch: pip install 'splitfold[torch]'") from error
    wrong = next((step for step in steps if step.contract is not Contract.SEMANTIC), None)
    if not steps or wrong is not None:
        what = f"'{wrong}' is {wrong.contract.value}" if wrong is not None else "there is none"
        raise SubstitutionError(
            f"substitute takes passes that make another function of attention, to be trained: {what}."
        )
    made, records = substituted(module, steps, example_inputs, dynamic_shapes)
    for record in records:
        for layer, what in record.applied:
            logger.info("%s: %s", layer, what)
        for layer, reason in record.skipped:
            logger.warning("%s: left as it is by %s: %s", layer, record.text, reason)
    return made
