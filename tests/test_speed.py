# SPDX-License-Identifier: Apache-2.0
"""Never slower: what a compilation does with a result that is slower, by stopwatches that need no clock."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import onnx
import pytest
from command_line import Run
from onnx import helper, numpy_helper
from small import WIDTH, initializer, mlp, model_of, samples, saved
from stopwatches import Even, Priced

from splitfold.compiler import IfSlower, SpeedCheck, compile, presets
from splitfold.compiler.compiled import Compiled
from splitfold.compiler.replay import replay
from splitfold.compiler.speed.stopwatch import LayerTime
from splitfold.runtime.digest import content_digest
from splitfold.runtime.errors import SessionError

FEEDS = {"x": samples(8)}
UP, DOWN = "encoder.up", "encoder.down"
PRICES = {"MatMul": 1.0}


def _compile(prices: dict[str, float], model: Any = None, **options: Any) -> Compiled:
    check = options.pop("check", SpeedCheck())
    check = dataclasses.replace(check, stopwatch=Priced(PRICES | prices))
    return compile(
        mlp() if model is None else model, FEEDS, **{"pipeline": presets.int4()} | options, speed=check
    )


def _operators(compiled: Compiled) -> dict[str, int]:
    found: dict[str, int] = {}
    for node in compiled.model.graph:
        found[node.op_type] = found.get(node.op_type, 0) + 1
    return found


def test_a_faster_result_stays() -> None:
    found = _compile({"MatMulNBits": 0.25})
    assert _operators(found)["MatMulNBits"] == 2
    assert found.speed is not None
    assert found.speed.race is not None
    assert found.speed.race.ratio == 4.0
    assert (found.speed.first, found.speed.slow, found.speed.put_back) == (None, (), ())
    assert "too_slow" not in found.manifest
    assert found.speed.statement.startswith("4.00x (2.000 > 0.500 ms)")


def test_only_the_slower_layers_go_back(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "splitfold"):
        found = _compile({f"{UP}/MatMulNBits": 3.0, f"{DOWN}/MatMulNBits": 0.5})
    assert _operators(found) | {"MatMul": 1, "MatMulNBits": 1} == _operators(found)
    assert found.speed is not None
    assert found.speed.put_back == (UP,)
    assert found.speed.first is not None
    assert found.speed.first.ratio == pytest.approx(2 / 3.5)
    assert found.speed.race is not None
    assert found.speed.race.ratio == pytest.approx(2 / 1.5)
    assert [(item.layers, item.before_us, item.after_us) for item in found.speed.slow] == [
        ((UP,), 1000.0, 3000.0)
    ]
    assert f"quantize-weights{{exclude=[{UP}]}}" in found.manifest["pipeline"]
    assert found.manifest["too_slow"] == {UP: "float"}
    assert "slower than the model: 0.57x" in caplog.text
    assert UP in caplog.text


def test_blocks_go_to_dynamic_int8_first_where_calibration_tells_what_that_costs() -> None:
    prices = {f"{UP}/MatMulNBits": 3.0, f"{DOWN}/MatMulNBits": 0.5, "MatMulInteger": 0.75}
    found = _compile(prices, calibration=[FEEDS])
    assert _operators(found) | {"MatMulInteger": 1, "MatMulNBits": 1} == _operators(found)
    assert found.speed is not None
    assert (found.speed.in_int8, found.speed.put_back) == ((UP,), ())
    assert found.speed.race is not None
    assert found.speed.race.ratio == pytest.approx(2 / 1.25)
    assert f"quantize-dynamic{{only=[{UP}],min-sqnr=15.0}}" in found.manifest["pipeline"]
    assert found.manifest["too_slow"] == {UP: "int8"}


def test_what_is_slower_in_int8_too_goes_back_to_float() -> None:
    found = _compile({"MatMulNBits": 3.0, "MatMulInteger": 2.0}, calibration=[FEEDS])
    assert found.speed is not None
    assert (found.speed.in_int8, found.speed.put_back) == ((), (UP, DOWN))
    assert not {"MatMulInteger", "MatMulNBits"} & set(_operators(found))


def test_a_layer_that_int8_would_spoil_goes_back_to_float() -> None:
    """One feature a thousand times as large as the others leaves a per-tensor grid nothing for those."""
    spoiled = samples(8)
    spoiled[:, 0] *= 1e4
    model = mlp()
    weight = next(item for item in model.graph.initializer if item.name == "w1")
    values = numpy_helper.to_array(weight).copy()
    values[0] = 0.0
    weight.CopyFrom(numpy_helper.from_array(values, "w1"))
    prices = {f"{UP}/MatMulNBits": 3.0, "MatMulInteger": 0.1}
    found = _compile(prices, model=model, calibration=[{"x": spoiled}])
    assert found.speed is not None
    assert (found.speed.in_int8, found.speed.put_back) == ((), (UP,))


def test_all_layers_go_back_where_all_are_slower_and_the_result_is_float() -> None:
    found = _compile({"MatMulNBits": 3.0})
    assert "MatMulNBits" not in _operators(found)
    assert found.speed is not None
    assert found.speed.put_back == (UP, DOWN)
    assert found.speed.race is not None
    assert found.speed.race.ratio == 1.0


def test_all_layers_go_back_where_the_profiler_blames_none() -> None:
    class Blind(Priced):
        def layers(self, *arguments: Any, **options: Any) -> tuple[LayerTime, ...]:
            return ()

    check = SpeedCheck(stopwatch=Blind(PRICES | {"MatMulNBits": 3.0}))
    found = compile(mlp(), FEEDS, pipeline=presets.int4(), speed=check)
    assert found.speed is not None
    assert (found.speed.put_back, found.speed.left_out[0]) == ((UP, DOWN), "quantize-weights")
    assert "MatMulNBits" not in _operators(found)


def test_a_layer_that_goes_back_is_not_taken_up_by_the_next_pass() -> None:
    slow = {"MatMulIntegerToFloat": 3.0, "MatMulInteger": 3.0, f"{DOWN}/MatMulIntegerToFloat": 0.1}
    found = _compile(slow, pipeline=presets.int8(), calibration=[FEEDS])
    assert found.speed is not None
    assert found.speed.put_back == (UP,)
    assert "MatMulInteger" not in _operators(found)
    text = found.manifest["pipeline"]
    for name in ("quantize-activations", "quantize-dynamic", "fold-scales"):
        options = text.partition(f"{name}{{")[2].partition("}")[0] if f"{name}{{" in text else ""
        assert (UP in options) == (name != "fold-scales" or "fold-scales{" in text)


def test_an_exact_pipeline_that_is_slower_leaves_its_passes_out(caplog: pytest.LogCaptureFixture) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="/first/MatMul"),
        helper.make_node("Add", ["h", "r"], ["s"], name="/res/Add"),
        helper.make_node("LayerNormalization", ["s", "g"], ["y"], name="/norm/LayerNormalization", axis=-1),
    ]
    weights = [initializer("w", WIDTH, 8), initializer("g", 8)]
    model = model_of(
        [helper.make_node("MatMul", ["x", "w2"], ["r"], name="/side/MatMul"), *nodes],
        [*weights, initializer("w2", WIDTH, 8)],
    )
    prices = {"Sum": 5.0, "MatMulInteger": 2.0}
    found = _compile(prices, model=model, pipeline=presets.int8_dynamic())
    assert found.speed is not None
    assert "unfuse-norms" in found.speed.left_out
    assert "Sum" not in _operators(found)
    assert found.speed.race is not None
    assert found.speed.race.ratio == 1.0


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"check": SpeedCheck(if_slower=IfSlower.KEEP)}, "as was asked"),
        ({"pipeline": "quantize-weights"}, "the pipeline is your own"),
    ],
)
def test_a_slower_result_stays_where_it_is_to_stay(options: dict[str, Any], why: str) -> None:
    found = _compile({"MatMulNBits": 3.0}, **options)
    assert _operators(found)["MatMulNBits"] == 2
    assert found.speed is not None
    assert found.speed.race is not None
    assert found.speed.race.slower()
    assert why in found.speed.statement
    assert {item.layers for item in found.speed.slow} == {(UP,), (DOWN,)}
    assert found.speed.put_back == ()
    assert "too_slow" not in found.manifest


def test_ones_own_pipeline_changes_where_that_is_asked_for() -> None:
    check = SpeedCheck(if_slower=IfSlower.REPAIR)
    found = _compile({f"{UP}/MatMulNBits": 3.0}, pipeline="quantize-weights", check=check)
    assert found.speed is not None
    assert found.speed.put_back == (UP,)


def test_made_up_sizes_change_nothing() -> None:
    watch = Priced(PRICES | {"MatMulNBits": 3.0})
    kept = compile(mlp(), pipeline=presets.int4(), speed=SpeedCheck(stopwatch=watch))
    assert kept.speed is not None
    assert kept.speed.put_back == ()
    assert "sizes of input 'x' were made up" in kept.speed.statement
    static = compile(mlp(batch=4), pipeline=presets.int4(), speed=SpeedCheck(stopwatch=watch))
    assert static.speed is not None
    assert static.speed.put_back == (UP, DOWN)


def test_what_is_too_large_or_does_not_run_is_not_timed() -> None:
    watch = Priced(PRICES)
    large = compile(mlp(), FEEDS, pipeline=presets.int4(), speed=SpeedCheck(stopwatch=watch, megabytes=0.001))
    assert large.speed is not None
    assert large.speed.race is None
    assert "not measured: the model has 0 MB of weights" in large.speed.statement
    assert watch.asked == []
    custom = model_of(
        [helper.make_node("Foreign", ["x"], ["y"], domain="my.own", name="/foreign/Foreign")],
        [],
        domains=["my.own"],
    )
    found = compile(custom, pipeline=presets.exact(), speed=SpeedCheck(stopwatch=watch))
    assert found.speed is not None
    assert "cannot be run here" in found.speed.statement
    assert watch.asked == []


def test_a_model_that_does_not_open_for_timing_is_told() -> None:
    class Broken(Even):
        def race(self, *arguments: Any, **options: Any) -> Any:
            raise SessionError("no such kernel")

    found = compile(mlp(), FEEDS, pipeline=presets.int4(), speed=SpeedCheck(stopwatch=Broken()))
    assert found.speed is not None
    assert found.speed.statement == "not measured: no such kernel"


def test_nothing_is_timed_where_that_is_asked_for() -> None:
    assert compile(mlp(), FEEDS, pipeline=presets.int4(), speed=None).speed is None


def test_times_are_bounded_and_asked_for_once_where_all_is_well() -> None:
    watch = Priced(PRICES | {"MatMulNBits": 0.5})
    compile(mlp(), FEEDS, pipeline=presets.int4(), speed=SpeedCheck(seconds=0.5, stopwatch=watch))
    assert watch.asked == ["race 0.5"]
    watch = Priced(PRICES | {"MatMulNBits": 9.0})
    compile(mlp(), FEEDS, pipeline=presets.int4(), speed=SpeedCheck(seconds=0.5, stopwatch=watch))
    assert watch.asked == ["race 0.5", "layers", "race 0.5"]


def test_the_fastest_stays_where_nothing_is_fast_enough() -> None:
    """A price that nothing can avoid: the canonical form itself is slower than what was given."""
    found = _compile(
        {"MatMulNBits": 3.0, "MatMul": 1.0, "Relu": 0.0, "Identity": -0.5}, model=_with_identity()
    )
    assert found.speed is not None
    assert found.speed.race is not None
    assert found.speed.race.slower()
    assert "Nothing that was tried is faster" in found.speed.statement
    assert "MatMulNBits" not in _operators(found)


def _with_identity() -> onnx.ModelProto:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="/first/MatMul"),
        helper.make_node("Identity", ["h"], ["i"], name="/same/Identity"),
        helper.make_node("Relu", ["i"], ["y"], name="/act/Relu"),
    ]
    return model_of(nodes, [initializer("w", WIDTH, 8)])


def test_a_replay_of_a_changed_result_gives_the_same_bytes(tmp_path: Path) -> None:
    path = saved(mlp(), tmp_path / "model.onnx")
    found = _compile({f"{UP}/MatMulNBits": 3.0}, model=path)
    again = replay(found.save(tmp_path / "out"), path, FEEDS)
    assert again.same_files
    assert content_digest(again.artifact.model) == content_digest(found.model)


def test_times_stand_in_no_file(tmp_path: Path) -> None:
    one = _compile({"MatMulNBits": 0.5}).save(tmp_path / "one")
    other = _compile({"MatMulNBits": 0.25}).save(tmp_path / "other")
    for name in ("model.onnx", "manifest.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.parametrize("wrong", [{"seconds": 0.0}, {"margin": 1.0}, {"attempts": 0}])
def test_options_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="seconds is positive"):
        SpeedCheck(**wrong)


def _slow_cli(monkeypatch: pytest.MonkeyPatch) -> None:
    check = SpeedCheck(stopwatch=Priced(PRICES | {f"{UP}/MatMulNBits": 3.0}))
    monkeypatch.setattr("splitfold.compiler.driver.SPEED_CHECK", check)


def test_the_command_says_what_was_slower_and_what_went_back(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    _slow_cli(monkeypatch)
    told = run("compile", "model.onnx", "-o", "out", "--preset", "int4", "--inputs", "data.npz").output
    assert "1 layers went back to float" in told
    assert f"{UP}: 1.000 > 3.000 ms" in told
    assert f"back to float: {UP}" in told
    kept = run(
        "compile",
        "model.onnx",
        "-o",
        "kept",
        "--preset",
        "int4",
        "--inputs",
        "data.npz",
        "--if-slower",
        "keep",
    ).output
    assert "It stays as it is, as was asked." in kept
    assert "back to float" not in kept


def test_the_command_times_nothing_with_off_and_refuses_other_words(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    _slow_cli(monkeypatch)
    told = run("compile", "model.onnx", "-o", "out", "--preset", "int4", "--if-slower", "off").output
    assert "speed" not in told.replace("seconds", "")
    refused = run("compile", "model.onnx", "-o", "x", "--if-slower", "repare", code=2)
    assert "Did you mean 'repair'" in refused.output
