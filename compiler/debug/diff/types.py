# SPDX-License-Identifier: Apache-2.0
"""What the difference of two models is made of."""

from __future__ import annotations

import enum
from dataclasses import dataclass

__all__ = [
    "Aspect",
    "Detail",
    "Kind",
    "LayerChange",
    "Moved",
    "NodeChange",
    "NodeFacts",
    "Rescaled",
    "Slot",
    "SlotChange",
    "Summary",
    "TensorChange",
    "TensorFacts",
]


class Kind(enum.Enum):
    """What became of a node or a tensor."""

    ADDED = "added"
    REMOVED = "removed"
    REPLACED = "replaced"
    """Nodes: others compute the same value now."""
    RETYPED = "retyped"
    """Tensors: element type or shape is another."""
    CHANGED = "changed"
    """Nodes: the operator is the same, a detail is not. Tensors: the values are others."""


class Aspect(enum.Enum):
    """What of a node changed."""

    ATTRIBUTE = "attribute"
    OUTPUT_TYPE = "output type"
    INPUT = "input"


@dataclass(frozen=True)
class NodeFacts:
    """A node: operator with domain, its own name, names of its outputs."""

    operator: str
    name: str
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Detail:
    """A change of one aspect of a node.

    Attributes:
        aspect: which.
        name: of the attribute, of the output value, or the position of the input.
        before, after: attribute value, type or name of the value read; empty where there is none.
    """

    aspect: Aspect
    name: str
    before: str
    after: str


@dataclass(frozen=True)
class NodeChange:
    """A change of one or more nodes.

    Attributes:
        kind: of change.
        before: the nodes of the first model, in order; empty where added.
        after: those of the second; empty where removed.
        details: what is different, where the operator is the same.
        folded: whether a removed node's output is a constant now.
    """

    kind: Kind
    before: tuple[NodeFacts, ...] = ()
    after: tuple[NodeFacts, ...] = ()
    details: tuple[Detail, ...] = ()
    folded: bool = False


@dataclass(frozen=True)
class TensorFacts:
    """An initializer.

    Attributes:
        name: its name.
        dtype: element type, such as ``float`` (32 bits) or ``int8``.
        shape: its shape; of packed codes, of what is stored.
        size: bytes, without `parts`.
        parts: names of the initializers that turn codes into numbers: scales and zero points.
        form: what is packed in it, such as ``4 bits, blocks of 32``; else empty.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    parts: tuple[str, ...] = ()
    form: str = ""


@dataclass(frozen=True)
class Rescaled:
    """A weight that was multiplied channel by channel.

    Attributes:
        channels: ``input`` or ``output``.
        low, high: smallest and largest factor.
    """

    channels: str
    low: float
    high: float


@dataclass(frozen=True)
class Moved:
    """How far the values of a tensor moved, codes turned back into numbers.

    Attributes:
        max_abs: largest absolute difference.
        relative: L2 norm of the difference over that of the first.
        sqnr_db: 20 log10 of 1 / `relative`, in decibel; infinite is equal.
        rescaled: factors by channel that explain most of the difference: the other numbers are what remains
            when the first tensor is multiplied by them.
    """

    max_abs: float
    relative: float
    sqnr_db: float
    rescaled: Rescaled | None = None


@dataclass(frozen=True)
class TensorChange:
    """A change of an initializer.

    Attributes:
        kind: of change.
        role: ``weight`` or ``bias`` where the operator tells, else empty.
        before, after: the initializers; None where there is none.
        moved: how far, where the two can be compared.
        note: the values of small integers, or why the two cannot be compared; else empty.
    """

    kind: Kind
    role: str = ""
    before: TensorFacts | None = None
    after: TensorFacts | None = None
    moved: Moved | None = None
    note: str = ""


@dataclass(frozen=True)
class LayerChange:
    """All changes of one user layer; a node that comes from several layers names them all."""

    layer: str
    nodes: tuple[NodeChange, ...]
    tensors: tuple[TensorChange, ...]


class Slot(enum.Enum):
    """A part of the model that its caller sees."""

    INPUT = "input"
    OUTPUT = "output"
    OPSET = "opset"


@dataclass(frozen=True)
class SlotChange:
    """A change of an input, an output or an imported opset.

    Attributes:
        slot: which of them.
        name: of the value or the domain.
        before, after: type or version, with the position where the order changed; None where there is none.
    """

    slot: Slot
    name: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class Summary:
    """Counts. Constant nodes count as initializers, function calls as the nodes of their bodies.

    Attributes:
        nodes: before and after.
        nodes_added, nodes_removed: without counterpart.
        nodes_replaced: places where others compute the same value.
        nodes_changed: same operator, other attributes, types or inputs.
        tensors: initializers before and after.
        tensors_added, tensors_removed, tensors_changed: of them; a re-typed one counts as changed.
        tensors_renamed: equal but for the name, which is no difference.
        weight_bytes: bytes of all initializers before and after.
    """

    nodes: tuple[int, int]
    nodes_added: int
    nodes_removed: int
    nodes_replaced: int
    nodes_changed: int
    tensors: tuple[int, int]
    tensors_added: int
    tensors_removed: int
    tensors_changed: int
    tensors_renamed: int
    weight_bytes: tuple[int, int]
