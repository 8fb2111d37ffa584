# SPDX-License-Identifier: Apache-2.0
"""A lifted model run once, all values held, so that it can be walked backwards with rules of one's own."""

from __future__ import annotations

import enum
import json
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx

from splitfold.runtime.feeds import Feeds
from splitfold.runtime.lift.lifted import ORIGIN, VALUE, Lifted, Origin

__all__ = ["Source", "Step", "Trace"]

_LOOKUPS = frozenset({"Gather", "GatherND", "GatherBlockQuantized", "EmbedLayerNormalization"})
_SHAPES = frozenset({"Shape", "Size"})


class Source(enum.Enum):
    """Where activations begin."""

    INPUT = "input"
    """A float input of the model."""
    EMBEDDING = "embedding"
    """Rows of a table that were looked up by an input."""


@dataclass(frozen=True, eq=False)
class Step:
    """One call of the lifted graph with what it was given and what it gave.

    Attributes:
        node: of the lifted graph.
        arguments: tensors and constants, by position.
        output: a tensor, or a tuple of them.
        active: positions of arguments that are activations: float tensors computed from the model's inputs.
        source: where this is one; no activation goes into it.
    """

    node: torch.fx.Node
    arguments: tuple[Any, ...]
    output: Any
    active: tuple[int, ...]
    source: Source | None = None

    @property
    def origin(self) -> Origin:
        """The ONNX node; of an input one without an operator."""
        return self.node.meta.get(ORIGIN) or Origin(str(self.node.meta.get(VALUE, self.node.name)), "", "")

    @property
    def operator(self) -> str:
        """ONNX operator type; empty for an input."""
        return "" if self.picks is not None else self.origin.op_type

    @property
    def layer(self) -> str:
        """User-facing layers, joined by +; the node's name where there are none."""
        text = self.origin.metadata.get("splitfold.layers")
        return "+".join(json.loads(text)) if text else self.origin.name

    @property
    def picks(self) -> int | None:
        """Which output of an operator with several this only picks out, or None."""
        return int(self.arguments[1]) if self.node.target is operator.getitem else None

    @property
    def keywords(self) -> Mapping[str, Any]:
        """Attributes of the operator."""
        return self.node.kwargs

    def call(self, replaced: Mapping[int, Any]) -> Any:
        """Return the output with other arguments at some positions."""
        arguments = [replaced.get(at, value) for at, value in enumerate(self.arguments)]
        return self.node.target(*arguments, **self._keywords())  # type: ignore[operator]

    def pull(
        self, cotangent: Any, positions: Sequence[int], replaced: Mapping[int, Any] | None = None
    ) -> dict[int, torch.Tensor]:
        """Return the transposed Jacobian times `cotangent` for the arguments at `positions`, in the shapes of
        these; 0 where the output does not depend on one.

        Args:
            cotangent: in the shape of the output; of several outputs a mapping by index.
            positions: of float arguments.
            replaced: arguments to take instead of those that the step was given.
        """
        given = {**dict(enumerate(self.arguments)), **(replaced or {})}
        leaves = {at: given[at].detach().requires_grad_() for at in positions}
        with torch.enable_grad():
            output = self.call({**(replaced or {}), **leaves})
        pairs = (
            [(output[index], tensor) for index, tensor in cotangent.items()]
            if isinstance(cotangent, Mapping)
            else [(output, cotangent)]
        )
        pairs = [(value, tensor) for value, tensor in pairs if value.requires_grad]
        if not pairs:
            return {at: torch.zeros_like(leaf) for at, leaf in leaves.items()}
        values, tensors = zip(*pairs, strict=True)
        found = torch.autograd.grad(values, list(leaves.values()), tensors, allow_unused=True)
        return {
            at: torch.zeros_like(leaves[at]) if gradient is None else gradient
            for at, gradient in zip(leaves, found, strict=True)
        }

    def _keywords(self) -> dict[str, Any]:
        # the only nodes among keywords are anchors of new tensors
        return {
            name: value if not isinstance(value, torch.fx.Node) else torch.empty(0)
            for name, value in self.node.kwargs.items()
        }


