# SPDX-License-Identifier: Apache-2.0
"""The operators that the runtime really runs, before and after, and which provider runs them."""

from __future__ import annotations

from splitfold.compiler.debug.report.data import OperatorRow
from splitfold.compiler.debug.report.side import Side
from splitfold.compiler.inspection import operator_counts
from splitfold.runtime.target import Target

__all__ = ["operator_rows"]


def operator_rows(before: Side, after: Side, target: Target) -> tuple[OperatorRow, ...]:
    """Return the operators of the runtime's own graphs, most frequent first; of the models as written, where
    the runtime cannot open one of them."""
    opened = before.runtime is not None and after.runtime is not None
    was = operator_counts(before.runtime if opened and before.runtime is not None else before.model)
    now = operator_counts(after.runtime if opened and after.runtime is not None else after.model)
    names = sorted({*was, *now}, key=lambda name: (-now.get(name, 0), -was.get(name, 0), name))
    provider = target.provider.removesuffix("ExecutionProvider") if opened else ""
    return tuple(
        OperatorRow(
            name,
            was.get(name, 0),
            now.get(name, 0),
            provider,
            name.rpartition("::")[2] in target.low_bit_kernels,
        )
        for name in names
    )
