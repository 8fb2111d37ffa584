# SPDX-License-Identifier: Apache-2.0
"""Layer-wise relevance propagation: a lifted model walked backwards, each step by its rule."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from splitfold.runtime.errors import UnsupportedError
from splitfold.runtime.feeds import Array, Feeds
from splitfold.runtime.padding import Padding
from splitfold.runtime.relevance.composite import Composite
from splitfold.runtime.relevance.conservation import Balance, Flow
from splitfold.runtime.relevance.rule import Shares
from splitfold.runtime.relevance.sharing import Sharing
from splitfold.runtime.relevance.targets import EmbeddingNorm, Target

if TYPE_CHECKING:
    from splitfold.runtime.lift.lifted import Lifted

__all__ = ["Relevance", "propagate"]

Tensor = Any


@dataclass(frozen=True, eq=False)
class Relevance:
    """Relevance of one batch.

    Attributes:
        values: by ONNX value name, of those that were asked for and that relevance reached: an array in the
            value's shape. Of a product with a constant weight to whose output only a constant is added, it
            is that of the sum.
        reaching: names of all values that the explained outputs are computed from by float operators.
        balance: where the relevance went.
    """

    values: Mapping[str, Array]
    reaching: frozenset[str]
    balance: Balance


def propagate(
    lifted: Lifted,
    feeds: Feeds,
    *,
    target: Target | None = None,
    rules: Composite | None = None,
    names: Collection[str] = (),
    padding: Padding | None = None,
) -> Relevance:
    """Run a lifted model on one batch and propagate relevance from its outputs to its inputs.

    It starts as output times derivative of the target: for targets that scale with the outputs (a logit, a
    norm) its sum is the target's value, and what each rule passes on can be checked against it.

    Args:
        lifted: model in float.
        feeds: one batch by input name.
        target: what is explained; the norm of the first output where None.
        rules: by kind of operator; those of AttnLRP where None.
        names: ONNX values whose relevance is wanted.
        padding: positions that do not count in the target.

    Raises:
        UnsupportedError: no output is a float tensor that float operators compute from the inputs; or an
            operator on the way has no rule, and the message names it and its layer.
        ValueError: the target does not fit the outputs.
    """
    from splitfold.runtime.lift.gradients import starting
    from splitfold.runtime.lift.trace import Trace

    trace = Trace(lifted, feeds)
    ends = {name: node for name, node in trace.ends.items() if trace.is_active(node)}
    if not ends:
        raise UnsupportedError(
            f"no output of the model ({', '.join(lifted.outputs)}) is computed from its inputs by float "
            "operators alone: there is nothing for relevance or gradients to start from."
        )
    outputs = {name: trace.outputs[name] for name in ends}
    gradients = starting(outputs, trace.inputs, target or EmbeddingNorm(), padding or Padding(), feeds)
    walk = _Walk(Sharing(rules or Composite(), trace), frozenset(names))
    for name, node in ends.items():
        walk.add(node, outputs[name] * gradients[name])
    reaching = frozenset(trace.reaching())
    walk.run(trace)
    return Relevance(walk.kept, reaching, walk.balance())


class _Walk:
    """Relevance on its way, by node of the lifted graph."""

    def __init__(self, sharing: Sharing, names: frozenset[str]) -> None:
        self._sharing, self._names = sharing, names
        self._pending: dict[Any, Tensor] = {}
        self._parts: dict[Any, dict[int, Tensor]] = {}
        self._started = 0.0
        self._sources: dict[str, float] = {}
        self._flows: list[Flow] = []
        self.kept: dict[str, Array] = {}

    def add(self, node: Any, r: Tensor) -> None:
        self._started += float(r.double().sum())
        self._gather(node, r)

    def _gather(self, node: Any, r: Tensor) -> None:
        known = self._pending.get(node)
        self._pending[node] = r if known is None else known + r

    def run(self, trace: Any) -> None:
        for step in trace.backwards():
            r = self._pending.pop(step.node, None)
            parts = self._parts.pop(step.node, {})
            if r is None and not parts:
                continue
            self._keep(step, r)
            if step.picks is not None:
                known = self._parts.setdefault(step.node.args[0], {})
                known[step.picks] = known[step.picks] + r if step.picks in known else r
                continue
            came = float(r.double().sum()) if r is not None else _total(parts)
            if step.source is not None:
                where = step.source.value
                self._sources[where] = self._sources.get(where, 0.0) + came
                continue
            shares = self._sharing.shares(step, parts if r is None else r)
            self._pass(step, came, shares)

    def _pass(self, step: Any, came: float, shares: Shares) -> None:
        for at, r in shares.inputs.items():
            self._gather(step.node.args[at], r)
        flow = Flow(step.origin.name, step.operator, step.layer, came, _total(shares.inputs), shares.absorbed)
        self._flows.append(flow)

    def _keep(self, step: Any, r: Tensor) -> None:
        name = step.node.meta.get("onnx_value")
        if name in self._names and r is not None:
            self.kept[name] = r.detach().cpu().float().numpy()

    def balance(self) -> Balance:
        return Balance(self._started, dict(self._sources), tuple(self._flows))


def _total(parts: Mapping[int, Tensor]) -> float:
    return sum(float(r.double().sum()) for r in parts.values())
