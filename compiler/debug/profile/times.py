# SPDX-License-Identifier: Apache-2.0
"""Where a model's time goes, by the user's layers; of two models, layer by layer, side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from splitfold.compiler.debug.profile.kernel_groups import KernelGroup, ProfiledModel, group_kernels
from splitfold.compiler.debug.profile.kernels import Kernel
from splitfold.runtime.errors import UnsupportedError
from splitfold.runtime.feeds import Feeds, check_feeds
from splitfold.runtime.profile import Trace, trace
from splitfold.runtime.target import Target

__all__ = ["ModelTime", "OperatorTime", "Profile", "ProfileRow", "RowTime", "profile"]

_LEAST_RATIO = 1.1
"""Beyond it one of two times counts as longer: medians of equal kernels lie within a few percent."""
_LEAST_SHARE = 0.002
"""Share of the model's time below which a difference is not worth a word."""
_SHOWN_SHARE = 0.08
"""Share of a row's time from which an operator is named."""


@dataclass(frozen=True)
class OperatorTime:
    """All kernels of one operator type: how many there are, and their microseconds a run."""

    operator: str
    count: int
    microseconds: float


@dataclass(frozen=True)
class RowTime:
    """What one model spends on a row.

    Attributes:
        microseconds: a run, all kernels of the row.
        operators: that ran, the longest first.
        low_bit: whether one of them computes in low precision.
    """

    microseconds: float
    operators: tuple[OperatorTime, ...]
    low_bit: bool

    def named(self) -> str:
        """Return the operators that make up the time, such as ``DequantizeLinear + Conv``."""
        floor = self.microseconds * _SHOWN_SHARE
        kept = [item.operator for item in self.operators if item.microseconds >= floor]
        return " + ".join(kept or [item.operator for item in self.operators[:1]])


@dataclass(frozen=True)
class ProfileRow:
    """The finest group of layers whose kernels can be told apart in all models that are compared.

    Attributes:
        layers: the user's names; empty for kernels that belong to none.
        before: the first model's time, None where it has no kernel for them.
        after: the second model's; None also where there is no second model.
    """

    layers: tuple[str, ...]
    before: RowTime | None
    after: RowTime | None

    @property
    def ratio(self) -> float | None:
        """The first model's time over the second's: above 1 the second is faster; None without both."""
        if self.before is None or self.after is None or not self.after.microseconds:
            return None
        return self.before.microseconds / self.after.microseconds


@dataclass(frozen=True)
class ModelTime:
    """One model as a whole; microseconds are medians over the runs.

    Attributes:
        kernels_us: sum over all kernels, which is the sum of the rows.
        run_us: wall time of a run under the profiler.
        outside_us: what of it is spent outside kernels.
        attributed: share of `kernels_us` in rows with layers.
        runs: timed runs.
        operators: by operator type, the longest first.
    """

    kernels_us: float
    run_us: float
    outside_us: float
    attributed: float
    runs: int
    operators: tuple[OperatorTime, ...]


@dataclass(frozen=True)
class Profile:
    """A profile of one model, or of two.

    Attributes:
        rows: in the order in which the first model runs.
        before: the first model.
        after: the second one, or None.
    """

    rows: tuple[ProfileRow, ...]
    before: ModelTime
    after: ModelTime | None

    def verdict(self, row: ProfileRow) -> str:
        """Return what the second model made of a row: ``2.1x faster: MatMulIntegerToFloat``; empty without
        one."""
        if self.after is None:
            return ""
        if row.after is None:
            return "no kernel of its own any more" if row.before is not None else ""
        name = row.after.named()
        if row.before is None:
            return f"new: {name}"
        before, after = row.before.microseconds, row.after.microseconds
        if abs(before - after) < _LEAST_SHARE * self.before.kernels_us:
            return f"as fast: {name}"
        if before > after * _LEAST_RATIO:
            return f"{before / after:.1f}x faster: {name}"
        if after > before * _LEAST_RATIO:
            where = "" if row.after.low_bit or not _converts(row.after) else " in float"
            slower = f"{after / before:.1f}x slower" if before else "slower"
            return f"{slower}: {name}{where}"
        return f"as fast: {name}"


def _converts(time: RowTime) -> bool:
    return any("uantizeLinear" in item.operator for item in time.operators)


def profile(
    model: ir.Model,
    other: ir.Model | None = None,
    *,
    feeds: Feeds,
    runs: int = 30,
    threads: int = 0,
    target: Target | None = None,
) -> Profile:
    """Profile one model as deployed, or two side by side, and return the time of each layer.

    Layers that one of the models computes in one kernel share a row.

    Args:
        model: it, or the first of the two; not changed.
        other: a second model with the same inputs.
        feeds: inputs of both.
        runs: timed runs of each, interleaved.
        threads: intra-operator threads; 0 is the runtime's choice.
        target: where they run.

    Raises:
        UnsupportedError: `other` takes other inputs than `feeds`.
        SessionError: a model does not open or does not run.
    """
    place = target or Target.cpu()
    models = [ProfiledModel(item) for item in (model, other) if item is not None]
    _check_inputs(models, feeds)
    traces = trace([item.model for item in models], feeds, runs=runs, threads=threads, target=place)
    for item, found in zip(models, traces, strict=True):
        item.add_times(found)
    rows = tuple(_row(layers, group, models, place) for layers, group in group_kernels(models).items())
    before = _model_time(models[0], traces[0], ((bool(row.layers), row.before) for row in rows))
    if other is None:
        return Profile(rows, before, None)
    return Profile(
        rows, before, _model_time(models[1], traces[1], ((bool(row.layers), row.after) for row in rows))
    )


def _check_inputs(models: Sequence[ProfiledModel], feeds: Feeds) -> None:
    for position, item in enumerate(models):
        try:
            check_feeds(item.model, feeds)
        except ValueError as error:
            which = "the second model takes other inputs than the first: " if position else ""
            raise UnsupportedError(f"{which}{error}") from error


def _row(
    layers: tuple[str, ...], group: KernelGroup, models: Sequence[ProfiledModel], target: Target
) -> ProfileRow:
    sides = [
        _row_time(group.kernels[at], model, target) if at in group.kernels else None
        for at, model in enumerate(models)
    ]
    return ProfileRow(layers, sides[0], sides[1] if len(sides) > 1 else None)


def _row_time(kernels: Sequence[Kernel], model: ProfiledModel, target: Target) -> RowTime:
    operators = _by_operator(kernels, model)
    low_bit = any(item.operator in target.low_bit_kernels for item in operators)
    return RowTime(sum(model.times[kernel] for kernel in kernels), operators, low_bit)


def _by_operator(kernels: Iterable[Kernel], model: ProfiledModel) -> tuple[OperatorTime, ...]:
    times: dict[str, list[float]] = {}
    for kernel in kernels:
        times.setdefault(kernel.node.op_type, []).append(model.times[kernel])
    found = [OperatorTime(name, len(spent), sum(spent)) for name, spent in times.items()]
    return tuple(sorted(found, key=lambda item: -item.microseconds))


def _model_time(
    model: ProfiledModel, found: Trace, sides: Iterable[tuple[bool, RowTime | None]]
) -> ModelTime:
    total = sum(model.times.values())
    named = sum(side.microseconds for has_layers, side in sides if has_layers and side is not None)
    share = named / total if total else 1.0
    operators = _by_operator(model.times, model)
    return ModelTime(total, found.run_us, found.outside_us, share, found.runs, operators)
