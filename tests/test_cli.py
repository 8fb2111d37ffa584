# SPDX-License-Identifier: Apache-2.0
"""The command line: what it prints, what it writes, and how it ends."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from small import initializer, mlp, model_of, npz, samples, saved
from typer.testing import CliRunner, Result

from splitfold.compiler.cli.app import app
from splitfold.compiler.presets import PRESETS
from splitfold.passes.base import Pass
from splitfold.passes.spec import option_types
from splitfold.passes.table import PASSES
from splitfold.runtime.artifact import read_manifest
from splitfold.runtime.target import Target

Run = Callable[..., Result]
COMMANDS = ("compile", "opt", "passes", "inspect", "compare", "bench", "replay", "demo")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Return a function that runs the command line in a folder that holds model.onnx and data.npz."""
    monkeypatch.chdir(tmp_path)
    saved(mlp(), Path("model.onnx"))
    npz(Path("data.npz"), x=samples(40))
    runner = CliRunner()

    def invoke(*arguments: object, code: int = 0) -> Result:
        result = runner.invoke(app, [str(argument) for argument in arguments], prog_name="splitfold")
        assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
        return result

    yield invoke
    logger = logging.getLogger("splitfold")  # -v has set it up for the whole process
    logger.handlers = []
    logger.setLevel(logging.NOTSET)


def _failed(result: Result, *parts: str) -> None:
    """Assert that the command ended with one readable block on standard error."""
    assert "Traceback" not in result.output
    for part in parts:
        assert part in result.stderr


# --- the whole ---


def test_as_a_module_and_as_a_program(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "splitfold.compiler", "--version"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    assert re.fullmatch(r"splitfold \d+\.\d+\S*\n", run.stdout)
    absent = [sys.executable, "-m", "splitfold.compiler", "inspect", "absent.onnx"]
    failed = subprocess.run(absent, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert failed.returncode == 1
    assert failed.stderr.strip() == "artifact error: no such file: absent.onnx"


def test_help_teaches(run: Run) -> None:
    listed = run("--help").stdout
    for command in COMMANDS:
        assert f"\n  {command} " in listed
        assert "Example:" in run(command, "--help").stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("compil", "model.onnx"), "Did you mean 'compile'"),
        (("compile", "model.onnx", "-o", "out", "--preset", "int88"), "Did you mean 'int8'?"),
        (
            ("compile", "model.onnx", "-o", "out", "--pipeline", "canonicalise"),
            "Did you mean 'canonicalize'?",
        ),
        (("compile", "model.onnx", "-o", "out", "--target", "cpuu"), "Did you mean 'cpu'?"),
        (("compile", "model.onnx", "-o", "out", "--tolerance", "cosin=1"), "Did you mean 'cosine'?"),
        (("compile", "model.onnx", "-o", "out", "--tolerance", "cosine=high"), "cosine=high is not a number"),
        (("compile", "model.onnx", "-o", "out", "--unrealised", "kept"), "Did you mean 'keep'?"),
        (("compile", "model.onnx", "-o", "out", "--recipe", "absent.toml"), "no such recipe: absent.toml"),
        (("compile", "model.onnx", "-o", "out", "--preset", "int8", "--pipeline", "x"), "give one of them"),
        (("compile", "model.onnx"), "--output"),
        (("opt", "model.onnx", "-o", "folder"), "does not end in .onnx"),
        (("passes", "canonicalise"), "Did you mean 'canonicalize'?"),
        (("bench", "model.onnx", "--runs", "0"), "--runs"),
    ],
)
def test_usage_errors_end_with_2(run: Run, arguments: tuple[str, ...], said: str) -> None:
    _failed(run(*arguments, code=2), said)
    assert not Path("out").exists()


def test_debug_shows_the_traceback(run: Run) -> None:
    assert isinstance(run("inspect", "absent.onnx", code=1).exception, SystemExit)
    assert type(run("inspect", "absent.onnx", "--debug", code=1).exception).__name__ == "ArtifactError"


def test_an_unexpected_error_is_one_block_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("oops")

    monkeypatch.setattr("splitfold.compiler.cli.inspect_command.read_model", broken)
    _failed(run("inspect", "model.onnx", code=1), "unexpected KeyError: 'oops'", "--debug")


# --- compile ---


