# SPDX-License-Identifier: Apache-2.0
"""Branches: operators that together compute what one layer computed. Their outputs say so by what they stand
for.

``y [part 2 of 3]`` is a summand of the original value ``y`` whose weight covers all of the layer's weight,
with zeros where other parts hold it; ``chunk`` is a summand that reads some of the input channels; ``slice``
and ``group`` compute some of the output channels; ``y [part 2 of 2: outliers]`` says what the branch was made
for. Passes that replace a branch hand this on, as they do with any value.

In layer patterns a branch has an address: ``encoder.dense:part2``, or ``encoder.dense:outliers`` where it was
made for something, and ``encoder.dense:outliers:part2`` where a branch was split again. Records, and every
tool that compares models, go by the layer.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from splitfold.passes.provenance import stand_for, stands_for
from splitfold.passes.values import sole_consumer

__all__ = [
    "Branch",
    "BranchKind",
    "Part",
    "addresses",
    "branch_of_node",
    "branches_of",
    "covers_again",
    "last_branch",
    "layer_pattern",
    "mark_branch",
    "value_of_layer",
]

_MARK = re.compile(r" \[(?P<kind>[a-z]+) (?P<number>\d+) of (?P<count>\d+)(?:: (?P<part>[a-z]+))?\]")
_REACH = 4
"""Operators from a product to the value that stands for it: cast, scale, bias."""


class BranchKind(enum.Enum):
    """What a branch holds of its layer."""

    PART = "part"
    """Some weights, zeros in the place of the others: the branches' outputs are summed."""
    CHUNK = "chunk"
    """The weights of some input channels: the branches' outputs are summed."""
    SLICE = "slice"
    """The weights of some output channels, or a function of them: the branches' outputs are concatenated."""
    GROUP = "group"
    """The weights of some groups of a convolution: the branches' outputs are concatenated."""

    @property
    def is_joined(self) -> bool:
        """Whether the branches' outputs are concatenated, along the channels; else they are summed."""
        return self in (BranchKind.SLICE, BranchKind.GROUP)


class Part(enum.Enum):
    """What a branch was made for."""

    REST = "rest"
    """What is left of the layer without its outliers."""
    OUTLIERS = "outliers"
    """The few channels that stand apart."""


@dataclass(frozen=True)
class Branch:
    """Which branch of a layer a value is: the `number`-th (from 1) of `count`, and what it was made for."""

    kind: BranchKind
    number: int
    count: int
    part: Part | None = None

    def __str__(self) -> str:
        text = f"{self.kind.value} {self.number} of {self.count}"
        return text if self.part is None else f"{text}: {self.part.value}"

    @property
    def address(self) -> str:
        """How a layer pattern names it."""
        return f"{self.kind.value}{self.number}" if self.part is None else self.part.value


_ADDRESS = re.compile(
    rf"(:({'|'.join(part.value for part in Part)}|({'|'.join(kind.value for kind in BranchKind)})(\d+|\*)))+$"
)


def addresses(layer: str, branches: Sequence[Branch]) -> tuple[str, ...]:
    """Return the names that a pattern may use: the layer's own, then its branch's, outermost first."""
    steps = [branch.address for branch in branches]
    return tuple(":".join([layer, *steps[:count]]) for count in range(len(steps) + 1))


def layer_pattern(pattern: str) -> str:
    """Return the layer pattern of ``layer:part``; any other pattern as it is."""
    return _ADDRESS.sub("", pattern)


def mark_branch(value: ir.Value, whole: ir.Value, branch: Branch) -> None:
    """Record that `value` is this branch of `whole`, or of what `whole` stands for."""
    stand_for(value, f"{stands_for(whole) or whole.name} [{branch}]")


def branches_of(value: ir.Value) -> tuple[Branch, ...]:
    """Return which branch `value` is, of which branch, the outermost split first; empty where it is whole."""
    return tuple(map(_branch, _MARK.finditer(stands_for(value) or "")))


def _branch(mark: re.Match[str]) -> Branch:
    part = Part(mark["part"]) if mark["part"] else None
    return Branch(BranchKind(mark["kind"]), int(mark["number"]), int(mark["count"]), part)


def value_of_layer(name: str) -> str:
    """Return the value whose branch, or branch of a branch, is called `name`; a whole one's own name."""
    return _MARK.sub("", name)


def last_branch(name: str) -> tuple[str, Branch] | None:
    """Return what the value called `name` is a branch of, and which; None for a whole one."""
    marks = list(_MARK.finditer(name))
    return (name[: marks[-1].start()], _branch(marks[-1])) if marks else None


def covers_again(node: ir.Node) -> bool:
    """Return whether the weight of `node` covers weights of its layer that another branch counts already: it
    is a part, and not the first."""
    return any(mark.kind is BranchKind.PART and mark.number > 1 for mark in branch_of_node(node))


def branch_of_node(node: ir.Node) -> tuple[Branch, ...]:
    """Return which branch `node` computes.

    What it computes may pass through casts, scales and a bias before it stands for the branch; values on that
    way are new.
    """
    value = node.outputs[0]
    for _ in range(_REACH):
        reader = sole_consumer(value)
        if stands_for(value) is not None or reader is None or len(reader.outputs) != 1:
            break
        value = reader.outputs[0]
    return branches_of(value)
