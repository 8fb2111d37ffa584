# SPDX-License-Identifier: Apache-2.0
"""OpenVINO as a target: what is said where it lacks, what is written for it, and, where it is there, that it
runs."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from attention_graphs import attention_graph
from command_line import Run, assert_failed
from onnx import helper
from small import WIDTH, initializer, mlp, model_of, samples, saved

from splitfold.compiler import Tolerance, compile, presets
from splitfold.compiler.build import complete
from splitfold.compiler.realisation import read_realisation
from splitfold.compiler.replay import replay
from splitfold.passes.base import Context
from splitfold.passes.pipeline import Pipeline
from splitfold.passes.quantize_activations import QuantizeActivationsPass
from splitfold.passes.quantize_dynamic import QuantizeDynamicPass
from splitfold.passes.static_int8 import StaticForm
from splitfold.runtime import openvino, session
from splitfold.runtime.artifact import Artifact
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.errors import ProviderError, SessionError
from splitfold.runtime.placement import PlacedNode, Placement
from splitfold.runtime.session import Optimization, Session, optimized_graph, usable
from splitfold.runtime.target import CPU_PROVIDER, OPENVINO_PROVIDER, Arithmetic, Carrier, Target

OPENVINO = Target.openvino()
ELSEWHERE = dataclasses.replace(
    OPENVINO, provider=CPU_PROVIDER, compiles=False, low_bit_kernels=Target.cpu().low_bit_kernels
)
"""Its carriers, run by the CPU provider: what passes write for it."""
FEEDS = {"x": samples(8)}
CALIBRATION = [{"x": samples(8)}, {"x": samples(16)}]
REASON = openvino.why_no_openvino()
needs_provider = pytest.mark.skipif(bool(REASON), reason=REASON)
REGISTER = openvino._register
LOOSE = Tolerance(cosine=None)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A process in which nothing was registered or warned of yet."""
    REGISTER.cache_clear()
    session._warn_once.cache_clear()
    monkeypatch.setattr(openvino, "_BUILT_IN", False)
    monkeypatch.setattr(openvino, "_devices", list)
    yield monkeypatch
    REGISTER.cache_clear()


@pytest.fixture
def absent(fresh: pytest.MonkeyPatch) -> None:
    fresh.setitem(sys.modules, openvino._MODULE, None)


@pytest.fixture
def no_device(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(openvino, "_register", lambda: None)


def _norm() -> Any:
    """The layers of `mlp` with an operator between them that OpenVINO's provider leaves alone."""
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"], name="/up/MatMul"),
        helper.make_node("FastGelu", ["h"], ["g"], name="/act/FastGelu", domain="com.microsoft"),
        helper.make_node("MatMul", ["g", "w2"], ["y"], name="/down/MatMul"),
    ]
    weights = [initializer("w1", WIDTH, 64), initializer("w2", 64, 8, seed=1)]
    return model_of(nodes, weights, domains=["com.microsoft"])


@pytest.mark.usefixtures("absent")
def test_without_the_package_the_extra_is_named(tmp_path: Path, run: Run) -> None:
    with pytest.raises(ProviderError, match=r'pip install "splitfold\[openvino\]"'):
        compile(mlp(), FEEDS, target=OPENVINO)
    with pytest.raises(ProviderError, match="openvino-or-cpu"):
        Session(ir.from_proto(mlp()), OPENVINO)
    model = saved(mlp(), tmp_path / "m.onnx")
    result = run("compile", model, "-o", tmp_path / "out", "--target", "openvino", code=1)
    assert_failed(result, "provider error", "splitfold[openvino]")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_device")
def test_a_processor_that_the_plug_in_refuses_is_named() -> None:
    from splitfold.runtime.costs.machine import processor_name

    with pytest.raises(ProviderError, match="offers no CPU device") as caught:
        Session(ir.from_proto(mlp()), OPENVINO)
    assert processor_name() in str(caught.value)
    assert "onnxruntime-openvino" in str(caught.value)


def test_a_library_of_another_runtime_is_quoted(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / "libbroken.so"
    library.write_bytes(b"no library")
    module = type("Module", (), {"get_library_path": staticmethod(lambda: str(library))})
    fresh.setitem(sys.modules, openvino._MODULE, module)
    with pytest.raises(ProviderError, match="does not fit onnxruntime"):
        Session(ir.from_proto(mlp()), OPENVINO)


@pytest.mark.usefixtures("absent")
def test_it_falls_back_where_that_was_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "splitfold"):
        made = compile(
            mlp(), pipeline=presets.int8(), calibration=CALIBRATION, target=Target.openvino(or_cpu=True)
        )
        opened = Session(made.model, Target.openvino(or_cpu=True))
    assert [record for record in caplog.messages if "falls back to the CPU provider" in record]
    assert sum("falls back" in text for text in caplog.messages) == 1
    assert made.manifest["target"] == "cpu"
    assert "placement" not in made.manifest
    assert opened.placement is None
    assert set(opened.run(FEEDS)) == {"y"}
    assert usable(Target.cpu()) == Target.cpu()


