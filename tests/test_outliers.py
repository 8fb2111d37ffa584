# SPDX-License-Identifier: Apache-2.0
"""Outliers by hand: norms, kurtosis, and where attention looks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from seeded import parse_graph
from typer.testing import CliRunner

from splitfold.compiler import compile
from splitfold.compiler.cli.app import app
from splitfold.compiler.debug.outliers.measurement import measure_outliers
from splitfold.compiler.debug.outliers.picture import outliers_picture
from splitfold.compiler.debug.outliers.statistics import AttentionShares, kurtosis
from splitfold.compiler.debug.report.outliers import outlier_rows
from splitfold.compiler.errors import ComparisonError
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.errors import CalibrationError
from splitfold.runtime.feeds import Array
from splitfold.runtime.session import Session
from splitfold.runtime.target import Target

HEAD = '<ir_version: 10, opset_import: ["" : 20]>\n'
BLOCK = (
    "net (float[b,4,6] x, int64[b,4] attention_mask, int64[b,4] input_ids) => (float[b,4,6] z) "
    "<float[6,6] Q = seeded, float[6,6] K = seeded, float[6,6] V = seeded, float[6] c = seeded, "
    "float[6] g = seeded, float[6] d = seeded, int64[1] a = {1}, float[1] zero = {0.0}, "
    "float[1] low = {-1e9}, "
    "int64[4] s = {0, 4, 2, 3}, int64[3] r = {0, 4, 6}> {"
    "[q] q = MatMul(x, Q) [k] k = MatMul(x, K) [v] v0 = MatMul(x, V) [bias] v = Add(v0, c) "
    "q4 = Reshape(q, s) k4 = Reshape(k, s) v4 = Reshape(v, s) "
    "qt = Transpose<perm = [0, 2, 1, 3]>(q4) kt = Transpose<perm = [0, 2, 3, 1]>(k4) "
    "vt = Transpose<perm = [0, 2, 1, 3]>(v4) e = MatMul(qt, kt) "
    "m0 = Cast<to = 9>(attention_mask) m1 = Unsqueeze(m0, a) m2 = Unsqueeze(m1, a) m = Where(m2, zero, low) "
    "t = Add(e, m) [attention] p = Softmax<axis = -1>(t) o = MatMul(p, vt) "
    "ot = Transpose<perm = [0, 2, 1, 3]>(o) om = Reshape(ot, r) u = Add(om, x) "
    "[norm] z = LayerNormalization(u, g, d) }"
)


def model() -> ir.Model:
    return ir.from_proto(parse_graph(HEAD + BLOCK))


def feeds(seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, 4, 6)).astype(np.float32)
    x[1, 3] = 1000  # padding: nobody may see it
    mask = np.array([[1, 1, 1, 1], [1, 1, 1, 0]])
    ids = np.array([[101, 7, 9, 102], [101, 8, 102, 0]])
    return {"x": x, "attention_mask": mask, "input_ids": ids}


def test_kurtosis_is_three_for_a_normal_distribution_and_large_for_one_outlier() -> None:
    x = np.random.default_rng(0).standard_normal(200_000)
    assert kurtosis(x) == pytest.approx(3, abs=0.05)
    spike = np.zeros(1000)
    spike[0] = 100
    mean, variance = 0.1, 100**2 / 1000 - 0.1**2
    fourth = ((100 - mean) ** 4 + 999 * mean**4) / 1000
    assert kurtosis(spike) == pytest.approx(fourth / (variance**2 + 1e-6))
    assert kurtosis(np.zeros(5)) == 0


def test_layers_are_measured_with_their_bias_and_without_padding() -> None:
    given = feeds()
    found = measure_outliers(model(), [given])
    assert (found.samples, found.padding) == (2, "attention_mask")
    values = Session(model(), taps=["v", "u"]).run(given, ["v", "u"])
    by = {(it.layer, it.what): it for it in found.layers}
    for key, name in ((("v", "output"), "v"), (("norm", "norm input"), "u")):
        samples = [values[name][0], values[name][1, :3]]
        assert by[key].infinity_norm == pytest.approx(np.mean([np.abs(it).max() for it in samples]), rel=1e-5)
        assert by[key].largest == pytest.approx(max(np.abs(it).max() for it in samples), rel=1e-5)
        assert by[key].kurtosis == pytest.approx(np.mean([kurtosis(it) for it in samples]), rel=1e-4)
    assert found.infinity_norm == max(it.infinity_norm for it in found.layers) < 100
    assert measure_outliers(model(), [given], padding=None).infinity_norm > 100


def test_attention_is_counted_by_hand() -> None:
    given = feeds()
    (block,) = measure_outliers(model(), [given], delimiters=[101, 102]).attention
    p = Session(model(), taps=["p"]).run(given, ["p"])["p"]
    rows = [p[0], p[1][:, :3]]  # [heads, queries, keys]
    count = sum(row.shape[0] * row.shape[1] for row in rows)
    assert block.first == pytest.approx(sum(row[..., 0].sum() for row in rows) / count, rel=1e-5)
    marked = [np.isin(ids, [101, 102]) for ids in given["input_ids"]]
    expected = sum(row[..., mark].sum() for row, mark in zip(rows, marked, strict=True)) / count
    assert block.delimiters == pytest.approx(expected, rel=1e-5)
    assert block.zeros == 0  # the padded key's zeros are no choice of the model's
    assert len(block.heads) == 2
    assert np.mean(block.heads) == pytest.approx(block.first, rel=1e-6)


def test_zeros_count_only_where_a_key_could_be_seen() -> None:
    shares = AttentionShares()
    p = np.array([[[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.25, 0.75]]])
    shares.add(p, np.tri(3, dtype=bool), None)
    assert shares.zero_share == pytest.approx(1 / 6)
    assert shares.share(shares.first) == pytest.approx(1.5 / 3)


def test_a_picture_has_a_bar_for_each_layer_and_a_cell_for_each_head() -> None:
    found = measure_outliers(model(), [feeds()])
    text = outliers_picture(found, "a < b")
    assert text == outliers_picture(found, "a < b")
    assert text.count("<title>") == 2 * len(found.by_layer()) + 2
    assert "a &lt; b" in text


def test_the_command(tmp_path: Path) -> None:
    ir.save(model(), tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", **feeds())
    arguments = ["outliers", str(tmp_path / "model.onnx"), "--data", str(tmp_path / "data.npz")]
    shown = CliRunner().invoke(app, [*arguments, "--picture", str(tmp_path / "o.svg"), "--delimiter", "101"])
    assert shown.exit_code == 0, shown.output
    assert "2 samples" in shown.output
    assert "norm input" in shown.output
    assert (tmp_path / "o.svg").read_text().startswith("<svg")
    held = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    assert [block["layer"] for block in held["attention"]] == ["attention"]


def test_bad_input_is_told() -> None:
    given = feeds()
    with pytest.raises(CalibrationError, match="no input 'tokens' with tokens"):
        measure_outliers(model(), [given], tokens="tokens", delimiters=[1])
    with pytest.raises(CalibrationError, match=r"nothing to measure|no batch|empty"):
        measure_outliers(model(), [])
    with pytest.raises(ComparisonError, match="no input 'mask' marks padding"):
        measure_outliers(model(), [given], padding="mask")


def test_a_fused_block_says_that_it_hides_its_probabilities() -> None:
    text = (
        '<ir_version: 10, opset_import: ["" : 23]>\n'
        "net (float[b,4,6] q, float[b,4,6] k, float[b,4,6] v) => (float[b,4,6] y) "
        "{ [fused] y = Attention<q_num_heads = 2, kv_num_heads = 2>(q, k, v) }"
    )
    rng = np.random.default_rng(0)
    batch = {name: rng.standard_normal((1, 4, 6)).astype(np.float32) for name in "qkv"}
    found = measure_outliers(ir.from_proto(parse_graph(text)), [batch])
    assert found.unseen == (("fused", "Attention keeps its probabilities to itself"),)


def test_a_substitution_is_recorded_with_what_it_did_to_outliers() -> None:
    """The manifest holds what the analysis finds on the first two batches, of both models."""
    data = [feeds(0), feeds(1), feeds(2)]
    made = compile(model(), pipeline="canonicalize,clip-softmax{gamma=-0.3}", calibration=data, speed=None)
    found = made.manifest["outliers"]
    for word, graph in (("before", model()), ("after", made.model)):
        again = measure_outliers(graph, data[:2])
        assert found[word]["samples"] == 4
        assert found[word]["infinity_norm"] == pytest.approx(again.infinity_norm, rel=1e-3)
        assert found[word]["kurtosis"] == pytest.approx(again.kurtosis, rel=1e-3)
        assert found[word]["zeros"] == pytest.approx(again.attention[0].zeros, abs=1e-3)
    assert found["before"]["zeros"] == 0 < found["after"]["zeros"]
    assert "outliers" not in compile(model(), pipeline="canonicalize", calibration=data).manifest
    without = compile(model(), pipeline="canonicalize,clip-softmax{gamma=-0.3}", speed=None)
    assert "outliers" not in without.manifest


def test_a_model_that_cannot_be_run_is_compiled_all_the_same() -> None:
    stranger = model()
    product = next(node for node in stranger.graph if node.name == "norm")
    product.domain, product.op_type = "nobody", "Norm"
    stranger.opset_imports["nobody"] = 1
    made = compile(stranger, pipeline="clip-softmax{gamma=-0.3}", calibration=[feeds()], speed=None)
    assert "nobody" in made.manifest["outliers"]["not_measured"]


def test_a_report_shows_the_outliers_of_both_models() -> None:
    data = [feeds(0), feeds(1)]
    made = compile(model(), pipeline="canonicalize,clip-softmax{gamma=-0.3}", calibration=data, speed=None)
    missing: dict[str, list[str]] = {}
    layers, blocks = outlier_rows(model(), made.model, Calibration.of(data), Target.cpu(), missing)
    was, now = measure_outliers(model(), data), measure_outliers(made.model, data)
    assert not missing
    assert layers[0].norm_before == was.infinity_norm
    assert {row.layer: row.norm_after for row in layers}["norm"] == now.by_layer()["norm"].infinity_norm
    assert [(it.layer, it.zeros_before, it.zeros_after) for it in blocks] == [
        ("attention", 0.0, now.attention[0].zeros)
    ]
    assert outlier_rows(model(), model(), None, Target.cpu(), missing) == ((), ())
    broken = Calibration.of([{"x": np.zeros((1, 4, 6), np.float32)}])
    assert outlier_rows(model(), model(), broken, Target.cpu(), missing) == ((), ())
    assert list(missing.values()) == [["outliers"]]
