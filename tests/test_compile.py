# SPDX-License-Identifier: Apache-2.0
"""`compile` end to end on ONNX models: it verifies, repairs, refuses, and says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from splitfold.compiler import Budget, Pipeline, Tolerance, Unrealised, compile, presets
from splitfold.compiler.errors import BudgetError, VerificationError
from splitfold.passes.base import Context, Contract, Findings, Pass
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.errors import PassFailedError, SpecError
from splitfold.passes.quantize_dynamic import QuantizeDynamicPass
from splitfold.passes.values import add_initializer
from splitfold.runtime.session import optimized_graph
from splitfold.runtime.target import Target

RNG = np.random.default_rng(0)
W1 = RNG.standard_normal((32, 64)).astype(np.float32)
W2 = RNG.standard_normal((64, 16)).astype(np.float32)
FEEDS = [{"x": RNG.standard_normal((8, 32)).astype(np.float32)} for _ in range(4)]


def _model() -> ir.Model:
    model = ir.from_onnx_text(
        """<ir_version: 8, opset_import: ["": 17]>
        two (float[n, 32] x) => (float[n, 16] y) { h = MatMul(x, W1) r = Relu(h) y = MatMul(r, W2) }""",
        initializers=[ir.tensor(W1, name="W1"), ir.tensor(W2, name="W2")],
    )
    for node, name in zip(model.graph, ("first", "act", "second"), strict=True):
        node.name = name
    return model


@dataclass(frozen=True)
class _Sabotage(Pass):
    """Changes the second weight: by a factor, or to NaN. Promises exactness."""

    name: ClassVar[str] = "sabotage"
    contract: ClassVar[Contract] = Contract.EXACT
    factor: float = 1.01

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        node = model.graph.node("second")
        held = add_initializer(model.graph, "broken", W2 * np.float32(self.factor))
        node.replace_input_with(1, held)
        return True


@dataclass(frozen=True)
class _LossySabotage(_Sabotage):
    name: ClassVar[str] = "lossy-sabotage"
    contract: ClassVar[Contract] = Contract.LOSSY


@pytest.mark.parametrize("name", ["exact", "int8", "int8-dynamic", "int4", "low-bit"])
def test_presets_give_models_that_bare_onnxruntime_runs(name: str, tmp_path: object) -> None:
    artifact = compile(_model(), pipeline=presets.preset(name), calibration=FEEDS)
    onnx.checker.check_model(ir.to_proto(artifact.model), full_check=True)
    folder = artifact.save(f"{tmp_path}/out")
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, FEEDS[0])
    expected = np.maximum(FEEDS[0]["x"] @ W1, 0) @ W2
    relative = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert relative < {"exact": 1e-6, "int8": 0.03, "int8-dynamic": 0.03, "int4": 0.2, "low-bit": 0.3}[name]
    if name != "exact":
        assert all(item["low_bit"] for item in artifact.manifest["realised"].values())
        assert set(artifact.manifest["realised"]) == {"first", "second"}


def test_the_given_model_is_not_changed() -> None:
    model = _model()
    before = ir.to_proto(model).SerializeToString()
    compile(model, pipeline=presets.int8(), calibration=FEEDS)
    assert ir.to_proto(model).SerializeToString() == before


def test_an_exact_pass_that_moves_an_output_is_an_error_that_names_it() -> None:
    with pytest.raises(
        PassFailedError, match=r"pass sabotage failed \(ran before it: canonicalize\).*'y' moved"
    ) as caught:
        compile(_model(), pipeline=Pipeline.of(CanonicalizePass(), _Sabotage()))
    assert caught.value.failed == "sabotage"
    assert caught.value.before == ("canonicalize",)


def test_nan_names_the_first_value_that_has_it() -> None:
    with pytest.raises(VerificationError, match=r"after lossy-sabotage.* output 'y' holds NaN.*layer second"):
        compile(_model(), pipeline=Pipeline.of(CanonicalizePass(), _LossySabotage(factor=float("nan"))))


def test_a_deviation_beyond_the_tolerance_names_the_pass_to_blame() -> None:
    pipeline = Pipeline.of(CanonicalizePass(), QuantizeDynamicPass(), _LossySabotage(factor=-1.0))
    pipeline = Pipeline.of(*pipeline.steps[:1], pipeline.steps[2], pipeline.steps[1])
    with pytest.raises(VerificationError, match=r"cosine -0\.9") as caught:
        compile(_model(), pipeline=pipeline)
    assert caught.value.blame == "lossy-sabotage{factor=-1.0}"
    assert caught.value.output == "y"


@pytest.mark.parametrize(
    "limit", [{"sqnr_db": 60.0}, {"max_abs": 1e-4}, {"top1": 1.01}, {"cosine": 0.9999999}]
)
def test_each_limit_of_the_tolerance_binds(limit: dict[str, float]) -> None:
    with pytest.raises(VerificationError, match="output 'y' is further from the reference"):
        compile(_model(), FEEDS[0], pipeline="quantize-dynamic", tolerance=Tolerance(**limit))
    compile(_model(), FEEDS[0], pipeline="canonicalize", tolerance=Tolerance(sqnr_db=60.0))


def test_budget_and_metric() -> None:
    size = 4 * (W1.size + W2.size)
    compile(_model(), pipeline="canonicalize", budget=Budget(megabytes=size / 1e6))
    with pytest.raises(BudgetError, match="over the budget"):
        compile(_model(), pipeline="canonicalize", budget=Budget(megabytes=size / 1e6 * 0.99))
    compile(_model(), pipeline="quantize-dynamic", budget=Budget(megabytes=size / 3e6))

    def metric(session: object) -> float:
        (y,) = session.run(FEEDS[0]).values()  # type: ignore[attr-defined]
        return -float(np.abs(y - np.maximum(FEEDS[0]["x"] @ W1, 0) @ W2).max())

    artifact = compile(_model(), pipeline="quantize-dynamic", evaluate=metric)
    assert artifact.manifest["metric"]["after"] < artifact.manifest["metric"]["before"]
    with pytest.raises(VerificationError, match="the metric fell"):
        compile(_model(), pipeline="quantize-dynamic", evaluate=metric, tolerance=Tolerance(metric_drop=1e-4))
    with pytest.raises(VerificationError, match="evaluate returned NaN"):
        compile(_model(), pipeline="canonicalize", evaluate=lambda _: float("nan"))


def _without(kernel: str) -> Target:
    whole = Target.cpu()
    return Target(
        "cpu", whole.provider, whole.opset, whole.carriers, low_bit_kernels=whole.low_bit_kernels - {kernel}
    )


def test_an_unrealised_layer_goes_back_to_float_and_the_pipeline_says_so() -> None:
    """A target that does not count MatMulNBits as a low-bit kernel stands for a runtime that fell back."""
    artifact = compile(_model(), pipeline="quantize-weights", target=_without("MatMulNBits"))
    assert [node.op_type for node in artifact.model.graph] == ["MatMul", "Relu", "MatMul"]
    assert "quantize-weights{exclude=[first,second]}" in artifact.manifest["pipeline"]
    (record,) = [record for record in artifact.records if record.text.startswith("quantize-weights")]
    assert record.skipped == (("first", "excluded by option"), ("second", "excluded by option"))


def test_an_unrealised_layer_may_be_kept_or_be_an_error() -> None:
    kept = compile(
        _model(), pipeline="quantize-weights", target=_without("MatMulNBits"), unrealised=Unrealised.KEEP
    )
    assert {layer: item["low_bit"] for layer, item in kept.manifest["realised"].items()} == {
        "first": False,
        "second": False,
    }
    with pytest.raises(PassFailedError, match="run in no low-bit kernel; the first is 'first'"):
        compile(
            _model(), pipeline="quantize-weights", target=_without("MatMulNBits"), unrealised=Unrealised.ERROR
        )


def test_a_weight_that_stays_dequantized_is_seen() -> None:
    """The runtime leaves DequantizeLinear + MatMul where the scales run along K: its own graph says so."""
    from splitfold.compiler.realisation import read_realisation
    from splitfold.passes.pipeline import PassRecord

    model = ir.from_onnx_text(
        """<ir_version: 8, opset_import: ["": 17]>
        two (float[n, 32] x) => (float[n, 64] y)
        { w = DequantizeLinear<axis=0>(Wq, s, z) y = MatMul(x, w) }""",
        initializers=[
            ir.tensor(np.ones((32, 64), np.int8), name="Wq"),
            ir.tensor(np.linspace(1, 2, 32, dtype=np.float32), name="s"),
            ir.tensor(np.zeros(32, np.int8), name="z"),
        ],
    )
    record = PassRecord("by-hand", "lossy", True, 1, 2, 0, 0, carried={"layer": ["Wq"]})
    (found,) = read_realisation(model, [record], Target.cpu())
    assert (found.kernel, found.realised) == ("DequantizeLinear", False)


def test_required_application() -> None:
    with pytest.raises(PassFailedError, match="nothing was applied"):
        compile(_model(), pipeline="quantize-embeddings{require=some}")
    with pytest.raises(PassFailedError, match=r"1 candidates were skipped \(second: excluded by option\)"):
        compile(_model(), pipeline="quantize-dynamic{exclude=[second],require=all}")
    with pytest.raises(SpecError, match=r"no layer matches 'secnd'\. Did you mean 'second'"):
        compile(_model(), pipeline="quantize-dynamic{exclude=[secnd]}")


def test_observers_are_told_of_each_pass() -> None:
    class Told:
        def __init__(self) -> None:
            self.texts: list[str] = []

        def before_pass(self, step: Pass, model: ir.Model, index: int, total: int) -> None:
            self.texts.append(f"before {step} {index + 1}/{total}")

        def after_pass(self, step: Pass, model: ir.Model, record):  # type: ignore[no-untyped-def]
            assert record.deviation is None or record.deviation.cosine > 0.9
            self.texts.append(f"after {record.text}")
            return record

    told = Told()
    compile(_model(), pipeline="quantize-dynamic", observers=[told])
    assert told.texts == [
        "before canonicalize 1/3",
        "after canonicalize",
        "before quantize-dynamic 2/3",
        "after quantize-dynamic",
        "before legalize 3/3",
        "after legalize",
    ]


@pytest.mark.parametrize("middle", ["Conv<pads=[1,1,1,1]>", "ConvTranspose<pads=[1,1,1,1]>"])
def test_an_excluded_convolution_stays_float_in_the_runtime(middle: str) -> None:
    """Left to itself the runtime quantizes a float convolution between integer ones."""
    names = ("first", "middle", "last")
    text = f"""<ir_version: 8, opset_import: ["": 17]> three (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y)
        {{ a = Conv<pads=[1,1,1,1]>(x, W0) b = {middle}(a, W1) y = Conv<pads=[1,1,1,1]>(b, W2) }}"""
    weights = [
        ir.tensor(RNG.standard_normal((4, 4, 3, 3)).astype(np.float32), name=f"W{index}")
        for index in range(3)
    ]
    model = ir.from_onnx_text(text, initializers=weights)
    for node, name in zip(model.graph, names, strict=True):
        node.name = name
    feeds = [{"x": RNG.standard_normal((1, 4, 8, 8)).astype(np.float32)}]
    exclude = "{exclude=[middle]}" if middle.startswith("Conv<") else ""
    artifact = compile(model, pipeline=f"quantize-activations{exclude}", calibration=feeds)
    executed = optimized_graph(artifact.model, artifact.target)
    integers = {
        name
        for name, value in executed.graph.initializers.items()
        if value.dtype in (ir.DataType.INT8, ir.DataType.UINT8)
    }
    assert not [name for name in integers if name.startswith(("W1", "middle"))]
    assert sum(node.op_type == "QLinearConv" for node in executed.graph) == 2
