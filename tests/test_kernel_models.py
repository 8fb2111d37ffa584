# SPDX-License-Identifier: Apache-2.0
"""The little models that kernels are measured with."""

from __future__ import annotations

import numpy as np
import pytest

from splitfold.runtime.costs.kernel import Case, Form, Kernel, Operation, work
from splitfold.runtime.costs.models import FORMS, case_model
from splitfold.runtime.session import Session, optimized_graph
from splitfold.runtime.target import Target

SMALL = {
    Operation.MATMUL: (5, 48, 40),
    Operation.CONV: (1, 8, 16, 9, 9, 3, 2, 2),
    Operation.SOFTMAX: (6, 20),
    Operation.NORM: (6, 32),
    Operation.GELU: (6, 32),
    Operation.ATTENTION: (2, 4, 8, 16),
    Operation.QUANTIZE: (100,),
    Operation.DEQUANTIZE: (100,),
    Operation.CAST: (100,),
}
KERNELS = [kernel for kernels in FORMS.values() for kernel in kernels]
NODES = {
    "matmul/fp32": {"MatMul"},
    "matmul/int8-dynamic": {"DynamicQuantizeMatMul"},
    "matmul/int8-static": {"QuantizeLinear", "MatMulIntegerToFloat"},
    "matmul/int8-qdq": {"QuantizeLinear", "MatMulIntegerToFloat"},
    "conv/int8-static": {"QLinearConv", "Transpose"},
    "conv/int8-dynamic": {"DynamicQuantizeLinear", "ConvInteger", "Cast", "Mul"},
    "softmax/int8": {"QLinearSoftmax"},
    "norm/fp32": {"Sum", "LayerNormalization"},
    "norm/fused": {"SkipLayerNormalization"},
    "gelu/fused": {"Gelu"},
    "attention/fused": {"MultiHeadAttention"},
    "attention/standard": {"Attention"},
    "quantize/dynamic": {"DynamicQuantizeLinear"},
}
"""What the runtime really executes."""


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_each_kernel_runs_as_what_it_is_called(kernel: Kernel) -> None:
    assert Kernel.parse(str(kernel)) == kernel
    built = case_model(Case(kernel, SMALL[kernel.operation]))
    (output,) = Session(built.model).run(built.feeds).values()
    assert output.size > 0
    wanted = NODES.get(str(kernel), {"MatMulNBits"} if kernel.form is Form.BLOCKS else None)
    if wanted is not None:
        assert {node.op_type for node in optimized_graph(built.model, Target.cpu()).graph} == wanted


def test_forms_of_attention_norm_and_gelu_compute_the_same() -> None:
    for operation in (Operation.ATTENTION, Operation.NORM, Operation.GELU):
        found = []
        for kernel in FORMS[operation]:
            built = case_model(Case(kernel, SMALL[operation]))
            found.append(next(iter(Session(built.model).run(built.feeds).values())))
        for other in found[1:]:
            np.testing.assert_allclose(found[0], other, atol=2e-5)


def test_a_case_has_all_its_sizes_and_a_kernel_has_a_name() -> None:
    with pytest.raises(ValueError, match="3 positive numbers: rows, depth, columns"):
        Case(Kernel(Operation.MATMUL), (1, 2))
    with pytest.raises(ValueError, match="positive"):
        Case(Kernel(Operation.MATMUL), (1, 0, 2))
    for text in ("matmul/fp64", "matmull/fp32", "matmul/blocks-w4"):
        with pytest.raises(ValueError):
            Kernel.parse(text)


def test_work_counts_multiply_adds() -> None:
    assert work(Operation.MATMUL, (2, 3, 5)) == 30
    assert work(Operation.CONV, (1, 4, 6, 8, 8, 3, 2, 2)) == 4 * 4 * 6 * 2 * 9
    assert work(Operation.ATTENTION, (1, 2, 3, 4)) == 2 * 2 * 3 * 3 * 4
