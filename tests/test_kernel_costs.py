# SPDX-License-Identifier: Apache-2.0
"""Kernel costs: what is measured, interpolated, kept in files and used; no test depends on a clock."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from command_line import Run, assert_failed
from small import WIDTH, mlp, samples
from test_kernel_models import KERNELS, SMALL

from splitfold.compiler.target_costs import known_costs, measure_costs, model_cases
from splitfold.passes.base import Context
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.carry_out import Carrying
from splitfold.passes.estimated_times import carrier_kernel, estimate_times
from splitfold.passes.layers import find_layers
from splitfold.passes.limits import Limit, Unit
from splitfold.passes.planning import Request, allocate
from splitfold.passes.precision import Precision
from splitfold.passes.signals.measured import Sensitivity
from splitfold.passes.signals.subject import find_subject
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.costs.builder import Built
from splitfold.runtime.costs.file import read_costs, shipped_costs, write_costs
from splitfold.runtime.costs.grid import common_cases
from splitfold.runtime.costs.interpolation import interpolated
from splitfold.runtime.costs.kernel import AXES, Case, Form, Kernel, Operation
from splitfold.runtime.costs.machine import Machine
from splitfold.runtime.costs.measure import SessionMeter, measure_cases
from splitfold.runtime.costs.models import FORMS, case_model
from splitfold.runtime.costs.table import KernelCosts, Sample
from splitfold.runtime.errors import ArtifactError, SessionError
from splitfold.runtime.target import Target

MACHINE = Machine("a processor", 2, 0, "1.0")


def _sample(milliseconds: float) -> Sample:
    return Sample(milliseconds, milliseconds, milliseconds, 3)


# --- interpolation ---


def test_measured_shapes_are_given_back_and_power_laws_are_followed() -> None:
    def law(shape: Sequence[int]) -> float:
        return 3e-6 * shape[0] ** 0.8 * shape[1] ** 1.1 * shape[2] ** 0.9

    grid = {(m, k, n): law((m, k, n)) for m in (1, 16, 256) for k in (64, 512) for n in (64, 512)}
    for shape, time in grid.items():
        assert interpolated(Operation.MATMUL, shape, grid) == time
    for shape in ((4, 100, 300), (100, 384, 384), (300, 600, 60)):
        assert interpolated(Operation.MATMUL, shape, grid) == pytest.approx(law(shape), rel=0.01)


def test_one_point_grows_with_the_work_and_estimates_are_continuous() -> None:
    assert interpolated(Operation.MATMUL, (20, 30, 50), {(10, 30, 50): 2.0}) == pytest.approx(4.0)
    times = {(10, 64, 64): 1.0, (100, 64, 64): 3.0, (1000, 640, 64): 400.0}
    for shape, time in times.items():
        near = (shape[0] + 1, *shape[1:])
        assert interpolated(Operation.MATMUL, near, times) == pytest.approx(time, rel=0.2)


def test_a_kernel_that_does_not_grow_stays_where_it_is() -> None:
    times = {(1,): 0.01, (10,): 0.01, (100,): 0.01}
    assert interpolated(Operation.CAST, (30,), times) == pytest.approx(0.01, rel=0.02)


def test_an_estimate_says_how_far_it_reaches() -> None:
    kernel = Kernel(Operation.MATMUL)
    costs = KernelCosts(
        MACHINE, {Case(kernel, (8, 64, 64)): _sample(1.0), Case(kernel, (64, 64, 64)): _sample(8.0)}
    )
    exact = costs.estimate(kernel, (8, 64, 64))
    assert exact is not None
    assert (exact.milliseconds, exact.measured) == (1.0, True)
    far = costs.estimate(kernel, (64, 64, 640))
    assert far is not None
    assert not far.measured
    assert far.factor == pytest.approx(10)
    assert costs.estimate(Kernel(Operation.CONV), SMALL[Operation.CONV]) is None
    with pytest.raises(ValueError, match="rows, depth, columns"):
        costs.estimate(kernel, (1,))


# --- measuring ---


class _Meter:
    """Gives each model its milliseconds by the types of its nodes, and 0.5 for a call."""

    def __init__(self, broken: str = "", disturbed: int = 0) -> None:
        self.calls: list[int] = []
        self.broken, self.disturbed = broken, disturbed

    def __call__(self, models: Sequence[Built]) -> list[list[float] | str]:
        self.calls.append(len(models))
        load = 1.0 if len(self.calls) > self.disturbed else 40.0
        found: list[list[float] | str] = []
        for item in models:
            kinds = [node.op_type for node in item.model.graph]
            if self.broken in kinds:
                found.append("no such kernel")
            else:
                time = 0.5 + (0.0 if kinds == ["Identity"] else len(kinds))
                found.append([time, time * load, time * load])
        return found


def test_an_empty_call_is_taken_off_and_forms_are_timed_side_by_side() -> None:
    meter = _Meter()
    found = measure_cases([Case(kernel, SMALL[kernel.operation]) for kernel in KERNELS], meter)
    assert meter.calls == [1 + len(kernels) for kernels in FORMS.values()]
    assert found.samples[Case(Kernel(Operation.MATMUL), SMALL[Operation.MATMUL])].milliseconds == 1.0
    quantized = Case(Kernel(Operation.MATMUL, Form.STATIC_INT8), SMALL[Operation.MATMUL])
    assert found.samples[quantized].milliseconds == 2.0
    assert not found.failed


def test_a_disturbed_group_is_measured_again_and_the_calmest_counts() -> None:
    case = Case(Kernel(Operation.CAST), (100,))
    calm = _Meter(disturbed=1)
    found = measure_cases([case], calm)
    assert len(calm.calls) == 2
    assert found.samples[case].milliseconds == 1.0
    never = _Meter(disturbed=99)
    found = measure_cases([case], never, again=2)
    assert len(never.calls) == 3
    assert found.samples[case].milliseconds > 1.0


def test_what_does_not_run_is_named_and_the_rest_is_measured() -> None:
    cases = [Case(kernel, SMALL[Operation.NORM]) for kernel in FORMS[Operation.NORM]]
    found = measure_cases(cases, _Meter(broken="SkipLayerNormalization"))
    assert dict(found.failed) == {cases[1]: "no such kernel"}
    assert set(found.samples) == {cases[0]}
    with pytest.raises(SessionError, match="no such kernel"):
        measure_cases(cases, _Meter(broken="Identity"))


def test_sessions_are_timed_by_any_clock_for_a_bounded_time() -> None:
    ticks = iter(range(10**9))
    meter = SessionMeter(Target.cpu(), seconds=20, clock=lambda: float(next(ticks)))
    built = case_model(Case(Kernel(Operation.CAST), (100,)))
    broken = Built(ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 99}), ir_version=10), {})
    fine, wrong, other = meter([built, broken, built])
    assert isinstance(wrong, str)
    assert isinstance(fine, list)
    assert isinstance(other, list)
    assert set(fine) == {1000.0}
    assert 3 <= len(fine) == len(other) <= 8


def test_only_what_is_missing_is_measured() -> None:
    case, more = Case(Kernel(Operation.CAST), (100,)), Case(Kernel(Operation.CAST), (200,))
    known = KernelCosts(MACHINE, {case: _sample(7.0)})
    found = measure_costs(known, [case, more, more], _Meter())
    assert (found.measured, found.known) == (1, 1)
    assert found.costs.samples[case].milliseconds == 7.0
    assert found.costs.samples[more].milliseconds == 1.0


# --- files ---


def test_costs_come_back_from_their_file(tmp_path: Path) -> None:
    cases = {
        Case(kernel, SMALL[kernel.operation]): _sample(0.125 * at) for at, kernel in enumerate(KERNELS, 1)
    }
    costs = KernelCosts(MACHINE, cases)
    read = read_costs(write_costs(costs, tmp_path / "new" / "target.json"))
    assert (read.machine, dict(read.samples)) == (MACHINE, cases)
    assert sorted(item.name for item in (tmp_path / "new").iterdir()) == ["target.json"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no kernel costs"),
        ("[1]", "format 1"),
        ('{"format": 9}', "format 1 (9)"),
        ('{"format": 1}', "machine"),
        ('{"format": 1, "machine": {"processor": "p", "cores": 1}, "samples": []}', "runtime"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "target.json"
    file.write_text(text)
    with pytest.raises(ArtifactError) as caught:
        read_costs(file)
    assert said in str(caught.value)
    assert "calibrate-target" in str(caught.value)


def test_times_that_are_none_and_shapes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    case = Case(Kernel(Operation.CAST), (100,))
    file = write_costs(KernelCosts(MACHINE, {case: _sample(1.0)}), tmp_path / "target.json")
    held = json.loads(file.read_text())
    for changed in ({"milliseconds": -1.0}, {"shape": [1, 2]}, {"kernel": "cast/none"}):
        file.write_text(json.dumps({**held, "samples": [{**held["samples"][0], **changed}]}))
        with pytest.raises(ArtifactError, match="holds no kernel costs"):
            read_costs(file)
    with pytest.raises(ArtifactError, match="cannot read"):
        read_costs(tmp_path / "absent.json")


def test_a_file_from_another_machine_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = Case(Kernel(Operation.CAST), (100,))
    here = Machine.here()
    same = write_costs(KernelCosts(here, {case: _sample(1.0)}), tmp_path / "same.json")
    other = dataclasses.replace(here, processor="another one", runtime="0.9")
    foreign = write_costs(KernelCosts(other, {case: _sample(1.0)}), tmp_path / "other.json")
    with caplog.at_level(logging.WARNING, "splitfold"):
        assert Target.cpu().with_costs(same).costs is not None
        assert dict(known_costs(same, here).samples) == {case: _sample(1.0)}
        assert not caplog.text
        assert Target.cpu().with_costs(foreign).costs is not None
        assert "processor another one, here" in caplog.text
        assert "runtime 0.9, here" in caplog.text
        assert not known_costs(foreign, here).samples
    assert not known_costs(tmp_path / "absent.json", here).samples


def test_the_shipped_costs_hold_the_common_cases() -> None:
    costs = shipped_costs()
    assert not costs.missing(common_cases())
    for operation, kernels in FORMS.items():
        for kernel in kernels:
            found = costs.estimate(kernel, tuple(7 for _ in AXES[operation]))
            assert found is not None
            assert 0 < found.milliseconds < math.inf


# --- targets, models, plans ---


def test_a_target_measures_itself_once() -> None:
    cases = [Case(kernel, SMALL[Operation.NORM]) for kernel in FORMS[Operation.NORM]]
    meter = _Meter()
    target = Target.cpu().measure(cases, meter=meter)
    assert target.costs is not None
    assert set(target.costs.samples) == set(cases)
    assert target.measure(cases, meter=meter).costs is not None
    assert len(meter.calls) == 1
    assert target == Target.cpu()
    assert Target.cpu().costs is None


def test_a_model_names_its_shapes() -> None:
    model = ir.from_proto(mlp())
    cases, unknown = model_cases(model, {"x": samples(6)}, Target.cpu())
    assert not unknown
    shapes = {case.shape for case in cases if case.kernel.operation is Operation.MATMUL}
    assert shapes == {(6, WIDTH, 64), (6, 64, 8)}
    assert {case.shape for case in cases if case.kernel.operation is Operation.DEQUANTIZE} == {(384,), (48,)}
    kernels = {case.kernel for case in cases if case.kernel.operation is Operation.MATMUL}
    assert kernels == set(FORMS[Operation.MATMUL])


def _allocation(costs: KernelCosts | None) -> tuple[Any, Context, ir.Model]:
    model = ir.from_proto(mlp())
    CanonicalizePass()(model)
    target = dataclasses.replace(Target.cpu(), costs=costs)
    return find_layers(model)[0], Context(target, Calibration.of([{"x": samples(8)}])), model


def _costs(prices: dict[str, float]) -> KernelCosts:
    shapes = ((8, WIDTH, 64), (8, 64, 8))
    return KernelCosts(
        MACHINE,
        {
            Case(Kernel.parse(f"matmul/{form}"), shape): _sample(ms)
            for form, ms in prices.items()
            for shape in shapes
        },
    )


def test_a_budget_in_milliseconds_uses_the_costs_of_the_target() -> None:
    costs = _costs({"fp32": 1.0, "int8-dynamic": 0.25, "blocks-w4-b32-l4-zp": 3.0})
    layers, context, model = _allocation(costs)
    choices = (Precision.float(), Precision.int8_dynamic(), Precision.blocks(4))
    found = allocate(model, layers, Request(choices, Sensitivity()), context, [Limit(1, Unit.MILLISECONDS)])
    assert found.times is not None
    for layer in ("encoder.up", "encoder.down"):
        assert dict(found.times.more[layer]) == {choices[0]: 0.0, choices[1]: -0.75, choices[2]: 2.0}


def test_estimates_are_not_used_where_a_kernel_is_missing_or_far() -> None:
    choices = (Precision.float(), Precision.int8_dynamic(), Precision.blocks(4))
    few = _costs({"fp32": 1.0, "int8-dynamic": 0.25})
    layers, context, model = _allocation(few)
    subject = find_subject(model, layers, choices, context, Carrying())
    assert estimate_times(subject, few) is None
    kernel = [Kernel(Operation.MATMUL), Kernel(Operation.MATMUL, Form.DYNAMIC_INT8), Kernel.blocks(4, 32)]
    far = KernelCosts(MACHINE, {Case(item, (4096, 4096, 4096)): _sample(9.0) for item in kernel})
    assert estimate_times(subject, far) is None


def test_precisions_name_their_kernels() -> None:
    layer = find_layers(_allocation(None)[2])[0][0]
    named = {
        "fp32": "matmul/fp32",
        "int8-static": "matmul/int8-static",
        "int8-dynamic": "matmul/int8-dynamic",
        "w4": "matmul/blocks-w4-b32-l4-zp",
        "w3": "matmul/blocks-w4-b32-l4-zp",
        "w2-b128-sym": "matmul/blocks-w2-b128-l4",
    }
    for word, kernel in named.items():
        assert str(carrier_kernel(layer, Precision.parse(word))) == kernel
    assert carrier_kernel(layer, Precision.parse("sim-w4")) is None


# --- the command ---


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> _Meter:
    """Let the command measure without a clock."""
    made = _Meter()
    monkeypatch.setattr(
        "splitfold.compiler.cli.calibrate_target_command.SessionMeter", lambda *args, **options: made
    )
    return made


def test_the_command_measures_a_model_once_and_compile_takes_the_file(run: Run, meter: _Meter) -> None:
    arguments = ("calibrate-target", "-o", "target.json", "--model", "model.onnx", "--data", "data.npz")
    first = run(*arguments, "--batch", 8).output
    assert "0 were known" in first
    assert "8x32x64" in first
    calls = len(meter.calls)
    assert "measured    0 kernels at shapes" in run(*arguments, "--batch", 8).output
    assert len(meter.calls) == calls
    run(*arguments, "--batch", 8, "--again")
    assert len(meter.calls) == 2 * calls
    assert {case.shape[0] for case in read_costs("target.json").samples if len(case.shape) == 3} == {8}
    told = run(
        "compile", "model.onnx", "-o", "out", "--preset", "int8-dynamic", "--target", "target.json"
    ).output
    assert "written" in told
    broken = Path("broken.json")
    broken.write_text("{")
    failed = run("compile", "model.onnx", "-o", "o", "--preset", "exact", "--target", "broken.json", code=1)
    assert_failed(failed, "broken.json holds no kernel costs")


def test_interruption_leaves_the_file_as_it_was(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **options: object) -> object:
        def meter(models: object) -> object:
            raise KeyboardInterrupt

        return meter

    monkeypatch.setattr("splitfold.compiler.cli.calibrate_target_command.SessionMeter", interrupted)
    before = sorted(item.name for item in Path().iterdir())
    run("calibrate-target", "-o", "target.json", "--model", "model.onnx", "--data", "data.npz", code=130)
    assert sorted(item.name for item in Path().iterdir()) == before
