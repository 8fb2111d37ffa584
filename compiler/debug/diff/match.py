# SPDX-License-Identifier: Apache-2.0
"""Which nodes of two models are counterparts: through fusion, splitting and renaming."""

from __future__ import annotations

import enum
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from splitfold.passes.identity import layers_of
from splitfold.passes.provenance import VALUES_KEY, stands_for
from splitfold.passes.submodel import read_values
from splitfold.passes.values import constant

__all__ = [
    "Counterparts",
    "Family",
    "Side",
    "doubtful",
    "family_of",
    "key_of",
    "match",
    "operator_of",
    "pattern",
]

_DIGITS = re.compile(r"\d+")
_CHANCE = 5
"""Ways of differing from which on names are taken for counters."""

Key = tuple[bool, str]
"""(stands for an original value, name of that value or its own name)."""


_End = Callable[[ir.Node], bool]
"""Tells the node at which a walk back ends."""


class Family(enum.Enum):
    """Operators that do the same work in different precision."""

    LINEAR = "linear"
    CONVOLUTION = "convolution"
    TABLE = "table"


_FAMILIES = {
    Family.LINEAR: {
        "DynamicQuantizeMatMul", "FusedGemm", "FusedMatMul", "Gemm", "MatMul", "MatMulInteger",
        "MatMulIntegerToFloat", "MatMulNBits", "QGemm", "QLinearMatMul",
    },
    Family.CONVOLUTION: {"Conv", "ConvInteger", "FusedConv", "NhwcFusedConv", "QLinearConv"},
    Family.TABLE: {"Gather", "GatherBlockQuantized"},
}  # fmt: skip


def family_of(node: ir.Node) -> Family | None:
    """Return the family of an operator, or None where it has none."""
    if node.op_type == "Gather" and constant(node.inputs[0]) is None:
        return None
    return next((family for family, names in _FAMILIES.items() if node.op_type in names), None)


def operator_of(node: ir.Node) -> tuple[str, str]:
    """Return domain and operator type; ``ai.onnx`` is the empty domain."""
    return ("" if node.domain == "ai.onnx" else node.domain, node.op_type)


@dataclass(frozen=True)
class Counterparts:
    """Nodes of one model and the nodes of the other that took their place, in order of execution: one of
    each, but for what was fused or split."""

    before: tuple[ir.Node, ...]
    after: tuple[ir.Node, ...]


