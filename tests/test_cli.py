# SPDX-License-Identifier: Apache-2.0
"""The command line: what it prints, what it writes, and how it ends."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from command_line import Run, assert_failed
from small import initializer, model_of, npz, samples, saved

from splitfold.compiler.presets import PRESETS
from splitfold.runtime.artifact import read_manifest
from splitfold.runtime.target import Target

COMMANDS = ("compile", "opt", "passes", "inspect", "compare", "diff", "bench", "replay", "demo")


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
    assert_failed(run(*arguments, code=2), said)
    assert not Path("out").exists()


def test_debug_shows_the_traceback(run: Run) -> None:
    assert isinstance(run("inspect", "absent.onnx", code=1).exception, SystemExit)
    assert type(run("inspect", "absent.onnx", "--debug", code=1).exception).__name__ == "ArtifactError"


def test_an_unexpected_error_is_one_block_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("oops")

    monkeypatch.setattr("splitfold.compiler.cli.inspect_command.read_model", broken)
    assert_failed(run("inspect", "model.onnx", code=1), "unexpected KeyError: 'oops'", "--debug")


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
    assert_failed(wrong, "the example inputs hold 'z', which is not an input of the model")
    assert_failed(
        run("compile", "model.onnx", "-o", "out2", "--inputs", "no.npz", code=1),
        "no such file: no.npz (--inputs)",
    )
    assert_failed(
        run("compile", "model.onnx", "-o", "out2", "--inputs", "model.onnx", code=1),
        "is not an .npz of arrays",
    )


def test_the_output_is_refused_before_the_work(run: Run) -> None:
    run("compile", "model.onnx", "-o", "out", "--preset", "exact")
    again = run("compile", "absent.onnx", "-o", "out", "--preset", "exact", code=1)
    assert_failed(again, "artifact error: the folder out is not empty", "--overwrite")
    run("compile", "model.onnx", "-o", "out", "--preset", "int4", "--overwrite")
    assert "quantize-weights" in read_manifest(Path("out"))["pipeline"]


def test_a_result_beyond_the_tolerance_is_not_written(run: Run) -> None:
    command = ("compile", "model.onnx", "-o", "out", "--preset", "int4", "--tolerance")
    failed = run(*command, "cosine=0.99,sqnr=200", code=1)
    assert_failed(
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
    assert_failed(
        failed,
        "run in no low-bit kernel; the first is 'encoder.up' (it runs as MatMulNBits)",
    )
    assert not Path("error").exists()


def test_missing_calibration_is_said(run: Run) -> None:
    failed = run("compile", "model.onnx", "-o", "out", "--preset", "int8", code=1)
    assert_failed(failed, "calibration error:", "needs calibration data", "--calibration DATA")


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
    assert_failed(failed, "module 'mydata' has no 'batch'. Did you mean 'batches'?")


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
        assert_failed(
            run("compile", name, "-o", "out3", "--preset", "exact", code=1), "capture error:", message
        )


# --- the other commands ---


def test_a_preset_that_finds_nothing_says_so(run: Run) -> None:
    idle = "nothing was quantized: every candidate was skipped"
    pipeline = "quantize-weights{exclude=[encoder.*]}"
    assert idle in run("compile", "model.onnx", "-o", "idle", "--pipeline", pipeline).stdout
    assert idle not in run("compile", "model.onnx", "-o", "busy", "--pipeline", "quantize-weights").stdout
    assert idle not in run("compile", "model.onnx", "-o", "plain", "--preset", "exact").stdout
