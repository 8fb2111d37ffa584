# SPDX-License-Identifier: Apache-2.0
"""The command line's tools beside `compile`: opt, passes, inspect, compare, bench, replay, demo."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from command_line import Run, assert_failed
from small import initializer, mlp, model_of, npz, samples, saved

from splitfold.compiler.presets import PRESETS
from splitfold.passes.base import Pass
from splitfold.passes.spec import option_types
from splitfold.passes.table import PASSES

COMMANDS = ("compile", "opt", "passes", "inspect", "compare", "bench", "replay", "demo")


def test_opt(run: Run) -> None:
    said = run("opt", "model.onnx", "-o", "small.onnx", "--pipeline", "quantize-weights{bits=8}").stdout
    assert "MatMulNBits 2" in said
    onnx.checker.check_model(onnx.load("small.onnx"))
    assert not [file for file in Path().iterdir() if file.name.startswith(".")]
    failed = run(
        "opt",
        "model.onnx",
        "-o",
        "b.onnx",
        "--pipeline",
        "quantize-weights",
        "--tolerance",
        "sqnr=99",
        code=1,
    )
    assert_failed(failed, "verification error")
    assert not Path("b.onnx").exists()


def test_passes(run: Run) -> None:
    said = run("passes").stdout
    for kind in PASSES:
        assert re.search(rf"\n {kind.name} +{kind.contract.value} +\S", said)
    for preset in PRESETS:
        assert f"\n {preset} " in said


@pytest.mark.parametrize("kind", PASSES, ids=lambda kind: kind.name)
def test_each_option_of_each_pass_has_its_help(run: Run, kind: type[Pass]) -> None:
    said = run("passes", kind.name).stdout
    page = Path(__file__).parent / "passes" / f"{kind.name}.md"
    assert page.is_file() == ("pipeline: " in said)
    for option in option_types(kind):
        assert re.search(rf"\n {option} +\S.*  +\S.*  +\S", said), f"{kind.name} says nothing on {option}"


def test_inspect(run: Run) -> None:
    said = run("inspect", "model.onnx").stdout
    assert "x: float [batch, 32]" in said
    assert "y: float [batch, 8]" in said
    assert "MatMul 2" in said
    assert re.search(r"encoder\.up +MatMul +32 x 64 +float +8,192", said)
    run("compile", "model.onnx", "-o", "out", "--preset", "int4")
    small = run("inspect", "out").stdout
    assert re.search(r"encoder\.up +MatMulNBits +32 x 64 +4 bits, block 32 +[\d,]+ +MatMulNBits", small)
    assert "fold-multipliers,quantize-weights" in small
    assert re.search(r"\n y +0\.9", small)
    assert "4 bits" in run("inspect", "out/model.onnx").stdout


def test_inspect_sees_static_and_dynamic_int8(run: Run) -> None:
    run("compile", "model.onnx", "-o", "s", "--pipeline", "quantize-activations", "--calibration", "data.npz")
    assert re.search(r"encoder\.up +\w+ +32 x 64 +int8, activations static", run("inspect", "s").stdout)
    run("compile", "model.onnx", "-o", "d", "--pipeline", "quantize-dynamic")
    assert re.search(r"encoder\.up +\w+ +32 x 64 +u?int8, activations dynamic", run("inspect", "d").stdout)


def test_inspect_sees_weights_that_are_put_together_in_the_graph(run: Run) -> None:
    made = onnx.helper.make_node
    nodes = [
        made("Constant", [], ["left"], name="left", value=initializer("left", 32, 5)),
        made("Concat", ["left", "right"], ["w"], name="join", axis=1),
        made("MatMul", ["x", "w"], ["y"], name="/up/MatMul"),
    ]
    saved(model_of(nodes, [initializer("right", 32, 3)]), Path("parts.onnx"))
    said = run("inspect", "parts.onnx").stdout
    assert re.search(r"\n up +MatMul +32 x 5 +float +1,024 ", said)
    assert re.search(r"\n total .* 1,024 ", said)


def test_a_shared_weight_counts_once(run: Run) -> None:
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "w"], ["h"], name="/a/MatMul"),
        onnx.helper.make_node("MatMul", ["h", "w"], ["y"], name="/b/MatMul"),
    ]
    proto = model_of(nodes, [initializer("w", 32, 32)])
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 32
    saved(proto, Path("shared.onnx"))
    said = run("inspect", "shared.onnx").stdout
    assert re.search(r"\n a +MatMul +32 x 32 +float +4,096 ", said)
    assert re.search(r"\n b +MatMul +32 x 32 +float +0 ", said)
    assert re.search(r"\n other constants +0 ", said)


def test_inspect_totals_add_up(run: Run) -> None:
    said = run("inspect", "model.onnx").stdout
    sizes = [int(text.replace(",", "")) for text in re.findall(r"(?:float|constants) +([\d,]+)  ", said)]
    total = re.search(r"\n total .*?([\d,]{4,}) ", said)
    assert total is not None
    assert sum(sizes[:-1]) == int(total[1].replace(",", "")) == 4 * (32 * 64 + 64 + 64 * 8)


def test_compare(run: Run) -> None:
    run("compile", "model.onnx", "-o", "out", "--preset", "int4")
    assert "3 batches of data.npz" in run("compare", "model.onnx", "out", "--data", "data.npz").stdout
    same = run("compare", "model.onnx", "model.onnx").stdout
    assert "synthetic inputs" in same
    assert re.search(r"\n y +1\.0+ +inf +0 +0 ", same)
    assert_failed(run("compare", "model.onnx", "out", "--tolerance", "sqnr=90", code=1), "verification error")
    assert_failed(run("compare", "model.onnx", "absent", code=1), "no such file")
    wrong = npz(Path("wrong.npz"), z=samples(4))
    assert_failed(run("compare", "model.onnx", "out", "--data", wrong, code=1), "'z', which is not an input")


def test_compare_goes_over_all_batches(run: Run) -> None:
    """Two models that differ on the last samples only."""
    nodes = [
        onnx.helper.make_node("Clip", ["x", "low", "high"], ["c"], name="clip"),
        onnx.helper.make_node("MatMul", ["c", "w"], ["y"], name="m"),
    ]
    for name, high in (("a.onnx", 5.0), ("b.onnx", 50.0)):
        limits = [onnx.numpy_helper.from_array(np.float32(v), n) for n, v in (("low", -5.0), ("high", high))]
        saved(model_of(nodes, [initializer("w", 32, 8), *limits]), Path(name))
    values = samples(40)
    values[39, 0] = 20
    npz(Path("late.npz"), x=values)
    assert not re.search(r"\n y .* inf ", run("compare", "a.onnx", "b.onnx", "--data", "late.npz").stdout)
    assert re.search(r"\n y .* inf ", run("compare", "a.onnx", "b.onnx", "--data", "data.npz").stdout)


def test_bench(run: Run) -> None:
    run("compile", "model.onnx", "-o", "out", "--preset", "int4")
    said = run(
        "bench", "model.onnx", "out", "--data", "data.npz", "--threads", 1, "--runs", 7, "--batch", 4
    ).stdout
    assert "7 runs each on data.npz: x [4, 32]; 1 threads" in said
    assert re.search(r"\n model\.onnx +\d+\.\d{3} .* 1\.00x ", said)
    assert re.search(r"\n out +\d+\.\d{3} .*\d+\.\d\dx +\d+\.\d kB", said)


def test_replay(run: Run) -> None:
    run("compile", "model.onnx", "-o", "out", "--preset", "int8", "--calibration", "data.npz")
    command = ("replay", "out", "--model", "model.onnx")
    said = run(*command, "--calibration", "data.npz", "-o", "again").stdout
    assert "identical: the same graph and the same weights, bit for bit" in said
    assert "identical, byte for byte" in said
    assert Path("out/model.onnx").read_bytes() == Path("again/model.onnx").read_bytes()
    assert_failed(run(*command, code=1), "pass the same data (--calibration)")
    saved(mlp(seed=5), Path("other.onnx"))
    assert_failed(
        run("replay", "out", "--model", "other.onnx", "--calibration", "data.npz", code=1),
        "not the model that out",
    )
    assert_failed(
        run("replay", "model.onnx", "--model", "model.onnx", code=1), "carries no readable manifest"
    )


def test_replay_that_differs_ends_with_1(run: Run) -> None:
    run("compile", "model.onnx", "-o", "out", "--preset", "exact")
    proto = onnx.load("out/model.onnx")
    name = next(i for i, tensor in enumerate(proto.graph.initializer) if len(tensor.dims) == 2)
    array = onnx.numpy_helper.to_array(proto.graph.initializer[name]) * 1.5
    proto.graph.initializer[name].CopyFrom(
        onnx.numpy_helper.from_array(array, proto.graph.initializer[name].name)
    )
    onnx.save(proto, "out/model.onnx")
    assert "DIFFERS from out" in run("replay", "out", "--model", "model.onnx", code=1).stdout


def test_a_model_that_cannot_be_verified_says_so(run: Run) -> None:
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "w"], ["h"], name="/up/MatMul"),
        onnx.helper.make_node("Swirl", ["h"], ["y"], name="/swirl/Swirl", domain="acme"),
    ]
    saved(model_of(nodes, [initializer("w", 32, 8)], domains=["acme"]), Path("custom.onnx"))
    said = run("compile", "custom.onnx", "-o", "out", "--preset", "int4").stdout
    assert "NOT VERIFIED: the runtime has no kernel for the custom operators acme::Swirl." in said
    assert "legalize: 1 x custom operator acme::Swirl is kept: register its library: swirl" in said
    assert "NOT VERIFIED" in run("inspect", "out").stdout
    failed = run("compile", "custom.onnx", "-o", "o", "--preset", "int8", "--calibration", "data.npz", code=1)
    assert_failed(failed, "acme:Swirl")


def test_demo(run: Run) -> None:
    said = run("demo", "-o", "made", "--runs", 5).stdout
    assert re.search(r"\n original +99\.17 % ", said)
    for preset in ("exact", "int8", "int4"):
        found = re.search(
            rf"\n {preset} +(\d+\.\d+) % +\d+\.\d kB +\d+\.\d{{3}} +\d+\.\d\dx +(\d+\.\d) %", said
        )
        assert found is not None
        assert float(found[1]) > 98
        assert float(found[2]) == 0 if preset == "exact" else float(found[2]) > 90
        assert json.loads(Path("made", preset, "manifest.json").read_text())["files"]
    run("demo", "-o", "made", "--runs", 5)