class Side:
    """The nodes of one model, subgraphs included, found by what their outputs stand for."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.nodes = [node for graph in model.graphs() for node in graph]
        self.position = {node: at for at, node in enumerate(self.nodes)}
        self.by_key: defaultdict[Key, list[ir.Node]] = defaultdict(list)
        for node in self.nodes:
            for key in keys_of(node):
                self.by_key[key].append(node)

    def ordered(self, nodes: Iterable[ir.Node]) -> tuple[ir.Node, ...]:
        """Return `nodes` in order of execution."""
        return tuple(sorted(set(nodes), key=self.position.__getitem__))


def key_of(value: ir.Value) -> Key:
    """Return what a computed value is found by."""
    original = stands_for(value)
    return (True, original) if original is not None else (False, value.name or "")


def keys_of(node: ir.Node) -> list[Key]:
    """Return what the outputs of `node` are found by."""
    return [key_of(value) for value in node.outputs if value.name]


def match(before: Side, after: Side) -> list[Counterparts]:
    """Return the counterparts of two models, whose values and layers are named.

    They are found by the original values that their outputs stand for, those of one operator first; then by
    names that one tool derived from the other's (``h_quantized`` from ``h``), by equal node names, by equal
    structure, and by equal layers. A fused node meets all that it was made from: the walk goes back through
    nodes whose values the other model lacks. Names that two exporters merely counted up are not believed.
    """
    _forget_chance(before, after)
    found = _Matching(before, after)
    found.by_values(same_operator=True)
    found.by_values(same_operator=False)
    found.by_derived_names()
    found.by_group(lambda node: (operator_of(node), node.name or node))
    found.by_structure()
    found.by_group(lambda node: (operator_of(node), layers_of(node) or node))
    return found.pairs


def doubtful(pairs: Iterable[tuple[str, Hashable, Hashable]]) -> set[str]:
    """Return the patterns of names (numbers as ``*``) that fit by chance: most of the things so named differ,
    each in its own way.

    `pairs` are name, and what is named so in each of the models.
    """
    alike: Counter[str] = Counter()
    others: defaultdict[str, list[tuple[Hashable, Hashable]]] = defaultdict(list)
    for name, first, second in pairs:
        if first == second:
            alike[pattern(name)] += 1
        else:
            others[pattern(name)].append((first, second))
    return {form for form, found in others.items() if len(found) > alike[form] and len(set(found)) >= _CHANCE}


def pattern(name: str) -> str:
    """Return `name` with each number as ``*``."""
    return _DIGITS.sub("*", name)


def _forget_chance(before: Side, after: Side) -> None:
    """Drop the keys of both sides that are equal by chance; what a pass recorded is always believed."""
    told = {
        key
        for side in (before, after)
        for node in side.nodes
        for key in keys_of(node)
        if VALUES_KEY in node.metadata_props
    }
    shared = [key for key in before.by_key if key in after.by_key and key not in told]
    chance = doubtful(
        (key[1], operator_of(before.by_key[key][-1]), operator_of(after.by_key[key][-1])) for key in shared
    )
    for key in shared:
        if pattern(key[1]) in chance:
            del before.by_key[key], after.by_key[key]


class _Matching:
    def __init__(self, before: Side, after: Side) -> None:
        self.before, self.after = before, after
        self.taken: set[ir.Node] = set()
        self.pairs: list[Counterparts] = []

    def _take(self, before: Sequence[ir.Node], after: Sequence[ir.Node]) -> None:
        self.pairs.append(Counterparts(self.before.ordered(before), self.after.ordered(after)))
        self.taken.update(before, after)

    def _free(self, nodes: Iterable[ir.Node]) -> list[ir.Node]:
        return [node for node in dict.fromkeys(nodes) if node not in self.taken]

    def by_values(self, *, same_operator: bool) -> None:
        for key, nodes in self.before.by_key.items():
            others = self._free(self.after.by_key.get(key, ()))
            for node in self._free(nodes):
                if same_operator:
                    chosen = next((o for o in others if operator_of(o) == operator_of(node)), None)
                else:
                    alike = [o for o in others if family_of(o) is family_of(node) is not None]
                    last = (alike or others)[-1:]  # a value's round trip through a grid comes last
                    chosen = last[0] if last else None
                if chosen is not None:
                    others.remove(chosen)
                    self._take(*([node], [chosen]) if same_operator else self._grown(node, chosen))

    def by_derived_names(self) -> None:
        """Pair free nodes where the name of the value is that of the other and a suffix; neither model has
        both."""
        lost = {
            key[1]: node
            for key, nodes in self.before.by_key.items()
            if key not in self.after.by_key
            for node in self._free(nodes)
        }
        for other in self._free(self.after.nodes):
            parts = (other.outputs[0].name or "").split("_") if other.outputs else []
            names = ("_".join(parts[:count]) for count in range(len(parts) - 1, 0, -1))
            node = next((lost[name] for name in names if name in lost), None)
            if node is not None and node not in self.taken:
                self._take([node], [other])

    def by_structure(self) -> None:
        """Pair free nodes that compute the same from what is paired already, weights counting by shape."""
        known: dict[Hashable, int] = {}
        paired = {
            node: number
            for number, pair in enumerate(self.pairs)
            for node in (pair.before[-1], pair.after[-1])
        }
        marks: dict[ir.Node, int] = {}

        def of(value: ir.Value | None) -> Hashable:
            maker = value.producer() if value is not None else None
            if value is None or maker is None:
                fixed = value is not None and value.is_initializer()
                return ("weight", str(value.shape)) if value is not None and fixed else value and value.name
            if maker in paired:
                return ("pair", paired[maker], value.index())
            return (marks.get(maker, id(maker)), value.index())

        for side in (self.before, self.after):
            for node in side.nodes:
                made = (operator_of(node), *map(of, node.inputs))
                marks[node] = known.setdefault(made, len(known))
        self.by_group(marks.__getitem__)

    def by_group(self, mark: Callable[[ir.Node], Hashable]) -> None:
        """Pair free nodes of equal mark in order, where both models have equally many."""
        groups: defaultdict[Hashable, list[ir.Node]] = defaultdict(list)
        for node in self._free(self.after.nodes):
            groups[mark(node)].append(node)
        free = self._free(self.before.nodes)
        counts = Counter(map(mark, free))
        for node in free:
            others = groups.get(mark(node), [])
            if others and counts[mark(node)] == len(others):
                counts[mark(node)] -= 1
                self._take([node], [others.pop(0)])

    def _grown(self, node: ir.Node, other: ir.Node) -> tuple[list[ir.Node], list[ir.Node]]:
        """Return two nodes that end in the same value with what belongs to them: on each side, the nodes back
        to the one that does the work."""
        wanted = [family for family in (family_of(node), family_of(other)) if family] or list(Family)
        ends = [*map(_of_family, wanted), *map(_of_operator, (operator_of(node), operator_of(other)))]
        for is_end in ends:
            before, after = self._trail(node, is_end, self.after), self._trail(other, is_end, self.before)
            if before and after:
                return before, after
        return [node], [other]

    def _trail(self, node: ir.Node, is_end: _End, other: Side) -> list[ir.Node]:
        """Return the nodes from `node` back to the one that is the end, through nodes without counterparts;
        empty where there is none."""
        trails: dict[ir.Node, list[ir.Node]] = {node: [node]}
        pending, ends = [node], []
        while pending:
            at = pending.pop(0)
            if is_end(at):
                ends.append(at)
                continue
            for value in read_values(at):
                maker = value.producer()
                if maker is None or maker in trails or maker in self.taken:
                    continue
                if any(key in other.by_key for key in keys_of(maker)):
                    continue
                trails[maker] = [*trails[at], maker]
                pending.append(maker)
        return trails[max(ends, key=_held_bytes)] if ends else []


def _of_family(family: Family) -> _End:
    return lambda node: family_of(node) is family


def _of_operator(operator: tuple[str, str]) -> _End:
    return lambda node: operator_of(node) == operator


def _held_bytes(node: ir.Node) -> int:
    held = [constant(value) for value in node.inputs]
    return max((tensor.nbytes for tensor in held if tensor is not None), default=0)
