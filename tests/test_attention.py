# SPDX-License-Identifier: Apache-2.0
"""Attention is found in exports of every kind of transformer, and what is said of it is what it computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from command_line import Run
from encoder import encoder
from onnx import helper
from real_minilm import minilm
from seeded import parse_graph
from small import saved

from splitfold.passes.attention import find_attention
from splitfold.passes.attention_block import Attention, AttentionReport, TermKind
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.dims import Dim
from splitfold.passes.pipeline import Pipeline

SHARED = Path(__file__).parents[2] / "shared" / "models"


def canonical(model: onnx.ModelProto | ir.Model) -> ir.Model:
    made = model.clone() if isinstance(model, ir.Model) else ir.from_proto(model)
    CanonicalizePass()(made)
    return made


def found(text: str, *, opset: int = 20, domains: str = "") -> AttentionReport:
    head = f'<ir_version: 10, opset_import: ["" : {opset}{domains}]>\nnet '
    return find_attention(canonical(parse_graph(head + text)))


def only(report: AttentionReport) -> Attention:
    (block,) = report.blocks
    assert not report.misses
    return block


QKV = "(float[b,4,t,16] q, float[b,4,t,16] k, float[b,4,t,16] v) => (float[b,t,64] y)"
SPLIT = "kt = Transpose<perm = [0, 1, 3, 2]>(k)\n"
JOIN = "c = MatMul(p, v)\nct = Transpose<perm = [0, 2, 1, 3]>(c)\ny = Reshape(ct, joined)\n"


# --- real models ---


@pytest.mark.parametrize(("file", "blocks"), [("stories260K", 5), ("resnet20_cifar10", 0), ("mnist", 0)])
def test_models_at_hand(file: str, blocks: int) -> None:
    path = SHARED / f"{file}.onnx"
    if not path.is_file():
        pytest.skip(f"{path.name} is not in the shared folder")
    report = find_attention(canonical(ir.load(path)))
    assert len(report.blocks) == blocks
    assert not report.misses
    for block in report.blocks:
        assert (block.layout.count, block.layout.kv_count, block.layout.value_size) == (8, 4, 8)
        assert block.causal
        assert block.is_rotary
        assert block.key.rotary is not None
        assert block.value.rotary is None
        assert block.query.root is block.key.root is block.value.root
        assert block.scale == pytest.approx(8**-0.5)


def test_minilm() -> None:
    report = find_attention(canonical(minilm()))
    assert len(report.blocks) == 6
    assert not report.misses
    for index, block in enumerate(report.blocks):
        assert f"layer.{index}." in block.name
        assert str(block) == "decomposed, 12 heads of 32, mask"
        assert block.cross is False
        assert block.scale == pytest.approx(32**-0.5)
        assert block.layout.key_length == block.layout.query_length
        assert block.merged is not None


@pytest.mark.parametrize("text", ["canonicalize", "quantize-dynamic", "quantize-weights{block=16}"])
def test_low_bit_projections(text: str) -> None:
    model = canonical(encoder(layers=2))
    Pipeline.parse(text).run(model)
    report = find_attention(model)
    assert [str(block) for block in report.blocks] == ["decomposed, 2 heads of 8"] * 2
    assert all(len(block.query.projections) == 1 for block in report.blocks)
    assert all(block.cross is False for block in report.blocks)


# --- what acts on scores ---


def test_scale_bias_and_masks() -> None:
    block = only(
        found(
            "(float[b,4,t,16] q, float[b,4,t,16] k, float[b,4,t,16] v, bool[b,1,1,t] keep, float[4,t,t] bias)"
            " => (float[b,t,64] y) <float[4,1,1] slopes = seeded, int64[3] joined = {0, 0, 64},"
            " float half = {0.5}, float low = {-10000.0}, float no = {0.0}, float root = {2.0}>\n"
            "{ qs = Mul(q, half)\n kt = Transpose<perm = [0, 1, 3, 2]>(k)\n s = MatMul(qs, kt)\n"
            "sd = Div(s, root)\n m = Where(keep, no, low)\n b1 = Mul(bias, slopes)\n sb = Add(sd, b1)\n"
            "sm = Add(m, sb)\n p = Softmax<axis = -1>(sm)\n " + JOIN + "}"
        )
    )
    assert block.scale == 0.25
    assert [term.kind for term in block.terms] == [TermKind.POSITION_BIAS, TermKind.MASK]
    assert not block.causal
    assert (block.layout.heads, block.layout.query, block.layout.size) == ((1,), 2, 3)
    assert (block.layout.count, block.layout.kv_count) == (4, 4)
    assert block.layout.key_length == Dim(1, ("t",))


def test_softcap() -> None:
    block = only(
        found(
            QKV + " <int64[3] joined = {0, 0, 64}, float cap = {50.0}, float scale = {0.25}>\n{ " + SPLIT + ""
            "s = MatMul(q, kt)\n a = Mul(s, scale)\n d = Div(a, cap)\n h = Tanh(d)\n l = Mul(h, cap)\n"
            "p = Softmax<axis = -1>(l)\n" + JOIN + "}"
        )
    )
    assert block.softcap == 50
    assert block.scale == pytest.approx(0.25)


CAUSAL = {
    "positions compared": "bq = Unsqueeze(positions, last)\n m = LessOrEqual(positions, bq)\n",
    "not later": "bq = Unsqueeze(positions, last)\n n = Greater(positions, bq)\n m = Not(n)\n",
    "a window of the past": (
        "bq = Unsqueeze(positions, last)\n m1 = LessOrEqual(positions, bq)\n back = Sub(bq, eight)\n"
        "m2 = Greater(positions, back)\n m = And(m1, m2)\n"
    ),
    "a triangle": (
        "ones = ConstantOfShape<value = float[1] {1.0}>(square)\n tri = Trilu<upper = 0>(ones)\n"
        "m = Cast<to = 9>(tri)\n"
    ),
}
OPEN = {
    "a window both ways": (
        "bq = Unsqueeze(positions, last)\n d = Sub(positions, bq)\n a = Abs(d)\n m = LessOrEqual(a, eight)\n"
    ),
    "the future": "bq = Unsqueeze(positions, last)\n m = GreaterOrEqual(positions, bq)\n",
    "all": "bq = Unsqueeze(positions, last)\n m = GreaterOrEqual(bq, zero)\n",
}
MASKED = (
    QKV + " <int64[3] joined = {0, 0, 64}, float low = {-3.4e38}, float no = {0.0}, int64 zero = {0},"
    " int64 one = {1}, int64 eight = {8}, int64[1] last = {1}>\n"
    "{ square = Shape<start = 2, end = 3>(q)\n length = Squeeze(square)\n"
    " sides = Concat<axis = 0>(square, square)\n positions = Range(zero, length, one)\n%s" + SPLIT + ""
    "s = MatMul(q, kt)\n %s\n p = Softmax<axis = -1>(l)\n" + JOIN + "}"
)


@pytest.mark.parametrize("mask", [*CAUSAL, *OPEN])
@pytest.mark.parametrize("form", ["w = Where(m, no, low)\n l = Add(s, w)", "l = Where(m, s, low)"])
def test_causal_masks(mask: str, form: str) -> None:
    made = (CAUSAL | OPEN)[mask].replace("(square)", "(sides)")
    block = only(found(MASKED % (made, form)))
    assert [term.kind for term in block.terms] == [TermKind.MASK]
    assert block.causal == (mask in CAUSAL)


def test_a_constant_triangle_is_causal() -> None:
    block = only(
        found(
            "(float[b,4,3,16] q, float[b,4,3,16] k, float[b,4,3,16] v) => (float[b,3,64] y)"
            " <int64[3] joined = {0, 0, 64}, float[3,3] m = {0, -1e9, -1e9, 0, 0, -1e9, 0, 0, 0}>\n"
            "{ " + SPLIT + "s = MatMul(q, kt)\n l = Add(s, m)\n p = Softmax<axis = -1>(l)\n" + JOIN + "}"
        )
    )
    assert block.causal


# --- layouts ---


def test_grouped_keys_by_broadcast() -> None:
    block = only(
        found(
            "(float[b,2,3,5,8] q, float[b,2,1,5,8] k, float[b,2,1,5,8] v) => (float[b,5,48] y)"
            " <int64[3] joined = {0, 0, 48}>\n"
            "{ kt = Transpose<perm = [0, 1, 2, 4, 3]>(k)\n s = MatMul(q, kt)\n p = Softmax<axis = -1>(s)\n"
            "c = MatMul(p, v)\n ct = Transpose<perm = [0, 3, 1, 2, 4]>(c)\n y = Reshape(ct, joined)\n}"
        )
    )
    assert block.layout.heads == (1, 2)
    assert (block.layout.count, block.layout.kv_count) == (6, 2)
    assert block.is_grouped


def test_heads_folded_into_the_batch() -> None:
    block = only(
        found(
            "(float[8,5,16] q, float[8,5,16] k, float[8,5,16] v) => (float[2,5,64] y)"
            " <int64[4] apart = {2, 4, 5, 16}, int64[3] joined = {2, 5, 64}>\n"
            "{ kt = Transpose<perm = [0, 2, 1]>(k)\n s = MatMul(q, kt)\n p = Softmax<axis = -1>(s)\n"
            "c = MatMul(p, v)\n ch = Reshape(c, apart)\n ct = Transpose<perm = [0, 2, 1, 3]>(ch)\n"
            "y = Reshape(ct, joined)\n}"
        )
    )
    assert block.layout.heads == ()
    assert block.layout.count == 4
    assert block.merged is not None


def test_probabilities_on_the_right_and_einsum() -> None:
    right = found(
        "(float[b,16,t] q, float[b,16,t] k, float[b,8,t] v) => (float[b,8,t] y)\n"
        "{ qt = Transpose<perm = [0, 2, 1]>(q)\n s = MatMul(qt, k)\n p = Softmax<axis = -1>(s)\n"
        "pt = Transpose<perm = [0, 2, 1]>(p)\n y = MatMul(v, pt)\n}"
    )
    assert (only(right).layout.query, only(right).layout.size) == (2, 1)
    assert only(right).layout.value_size == 8
    written = found(
        "(float[b,t,4,16] q, float[b,t,4,16] k, float[b,t,4,16] v) => (float[b,t,64] y)"
        " <int64[3] joined = {0, 0, 64}>\n"
        '{ s = Einsum<equation = "bqhd,bkhd->bhqk">(q, k)\n p = Softmax<axis = -1>(s)\n'
        'c = Einsum<equation = "bhqk,bkhd->bqhd">(p, v)\n y = Reshape(c, joined)\n}'
    )
    assert (only(written).layout.heads, only(written).layout.count) == ((2,), 4)
    assert only(written).layout.query == 1


def test_a_softmax_written_out() -> None:
    block = only(
        found(
            QKV + " <int64[3] joined = {0, 0, 64}, int64[1] last = {-1}>\n{ " + SPLIT + "s = MatMul(q, kt)\n"
            "top = ReduceMax(s, last)\n l = Sub(s, top)\n e = Exp(l)\n z = ReduceSum(e, last)\n"
            "p = Div(e, z)\n" + JOIN + "}"
        )
    )
    assert block.node.op_type == "Div"
    assert not block.terms


def test_cross_attention_and_a_cache() -> None:
    block = only(
        found(
            "(float[b,t,16] x, float[b,s,16] memory, float[b,p,16] past) => (float[b,t,16] y)"
            " <float[16,16] A = seeded, float[16,16] B = seeded, float[16,16] C = seeded>\n"
            "{ q = MatMul(x, A)\n k = MatMul(memory, B)\n v0 = MatMul(memory, C)\n"
            "all = Concat<axis = 1>(past, k)\n v = Concat<axis = 1>(past, v0)\n"
            "kt = Transpose<perm = [0, 2, 1]>(all)\n s = MatMul(q, kt)\n"
            "p = Softmax<axis = -1>(s)\n y = MatMul(p, v)\n}"
        )
    )
    assert block.cross is True
    assert block.key.past is not None
    assert block.key.past.name == "past"
    assert block.layout.count == 1


# --- fused ---


def test_fused_operators() -> None:
    report = found(
        "(float[b,t,64] x) => (float[b,t,64] y) <float[64,192] W = seeded, float[192] bias = seeded>\n"
        "{ y = com.microsoft.Attention<num_heads = 4, unidirectional = 1>(x, W, bias)\n}",
        domains=', "com.microsoft" : 1',
    )
    assert str(only(report)) == "com.microsoft::Attention, 4 heads of 16, causal"
    assert only(report).scale == 0.25
    report = found(
        "(float[b,t,64] x, int32[b] seen, int32 total) => (float[b,t,64] y) <float[64,64] A = seeded,"
        " float[64,32] B = seeded, float[64,32] C = seeded>\n{ q = MatMul(x, A)\n k = MatMul(x, B)\n"
        " v = MatMul(x, C)\n y = com.microsoft.GroupQueryAttention<num_heads = 4, kv_num_heads = 2>"
        "(q, k, v, , , seen, total)\n}",
        domains=', "com.microsoft" : 1',
    )
    block = only(report)
    assert str(block) == "com.microsoft::GroupQueryAttention, 4 heads (2 of keys and values) of 16, causal"
    assert block.query.root is block.key.root
    report = found(
        "(float[b,t,64] x, float[b,s,64] other, bool[t,s] keep) => (float[b,t,64] y)"
        " <float[64,64] A = seeded, float[64,64] B = seeded>\n{ q = MatMul(x, A)\n k = MatMul(other, B)\n"
        " y = Attention<q_num_heads = 4, kv_num_heads = 4>(q, k, other, keep)\n}",
        opset=23,
    )
    assert str(only(report)) == "Attention, 4 heads of 16, cross, mask"
    assert only(report).merged is only(report).context


# --- misses ---


MISSES = {
    "a constant weight": "(float[b,8] x) => (float[b,4] y) <float[8,4] W = seeded>\n"
    "{ l = MatMul(x, W)\n y = Softmax<axis = -1>(l)\n}",
    "read by Tanh, not by a product": "(float[b,4,8] q, float[b,8,4] k) => (float[b,4,4] y)\n"
    "{ s = MatMul(q, k)\n p = Softmax<axis = -1>(s)\n y = Tanh(p)\n}",
    "an output of the model": "(float[b,4,8] q, float[b,8,4] k) => (float[b,4,4] y)\n"
    "{ s = MatMul(q, k)\n y = Softmax<axis = -1>(s)\n}",
    "logits come from Relu": "(float[b,4,8] q, float[b,8,4] v) => (float[b,4,4] y)\n"
    "{ s = Relu(q)\n p = Softmax<axis = -1>(s)\n y = MatMul(p, v)\n}",
    "mixes no values": "(float[b,4,8] q, float[b,8,4] k) => (float[b,4,3] y) <float[4,3] W = seeded>\n"
    "{ s = MatMul(q, k)\n p = Softmax<axis = -1>(s)\n y = MatMul(p, W)\n}",
    "does not sum over its axis": "(float[b,4,8] q, float[b,8,4] k, float[b,4,3] v) => (float[b,4,3] y)\n"
    "{ s = MatMul(q, k)\n p = Softmax<axis = 1>(s)\n y = MatMul(p, v)\n}",
    "which no node computes": "(float[b,4,4] s, float[b,4,3] v) => (float[b,4,3] y)\n"
    "{ p = Softmax<axis = -1>(s)\n y = MatMul(p, v)\n}",
}


@pytest.mark.parametrize("reason", MISSES)
def test_misses_are_explained(reason: str) -> None:
    report = found(MISSES[reason])
    assert not report.blocks
    (miss,) = report.misses
    assert reason in miss.reason


def test_an_operator_that_is_not_read_into() -> None:
    node = helper.make_node(
        "LongformerAttention", list("abcdefg"), ["y"], domain="com.microsoft", num_heads=1, window=2
    )
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "g",
        [value(name, onnx.TensorProto.FLOAT, None) for name in "abcdefg"],
        [value("y", onnx.TensorProto.FLOAT, None)],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("com.microsoft", 1)]))
    (miss,) = find_attention(model).misses
    assert "LongformerAttention" in miss.reason


def test_the_model_stays_as_it_is() -> None:
    model = canonical(encoder())
    before = ir.to_proto(model).SerializeToString()
    find_attention(model)
    assert ir.to_proto(model).SerializeToString() == before
    assert np.isfinite([block.scale for block in find_attention(model).blocks]).all()


def test_inspect_says_what_it_found(run: Run) -> None:
    saved(encoder(layers=2), Path("encoder.onnx"))
    assert "2 blocks: 2 x decomposed, 2 heads of 8" in run("inspect", "encoder.onnx").stdout
    head = '<ir_version: 10, opset_import: ["" : 20]>\nnet '
    saved(parse_graph(head + MISSES["a constant weight"]), Path("classifier.onnx"))
    said = " ".join(run("inspect", "classifier.onnx").stdout.split())
    assert "no attention: its logits come from a layer with a constant weight" in said
    assert "attention" not in run("inspect", "model.onnx").stdout