class Trace:
    """A run of a lifted model.

    Holds all values of the run; `backwards` gives them free as it goes.

    Args:
        lifted: the model.
        feeds: arrays or tensors by input name.
    """

    def __init__(self, lifted: Lifted, feeds: Feeds) -> None:
        self._lifted = lifted
        self._values: dict[torch.fx.Node, Any] = {}
        self._active: dict[torch.fx.Node, bool] = {}
        self._fed: dict[torch.fx.Node, bool] = {}
        self._sources: dict[torch.fx.Node, Source] = {}
        self.inputs: dict[str, Any] = dict(zip(lifted.inputs, lifted.arguments(feeds), strict=True))
        """Tensors by input name."""
        self.outputs: dict[str, Any] = {}
        """Tensors by output name."""
        self.ends: dict[str, torch.fx.Node] = {}
        """Node of the lifted graph by output name."""
        with torch.no_grad():
            self._run()

    def _run(self) -> None:
        module, given = self._lifted.module, iter(self.inputs.values())
        for node in module.graph.nodes:
            if node.op == "placeholder":
                value = next(given)
            elif node.op == "get_attr":
                value = operator.attrgetter(str(node.target))(module)
                value = value.detach() if isinstance(value, torch.Tensor) else value
            elif node.op == "output":
                self.ends = dict(zip(self._lifted.outputs, node.args[0], strict=True))
                break
            else:
                arguments, keywords = self._resolved((node.args, node.kwargs))
                value = node.target(*arguments, **keywords)
            self._values[node] = value
            self._classify(node, value)
        self.outputs = {name: self._values[node] for name, node in self.ends.items()}

    def _resolved(self, arguments: Any) -> Any:
        return torch.fx.node.map_arg(arguments, lambda node: self._values[node])

    def _classify(self, node: torch.fx.Node, value: Any) -> None:
        inputs, origin = node.all_input_nodes, node.meta.get(ORIGIN)
        kind = origin.op_type if origin is not None else ""
        self._fed[node] = node.op == "placeholder" or (
            any(self._fed[other] for other in inputs) and kind not in _SHAPES
        )
        active = _is_float(value) and any(self._active[other] for other in inputs)
        if not active and _is_float(value) and self._fed[node]:
            if node.op == "placeholder":
                self._sources[node] = Source.INPUT
            elif kind in _LOOKUPS:
                self._sources[node] = Source.EMBEDDING
        self._active[node] = active or node in self._sources

    def is_active(self, node: torch.fx.Node) -> bool:
        """Whether a node gives an activation: a float tensor computed from the model's inputs."""
        return self._active[node]

    def step(self, node: torch.fx.Node) -> Step:
        """Return the step of a node."""
        arguments = tuple(self._resolved(node.args))
        active = tuple(
            at
            for at, argument in enumerate(node.args)
            if isinstance(argument, torch.fx.Node) and self._active[argument]
        )
        return Step(node, arguments, self._values[node], active, self._sources.get(node))

    def backwards(self) -> Iterator[Step]:
        """Yield the steps that give activations, the last first; each is forgotten when the next is asked
        for."""
        for node in reversed([node for node in self._values if self._active[node]]):
            yield self.step(node)
            del self._values[node]

    def reaching(self) -> set[str]:
        """Return the names of all ONNX values that an output which is an activation is computed from, by
        activations alone."""
        pending = [node for node in self.ends.values() if self._active[node]]
        seen: set[torch.fx.Node] = set()
        while pending:
            node = pending.pop()
            if node not in seen:
                seen.add(node)
                pending.extend(other for other in node.all_input_nodes if self._active[other])
        return {str(node.meta[VALUE]) for node in seen if VALUE in node.meta}


def _is_float(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(_is_float(item) for item in value)
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point