def test_compile_says_what_it_did(run: Run) -> None:
    said = run(
        "compile", "model.onnx", "-o", "out", "--pipeline", "quantize-weights{exclude=[encoder.down]}"
    ).stdout
    assert "canonicalize,quantize-weights{exclude=[encoder.down]},legalize" in said
    assert re.search(r"quantize-weights +1 +1 +4 > 4 ", said)
    assert "quantize-weights: 1 x excluded by option: encoder.down" in said
    assert re.search(r"kernels +MatMulNBits 1", said)
    assert re.search(r"\n y +0\.9\d+ ", said)
    assert re.search(r"weights +10\.5 kB > \d\.\d kB", said)
    assert re.search(r"file +\d+\.\d kB > \d+\.\d kB \(\d+ %\)", said)
    assert str(Path("out/model.onnx")) in said
    assert (
        read_manifest(Path("out"))["pipeline"]
        == "canonicalize,quantize-weights{exclude=[encoder.down]},legalize"
    )
    onnx.checker.check_model(onnx.load("out/model.onnx"))


def test_every_skipped_layer_is_visible(run: Run) -> None:
    names = ",".join(f"encoder.{word}" for word in ("up", "down"))
    text = f"quantize-weights{{exclude=[{names}]}}"
    brief = run("compile", "model.onnx", "-o", "out", "--pipeline", text).stdout
    assert "quantize-weights: 2 x excluded by option: encoder.up, encoder.down" in brief


def test_many_skipped_layers_are_counted_and_all_named_on_demand(run: Run) -> None:
    made = onnx.helper.make_node
    nodes = [
        made("MatMul", [f"h{i}" if i else "x", "w"], [f"h{i + 1}"], name=f"/l{i}/MatMul") for i in range(9)
    ]
    nodes.append(made("Slice", ["h9", "start", "end", "axis"], ["y"], name="/cut/Slice"))
    weights = [initializer("w", 32, 32)]
    weights += [
        onnx.numpy_helper.from_array(np.array([n]), k) for k, n in (("start", 0), ("end", 8), ("axis", 1))
    ]
    saved(model_of(nodes, weights), Path("deep.onnx"))
    command = ("compile", "deep.onnx", "--pipeline", "quantize-weights{exclude=[l*]}")
    brief = run(*command, "-o", "a").stdout
    assert "9 x excluded by option: l0, l1, l2, l3, and 5 more" in brief
    assert "l0, l1, l2, l3, l4, l5, l6, l7, l8" in run(*command, "-o", "b", "-v").stdout


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(run: Run, preset: str) -> None:
    said = run("compile", "model.onnx", "-o", "out", "--preset", preset, "--calibration", "data.npz").stdout
    assert "on the example inputs" in said
    assert Path("out/manifest.json").is_file()


def test_a_recipe(run: Run) -> None:
    Path("r.toml").write_text('[[pass]]\nname = "quantize-weights"\nbits = 8\nonly = ["encoder.up"]\n')
    run("compile", "model.onnx", "-o", "out", "--recipe", "r.toml")
    assert "quantize-weights{only=[encoder.up],bits=8}" in read_manifest(Path("out"))["pipeline"]


def test_inputs(run: Run) -> None:
    npz(Path("inputs.npz"), x=samples(3))
    run("compile", "model.onnx", "-o", "out", "--preset", "int4", "--inputs", "inputs.npz")
    assert read_manifest(Path("out"))["feeds_synthetic"] is False
    npz(Path("wrong.npz"), z=samples(3))
    wrong = run("compile", "model.onnx", "-o", "out2", "--preset", "int4", "--inputs", "wrong.npz", code=1)
    _failed(wrong, "the example inputs hold 'z', which is not an input of the model")
    _failed(
        run("compile", "model.onnx", "-o", "out2", "--inputs", "no.npz", code=1),
        "no such file: no.npz (--inputs)",
    )
    _failed(
        run("compile", "model.onnx", "-o", "out2", "--inputs", "model.onnx", code=1),
        "is not an .npz of arrays",
    )


def test_the_output_is_refused_before_the_work(run: Run) -> None:
    run("compile", "model.onnx", "-o", "out", "--preset", "exact")
    again = run("compile", "absent.onnx", "-o", "out", "--preset", "exact", code=1)
    _failed(again, "artifact error: the folder out is not empty", "--overwrite")
    run("compile", "model.onnx", "-o", "out", "--preset", "int4", "--overwrite")
    assert "quantize-weights" in read_manifest(Path("out"))["pipeline"]


def test_a_result_beyond_the_tolerance_is_not_written(run: Run) -> None:
    command = ("compile", "model.onnx", "-o", "out", "--preset", "int4", "--tolerance")
    failed = run(*command, "cosine=0.99,sqnr=200", code=1)
    _failed(
        failed, "verification error: output 'y' is further from the reference", "< 200 dB", "quantize-weights"
    )
    assert not Path("out").exists()
    run(*command, "cosine=none,max-abs=10")


