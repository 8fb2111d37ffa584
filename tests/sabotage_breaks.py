# SPDX-License-Identifier: Apache-2.0
"""Sabotages after which a model does not run, or not to finite numbers."""

from __future__ import annotations

import onnx_ir as ir
from sabotage_base import Sabotage, Seen, insert_after, is_dense, op, set_tensor, weight_of

from splitfold.passes.base import Contract

__all__ = [
    "Boast",
    "BreakShape",
    "Dangle",
    "DivideByZero",
    "DuplicateName",
    "LeftInFloat16",
    "Raise",
    "UnknownOperator",
]


class LeftInFloat16(Sabotage):
    """Casts a value to float16 and leaves it there: no kernel adds the two types."""

    name = "sabotage-left-in-float16"
    seen = Seen(numbers=False, kind="STOPPED")
    fits = staticmethod(is_dense)

    def harm(self, node: ir.Node, graph: ir.Graph) -> None:
        insert_after(
            node, lambda value: [op("Cast", value, dtype=ir.DataType.FLOAT16, to=int(ir.DataType.FLOAT16))]
        )


class BreakShape(Sabotage):
    """Takes the last column off a weight."""

    name = "sabotage-break-shape"
    seen = Seen(numbers=False, kind="STOPPED")
    fits = staticmethod(is_dense)

    def harm(self, node: ir.Node, graph: ir.Graph) -> None:
        set_tensor(node.inputs[1], weight_of(node)[:, :-1])


class Boast(Sabotage):
    """Changes nothing and says that it did."""

    name = "sabotage-boast"
    seen = Seen(numbers=False, kind="UNTRUE")
    fits = staticmethod(is_dense)

    def harm(self, node: ir.Node, graph: ir.Graph) -> None:
        pass


class DivideByZero(Sabotage):
    """Makes NaN: 0 / 0 after a layer."""

    name = "sabotage-divide-by-zero"
    contract = Contract.LOSSY
    seen = Seen(numbers=False, kind="NON_FINITE")
    fits = staticmethod(is_dense)

    def harm(self, node: ir.Node, graph: ir.Graph) -> None:
        def division(value: ir.Value) -> list[ir.Node]:
            zero = op("Sub", value, value)
            return [zero, op("Div", zero.outputs[0], zero.outputs[0])]

        insert_after(node, division)


class Raise(Sabotage):
    """Raises in the middle of its work."""

    name = "sabotage-raise"
    seen = Seen(numbers=False, kind="RAISED")
    fits = staticmethod(is_dense)

    def harm(self, node: ir.Node, graph: ir.Graph) -> None:
        raise IndexError("list index out of range")


class Dangle(Sabotage):
    """Lets a node read a value that nothing computes."""

    name = "sabotage-dangle"
    seen = Seen(numbers=False, kind="STOPPED")
    fits = staticmethod(is_dense)

    def harm(self, node: ir.Node, graph: ir.Graph) -> None:
        nothing = ir.Value(name="nothing", type=node.inputs[0].type if node.inputs[0] else None)
        node.replace_input_with(0, nothing)


class UnknownOperator(Sabotage):
    """Makes an operator that does not exist."""

    name = "sabotage-unknown-operator"
    seen = Seen(numbers=False, kind="STOPPED")
    fits = staticmethod(is_dense)

    def harm(self, node: ir.Node, graph: ir.Graph) -> None:
        node.op_type = "MatrixMultiply"


class DuplicateName(Sabotage):
    """Gives a value the name of the value that it is computed from."""

    name = "sabotage-duplicate-name"
    seen = Seen(numbers=False, kind="STOPPED")
    fits = staticmethod(is_dense)

    def harm(self, node: ir.Node, graph: ir.Graph) -> None:
        assert node.inputs[0] is not None
        node.outputs[0].name = node.inputs[0].name
