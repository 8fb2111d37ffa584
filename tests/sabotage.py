# SPDX-License-Identifier: Apache-2.0
"""The sabotage suite: passes that each harm one layer. Here those that move the numbers, the others are in
`sabotage_breaks`."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from sabotage_base import Sabotage, Seen, insert_after, is_dense, is_square, op, set_tensor, weight_of
from sabotage_breaks import (
    Boast,
    BreakShape,
    Dangle,
    DivideByZero,
    DuplicateName,
    LeftInFloat16,
    Raise,
    UnknownOperator,
)

from splitfold.passes.base import Context, Contract, Findings
from splitfold.passes.identity import display_layer
from splitfold.runtime.feeds import Array

__all__ = ["SABOTAGES", "TooFewBits"]


class ScaleWeight(Sabotage):
    """Scales a weight by 1.01."""

    name = "sabotage-scale-weight"
    fits = staticmethod(is_dense)

    def harm(self, node: ir.Node, graph: ir.Graph) -> None:
        set_tensor(node.inputs[1], weight_of(node) * np.float32(1.01))


class ZeroRow(Sabotage):
    """Zeroes a row of a weight."""

    name = "sabotage-zero-row"
    fits = staticmethod(is_dense)

    def harm(self, node: ir.Node, graph: ir.Graph) -> None:
        weight = weight_of(node)
        weight[self.seed % len(weight)] = 0
        set_tensor(node.inputs[1], weight)


class TransposeWeight(Sabotage):
    """Transposes a square weight."""

    name = "sabotage-transpose-weight"
    fits = staticmethod(is_square)

    def harm(self, node: ir.Node, graph: ir.Graph) -> None:
        set_tensor(node.inputs[1], weight_of(node).T)


class PermuteChannels(Sabotage):
    """Permutes the output channels of a weight."""

    name = "sabotage-permute-channels"
    fits = staticmethod(is_dense)

    def harm(self, node: ir.Node, graph: ir.Graph) -> None:
        set_tensor(node.inputs[1], np.roll(weight_of(node), 1, axis=1))


class DropBias(Sabotage):
    """Drops a bias; that of a key would not show: softmax takes no notice of it."""

    name = "sabotage-drop-bias"

    def fits(self, node: ir.Node) -> bool:
        value = node.inputs[1] if len(node.inputs) > 1 else None
        constant = value is not None and value.const_value is not None and value.const_value.size > 1
        return node.op_type == "Add" and constant and not display_layer(node).endswith("key")

    def harm(self, node: ir.Node, graph: ir.Graph) -> None:
        node.outputs[0].replace_all_uses_with(node.inputs[0])
        graph.remove(node, safe=True)


class SwapInputs(Sabotage):
    """Swaps the two inputs of a Sub, of equal shape."""

    name = "sabotage-swap-inputs"

    def fits(self, node: ir.Node) -> bool:
        return node.op_type == "Sub"

    def harm(self, node: ir.Node, graph: ir.Graph) -> None:
        first, second = node.inputs
        node.replace_input_with(0, second)
        node.replace_input_with(1, first)


class DropResidual(Sabotage):
    """Forgets the shortcut around a block."""

    name = "sabotage-drop-residual"

    def fits(self, node: ir.Node) -> bool:
        return node.op_type in ("Add", "Sum") and all(
            value is not None and value.const_value is None for value in node.inputs
        )

    def harm(self, node: ir.Node, graph: ir.Graph) -> None:
        node.outputs[0].replace_all_uses_with(node.inputs[0])
        graph.remove(node, safe=True)


class ChangeEpsilon(Sabotage):
    """Changes the epsilon of a norm."""

    name = "sabotage-change-epsilon"

    def fits(self, node: ir.Node) -> bool:
        return node.op_type == "LayerNormalization"

    def harm(self, node: ir.Node, graph: ir.Graph) -> None:
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.1)


class ChangeAxis(Sabotage):
    """Lets a Softmax run over the wrong axis."""

    name = "sabotage-change-axis"

    def fits(self, node: ir.Node) -> bool:
        return node.op_type == "Softmax"

    def harm(self, node: ir.Node, graph: ir.Graph) -> None:
        node.attributes["axis"] = ir.AttrInt64("axis", -2)


class ChangePerm(Sabotage):
    """Lets a Transpose before a Reshape order the last two axes wrongly: the shape of the whole stays."""

    name = "sabotage-change-perm"

    def fits(self, node: ir.Node) -> bool:
        return node.op_type == "Transpose" and all(
            use.node.op_type == "Reshape" for use in node.outputs[0].uses()
        )

    def harm(self, node: ir.Node, graph: ir.Graph) -> None:
        perm = list(node.attributes["perm"].as_ints())
        node.attributes["perm"] = ir.AttrInt64s("perm", [*perm[:-2], perm[-1], perm[-2]])
        node.outputs[0].shape = None


class RoughGelu(Sabotage):
    """Replaces a Gelu by x sigmoid(1.5 x), which is off."""

    name = "sabotage-rough-gelu"

    def fits(self, node: ir.Node) -> bool:
        return node.op_type == "Gelu"

    def harm(self, node: ir.Node, graph: ir.Graph) -> None:
        x = node.inputs[0]
        assert x is not None
        factor = ir.Value(name=f"{node.name}_factor", const_value=ir.tensor(np.float32(1.5)))
        graph.register_initializer(factor)
        scaled = op("Mul", x, factor)
        gate = op("Sigmoid", scaled.outputs[0])
        result = op("Mul", x, gate.outputs[0])
        graph.insert_before(node, [scaled, gate, result])
        node.outputs[0].replace_all_uses_with(result.outputs[0])
        graph.remove(node, safe=True)


class ThroughFloat16(Sabotage):
    """Casts a value to float16 and back."""

    name = "sabotage-through-float16"

    def fits(self, node: ir.Node) -> bool:
        return is_dense(node) and not display_layer(node).endswith(("query", "key"))  # softmax evens it out

    def harm(self, node: ir.Node, graph: ir.Graph) -> None:
        def casts(value: ir.Value) -> list[ir.Node]:
            half = op("Cast", value, dtype=ir.DataType.FLOAT16, to=int(ir.DataType.FLOAT16))
            return [half, op("Cast", half.outputs[0], dtype=ir.DataType.FLOAT, to=int(ir.DataType.FLOAT))]

        insert_after(node, casts)


class Lie(ScaleWeight):
    """Scales a weight and says that nothing was changed."""

    name = "sabotage-lie"
    seen = Seen(numbers=True, kind="UNTRUE")
    modified = False


class LoseLayers(ScaleWeight):
    """Scales a weight and wipes out which layers its nodes come from."""

    name = "sabotage-lose-layers"

    def harm(self, node: ir.Node, graph: ir.Graph) -> None:
        layer = display_layer(node)
        super().harm(node, graph)
        for other in graph:
            if display_layer(other) == layer:
                other.metadata_props.clear()


class TooFewBits(Sabotage):
    """Rounds every weight to 8 bits, and one to 2."""

    name = "sabotage-too-few-bits"
    contract = Contract.LOSSY
    seen = Seen(numbers=True, kind=None)
    fits = staticmethod(is_dense)

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""
        victim = self.victim(model)
        for node in model.graph:
            if self.fits(node):
                layer = display_layer(node)
                if self.unwanted(layer) is not None:
                    continue
                if node is victim:
                    self.harm(node, model.graph)
                else:
                    set_tensor(node.inputs[1], _rounded(weight_of(node), 8))
                findings.apply(layer, "rounded")
        return True

    def harm(self, node: ir.Node, graph: ir.Graph) -> None:
        set_tensor(node.inputs[1], _rounded(weight_of(node), 2))


class ClipTooTight(Sabotage):
    """Keeps an activation within a range that is too small."""

    name = "sabotage-clip-too-tight"
    contract = Contract.LOSSY
    seen = Seen(numbers=True, kind=None)
    fits = staticmethod(is_dense)

    def harm(self, node: ir.Node, graph: ir.Graph) -> None:
        low, high = (
            ir.Value(name=f"{node.name}_{word}", const_value=ir.tensor(np.float32(bound)))
            for word, bound in (("low", -0.5), ("high", 0.5))
        )
        graph.register_initializer(low)
        graph.register_initializer(high)
        insert_after(node, lambda value: [op("Clip", value, low, high)])


def _rounded(weight: Array, bits: int) -> Array:
    step = np.abs(weight).max() / (2 ** (bits - 1) - 1)
    return np.asarray(np.round(weight / step) * step, np.float32)


SABOTAGES: tuple[type[Sabotage], ...] = (
    ScaleWeight,
    ZeroRow,
    TransposeWeight,
    PermuteChannels,
    DropBias,
    SwapInputs,
    DropResidual,
    ChangeEpsilon,
    ChangeAxis,
    ChangePerm,
    RoughGelu,
    ThroughFloat16,
    LeftInFloat16,
    BreakShape,
    Lie,
    Boast,
    LoseLayers,
    DivideByZero,
    Raise,
    Dangle,
    UnknownOperator,
    DuplicateName,
    TooFewBits,
    ClipTooTight,
)