@pytest.fixture
def kernels_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the target have no kernel that computes in low precision."""
    poor = dataclasses.replace(Target.cpu(), low_bit_kernels=frozenset())
    monkeypatch.setattr("splitfold.runtime.target._NAMED", {"cpu": lambda: poor})


@pytest.mark.usefixtures("kernels_gone")
def test_layers_that_no_low_bit_kernel_computes(run: Run) -> None:
    command = ("compile", "model.onnx", "--preset", "int4")
    back = run(*command, "-o", "float").stdout
    for layer in ("encoder.up", "encoder.down"):
        assert f"taken back: {layer}: no low-bit kernel of the target computed it" in back
    assert {node.op_type for node in onnx.load("float/model.onnx").graph.node} == {"MatMul", "Add", "Relu"}
    assert "identical, byte for byte" in run("replay", "float", "--model", "model.onnx").stdout
    kept = run(*command, "-o", "kept", "--unrealised", "keep").stdout
    assert "not realised: encoder.up runs as MatMulNBits" in kept
    assert "not realised: encoder.up runs as MatMulNBits" in run("inspect", "kept").stdout
    assert "identical, byte for byte" in run("replay", "kept", "--model", "model.onnx").stdout
    failed = run(*command, "-o", "error", "--unrealised", "error", code=1)
    _failed(
        failed,
        "run in no low-bit kernel; the first is 'encoder.up' (it runs as MatMulNBits)",
    )
    assert not Path("error").exists()


def test_missing_calibration_is_said(run: Run) -> None:
    failed = run("compile", "model.onnx", "-o", "out", "--preset", "int8", code=1)
    _failed(failed, "calibration error:", "needs calibration data", "--calibration DATA")


def test_an_artifact_is_a_model_too(run: Run) -> None:
    run("compile", "model.onnx", "-o", "out", "--preset", "exact")
    run("compile", "out", "-o", "small", "--preset", "int4")
    assert "quantize-weights" in read_manifest(Path("small"))["pipeline"]


def test_data_from_a_function(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mydata.py").write_text(
        "import numpy as np\n"
        "def batches():\n"
        "    for seed in range(3):\n"
        "        yield np.random.default_rng(seed).standard_normal((4, 32)).astype(np.float32)\n"
    )
    run("compile", "model.onnx", "-o", "out", "--preset", "int8", "--calibration", "mydata:batches")
    failed = run(
        "compile", "model.onnx", "-o", "o2", "--preset", "int8", "--calibration", "mydata:batch", code=1
    )
    _failed(failed, "module 'mydata' has no 'batch'. Did you mean 'batches'?")


def test_a_torch_module_from_a_function(run: Run) -> None:
    pytest.importorskip("torch")
    Path("mymodels.py").write_text(
        "import torch\n"
        "def net():\n"
        "    torch.manual_seed(0)\n"
        "    net = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))\n"
        "    return net.eval(), (torch.randn(4, 32),)\n"
        "def dynamic():\n"
        "    return *net(), ({0: torch.export.Dim('batch')},)\n"
        "def broken():\n"
        "    raise RuntimeError('no weights here')\n"
        "def wrong():\n"
        "    return 3\n"
    )
    said = run("compile", "mymodels:net", "-o", "out", "--preset", "int4").stdout
    assert "MatMulNBits 2" in said
    run("compile", "mymodels:dynamic", "-o", "out2", "--preset", "exact")
    assert onnx.load("out2/model.onnx").graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert "identical, byte for byte" in run("replay", "out", "--model", "mymodels:net").stdout
    for name, message in (
        ("mymodels:nett", "module 'mymodels' has no 'nett'. Did you mean 'net'?"),
        ("mymodels:broken", "mymodels:broken() raised RuntimeError: no weights here"),
        ("mymodels:wrong", "it must return (module, example_inputs)"),
        ("nowhere:net", "there is no module 'nowhere'"),
    ):
        _failed(run("compile", name, "-o", "out3", "--preset", "exact", code=1), "capture error:", message)


# --- the other commands ---


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
    _failed(failed, "verification error")
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
    assert "canonicalize,quantize-weights" in small
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
    _failed(run("compare", "model.onnx", "out", "--tolerance", "sqnr=90", code=1), "verification error")
    _failed(run("compare", "model.onnx", "absent", code=1), "no such file")
    wrong = npz(Path("wrong.npz"), z=samples(4))
    _failed(run("compare", "model.onnx", "out", "--data", wrong, code=1), "'z', which is not an input")


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
    _failed(run(*command, code=1), "pass the same data (--calibration)")
    saved(mlp(seed=5), Path("other.onnx"))
    _failed(
        run("replay", "out", "--model", "other.onnx", "--calibration", "data.npz", code=1),
        "not the model that out",
    )
    _failed(run("replay", "model.onnx", "--model", "model.onnx", code=1), "carries no readable manifest")


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
    _failed(failed, "acme:Swirl")


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