@pytest.mark.usefixtures("absent")
def test_nodes_as_written_run_on_the_cpu_provider() -> None:
    model = ir.from_proto(mlp())
    found = Session(model, OPENVINO, optimization=Optimization.OFF)
    expected = Session(model, optimization=Optimization.OFF).run(FEEDS)["y"]
    np.testing.assert_array_equal(found.run(FEEDS)["y"], expected)


@pytest.mark.parametrize("arithmetic", Arithmetic)
@pytest.mark.parametrize("or_cpu", [False, True])
def test_its_name_is_the_whole_target(arithmetic: Arithmetic, or_cpu: bool) -> None:
    target = Target.openvino(arithmetic=arithmetic, or_cpu=or_cpu)
    assert Target.named(target.name) == target
    assert target.arithmetic is arithmetic


@pytest.mark.parametrize(
    ("arithmetic", "threads", "written"),
    [
        (Arithmetic.F32, 0, {"INFERENCE_PRECISION_HINT": "f32"}),
        (Arithmetic.BF16, 3, {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": 3}),
    ],
)
def test_precision_and_threads_are_always_written(
    arithmetic: Arithmetic, threads: int, written: dict[str, Any], fresh: pytest.MonkeyPatch
) -> None:
    given: list[tuple[list[object], dict[str, str]]] = []
    options = type("Options", (), {"add_provider_for_devices": lambda self, *call: given.append(call)})()
    fresh.setattr(openvino, "_devices", lambda: ["processor"])
    assert openvino.add_openvino(options, arithmetic, threads) is None
    ((devices, configuration),) = given
    assert devices == ["processor"]
    assert json.loads(configuration["load_config"]) == {"CPU": written}
    fresh.setattr(openvino, "_devices", list)
    fresh.setattr(openvino, "_BUILT_IN", True)
    ((provider, built_in),) = openvino.add_openvino(options, arithmetic, threads) or []
    assert provider == OPENVINO_PROVIDER
    assert built_in == configuration | {"device_type": "CPU"}


def test_int8_is_standard_qdq() -> None:
    made = compile(mlp(), pipeline=presets.int8(), calibration=CALIBRATION, target=ELSEWHERE, tolerance=LOOSE)
    records = {record.text.partition("{")[0]: record for record in made.records}
    assert records["quantize-activations"].applied
    assert any("written as qdq" in note for note in records["quantize-activations"].notes)
    operators = [node.op_type for node in made.model.graph]
    assert {node.domain for node in made.model.graph} == {""}
    assert "DynamicQuantizeLinear" not in operators


def test_its_preset_has_no_dynamic_int8_to_fall_back_to() -> None:
    (static,) = [step for step in presets.int8(OPENVINO) if isinstance(step, QuantizeActivationsPass)]
    (on_cpu,) = [step for step in presets.int8() if isinstance(step, QuantizeActivationsPass)]
    (dynamic,) = [step for step in presets.int8() if isinstance(step, QuantizeDynamicPass)]
    assert static.min_sqnr == dynamic.min_sqnr < on_cpu.min_sqnr
    assert (static.form, on_cpu.form) == (StaticForm.QDQ, StaticForm.INTEGER)
    assert presets.preset("int8", OPENVINO) == presets.int8(OPENVINO)
    assert presets.preset("int4", OPENVINO) == presets.int4()
    assert complete(None, OPENVINO) == complete(presets.int8(OPENVINO))


def test_a_layer_it_has_no_kernel_for_stays_float() -> None:
    model = ir.from_proto(mlp())
    (record,) = Pipeline.parse("quantize-dynamic").run(model, Context(ELSEWHERE, Calibration.of(CALIBRATION)))
    assert not record.modified
    assert {reason for _, reason in record.skipped} == {"target openvino has no dynamic int8 kernels"}
    attention, _ = attention_graph()
    (record,) = Pipeline.parse("fuse-attention").run(attention, Context(ELSEWHERE, None))
    assert not record.modified
    assert {reason for _, reason in record.skipped} == {"target openvino has no kernel for Attention"}


def test_placement_tells_what_is_left() -> None:
    gelu = PlacedNode("act", "com.microsoft::FastGelu")
    nodes = {OPENVINO_PROVIDER: (PlacedNode("up", "MatMul"),), CPU_PROVIDER: (gelu,) * 25}
    found = Placement(OPENVINO_PROVIDER, nodes, 2)
    assert str(found) == (
        "25 of 26 nodes run on the CPU provider, not on OpenVINO: 25 com.microsoft::FastGelu"
    )
    values = found.values()
    assert values["nodes"] == {OPENVINO_PROVIDER: 1, CPU_PROVIDER: 25}
    assert values["left"][0] == "com.microsoft::FastGelu 'act'"
    assert values["left"][20:] == ["and 5 more"]
    assert str(Placement(OPENVINO_PROVIDER, {OPENVINO_PROVIDER: (gelu,)}, 1)) == "all 1 nodes run on OpenVINO"


def test_a_layer_on_the_cpu_provider_is_not_realised(monkeypatch: pytest.MonkeyPatch) -> None:
    made = compile(
        mlp(), pipeline="quantize-activations", calibration=CALIBRATION, target=ELSEWHERE, tolerance=LOOSE
    )
    assert {item["kernel"] for item in made.manifest["realised"].values()} != {"OpenVINO"}
    down = made.model.graph.outputs[0].producer()
    assert down is not None
    left = Placement(OPENVINO_PROVIDER, {CPU_PROVIDER: (PlacedNode(down.name or "", down.op_type),)}, 1)
    opened = type("Opened", (), {"placement": left})()
    monkeypatch.setattr("splitfold.compiler.realisation.Session", lambda *_: opened)
    found = {item.layer: item for item in read_realisation(made.model, made.records, OPENVINO)}
    assert found["encoder.up"].realised
    assert found["encoder.up"].kernel == "OpenVINO"
    assert not found["encoder.down"].realised
    assert "on the CPU provider" in found["encoder.down"].kernel


def test_kernels_can_neither_be_listed_nor_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(session, "why_no_openvino", lambda: "")
    with pytest.raises(SessionError, match="cannot be listed"):
        optimized_graph(ir.from_proto(mlp()), OPENVINO)
    with pytest.raises(SessionError, match="no kernel can be timed"):
        Session(ir.from_proto(mlp()), OPENVINO, profile=tmp_path)


@needs_provider
def test_floats_are_as_on_the_cpu_provider() -> None:
    model = ir.from_proto(mlp())
    expected = Session(model).run(FEEDS, ["r"])
    opened = Session(model, OPENVINO, threads=1, taps=["r"])
    found = opened.run(FEEDS, ["r"])
    for name in ("y", "r"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5)
    assert opened.placement is not None
    assert not opened.placement.left


@needs_provider
def test_an_artifact_runs_where_it_was_compiled_for(tmp_path: Path) -> None:
    made = compile(mlp(), pipeline=presets.int8(), calibration=CALIBRATION, target=OPENVINO, speed=None)
    assert {item["kernel"] for item in made.manifest["realised"].values()} == {"OpenVINO"}
    assert made.manifest["placement"]["left"] == []
    assert made.manifest["deviation"]["y"]["cosine"] > 0.99
    folder = made.save(tmp_path / "out")
    loaded = Artifact.load(folder)
    assert loaded.target == OPENVINO
    opened = loaded.session(threads=1)
    assert opened.placement is not None
    assert opened.placement.nodes.keys() == {OPENVINO_PROVIDER}
    reference = Session(ir.from_proto(mlp())).run(FEEDS)["y"]
    assert np.corrcoef(opened.run(FEEDS)["y"].ravel(), reference.ravel())[0, 1] > 0.99
    assert replay(folder, mlp(), calibration=CALIBRATION).same_model


@needs_provider
def test_what_it_does_not_run_is_on_record(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "splitfold"):
        made = compile(_norm(), pipeline=presets.int8(), calibration=CALIBRATION, target=OPENVINO, speed=None)
    assert any("FastGelu" in name for name in made.manifest["placement"]["left"])
    assert made.manifest["placement"]["parts"] == 2
    assert any("not on OpenVINO" in text and "FastGelu" in text for text in caplog.messages)


@needs_provider
@pytest.mark.parametrize(
    ("text", "carrier"),
    [
        ("quantize-activations", Carrier.STATIC_QDQ),
        ("quantize-weights{bits=4}", Carrier.MATMUL_NBITS),
        ("quantize-weights{bits=4,form=qdq}", Carrier.BLOCKED_DEQUANTIZE),
    ],
)
def test_every_carrier_runs_there_and_gives_the_same_numbers(text: str, carrier: Carrier) -> None:
    assert OPENVINO.carries(carrier)
    made = compile(
        mlp(), pipeline=text, calibration=CALIBRATION, target=OPENVINO, tolerance=LOOSE, speed=None
    )
    assert made.manifest["placement"]["left"] == []
    found, expected = Session(made.model, OPENVINO).run(FEEDS)["y"], Session(made.model).run(FEEDS)["y"]
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


@needs_provider
def test_the_command_line_compiles_compares_and_times(tmp_path: Path, run: Run) -> None:
    model = saved(mlp(), tmp_path / "m.onnx")
    data = tmp_path / "data.npz"
    np.savez(data, x=samples(16))
    out = tmp_path / "out"
    at = ("--target", "openvino")
    result = run("compile", model, "-o", out, "--calibration", data, *at, "--speed-seconds", "0.2")
    assert "OpenVINO" in result.stdout
    run("compare", model, out, "--data", data, *at, "--tolerance", "cosine=0.99")
    timed = run("bench", model, out, "--data", data, "--runs", 3, *at)
    assert "target openvino" in timed.stdout
