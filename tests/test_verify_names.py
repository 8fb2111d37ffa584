# SPDX-License-Identifier: Apache-2.0
"""What fails is named: the pass, and the layer, for every way in which a compilation can fail."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import planted
import pytest
from encoder import encoder, token_batches
from onnx import helper
from planted import Planted
from small import initializer, mlp, model_of, samples

from splitfold.compiler import Pipeline, Tolerance, Unrealised, compile
from splitfold.compiler.debug.failure.blame import first_failing_node
from splitfold.compiler.debug.failure.changes import find_changes
from splitfold.compiler.debug.failure.mentions import mentioned_node
from splitfold.compiler.errors import VerificationError
from splitfold.passes.base import Context, Contract, Findings, Pass
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.errors import Failure, FailureError, PassFailedError
from splitfold.runtime.target import Target

LAYER = "encoder.layer.1.output.dense"


def failure(step: Pass, **options: object) -> FailureError:
    """Compile the small encoder with `step`, and return the error that must come."""
    with pytest.raises(FailureError) as caught:
        compile(
            encoder(layers=2), token_batches()[0], pipeline=Pipeline.of(step), reproducers=None, **options
        )
    return caught.value


CASES = {
    planted.ScaleWeight: (Failure.MOVED, f"The first value that differs is '{LAYER}.MatMul' (MatMul)"),
    planted.DropBias: (Failure.MOVED, "The first value that differs is"),
    planted.AddedOutput: (Failure.MOVED, "the model has 2 outputs, it had 1"),
    planted.BreakShape: (Failure.STOPPED, f"of layer {LAYER}"),
    planted.UnknownAttribute: (Failure.STOPPED, "(MatMul) of layer"),
    planted.BadIndex: (Failure.STOPPED, "The node that fails is"),
    planted.Raising: (Failure.RAISED, "IndexError: tuple index 16 out of range"),
    planted.Silent: (Failure.UNTRUE, "it says that it changed nothing, but the model has changed"),
    planted.OutOfOrder: (Failure.INVALID, "stands before the one that computes its input"),
    planted.ToNan: (Failure.NON_FINITE, f"The first value that does is '{LAYER}.MatMul'"),
    planted.OneBit: (Failure.TOLERANCE, f"The layer that adds the most error is {LAYER}"),
}


@pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.name)
def test_pass_and_layer_are_named(kind: type[Planted]) -> None:
    step = kind(layer=LAYER)
    error = failure(step, tolerance=Tolerance(cosine=0.999))
    what, text = CASES[kind]
    assert error.kind is what
    assert error.culprit == str(step)
    assert error.layer == LAYER
    assert LAYER in str(error)
    assert text in str(error)
    if isinstance(error, PassFailedError):
        assert f"failed (ran before it: canonicalize) at layer {LAYER}: " in str(error)


def test_the_checker_names_the_pass() -> None:
    error = failure(planted.UntypedOutput())
    assert (error.kind, error.culprit) == (Failure.INVALID, "plant-untyped-output")
    assert error.layer == "encoder.layer.1.output.LayerNorm"
    assert "not valid ONNX any more: Field 'type' of 'value_info'" in str(error)


def test_a_model_that_only_fails_with_optimisations_names_the_pass() -> None:
    error = failure(planted.Int8AroundReshape(layer="encoder.layer.1.attention.self.query"))
    assert error.kind is Failure.NOT_DEPLOYED
    assert isinstance(error, VerificationError)
    assert error.blame.startswith("plant-int8-around-reshape")
    assert error.layer == "encoder.layer.1.attention.self.query"
    assert "The first pass after which it does not is plant-int8-around-reshape" in str(error)


def test_an_output_of_another_form_is_no_matter_of_distance() -> None:
    @dataclass(frozen=True)
    class Lossy(planted.BreakShape):
        contract: ClassVar[Contract] = Contract.LOSSY

    with pytest.raises(
        PassFailedError, match=r"output 'y' is float32 \[3, 7\], it was float32 \[3, 8\]"
    ) as caught:
        compile(mlp(), {"x": samples(3)}, pipeline=Pipeline.of(Lossy(layer="encoder.down")), reproducers=None)
    assert caught.value.layer == "encoder.down"


def test_an_unrealised_layer_is_named() -> None:
    whole = Target.cpu()
    lacking = Target("cpu", whole.provider, whole.opset, whole.carriers, low_bit_kernels=frozenset())
    with pytest.raises(PassFailedError) as caught:
        compile(
            mlp(),
            {"x": samples(3)},
            pipeline="quantize-weights",
            target=lacking,
            unrealised=Unrealised.ERROR,
            reproducers=None,
        )
    assert (caught.value.kind, caught.value.layer) == (Failure.UNREALISED, "encoder.up")


@dataclass(frozen=True)
class _Boast(Pass):
    name: ClassVar[str] = "boast"
    contract: ClassVar[Contract] = Contract.EXACT
    note: str = ""

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""
        model.graph.doc_string = self.note or model.graph.doc_string
        return True


def test_a_pass_that_says_it_changed_the_model_has_to() -> None:
    error = failure(_Boast())
    assert (error.kind, error.layer) == (Failure.UNTRUE, "")
    assert "it says that it changed the model, but nothing has changed" in str(error)
    compile(mlp(), {"x": samples(3)}, pipeline=Pipeline.of(_Boast(note="documented")))


def test_the_runtime_failing_inside_a_pass_names_pass_and_layer() -> None:
    bad = token_batches(3)
    bad[1] = {"ids": np.full_like(bad[1]["ids"], 10**6)}
    with pytest.raises(
        PassFailedError, match=r"pass quantize-activations failed.*out of data bounds"
    ) as caught:
        compile(
            encoder(layers=1),
            token_batches()[0],
            pipeline="quantize-activations",
            calibration=bad,
            reproducers=None,
        )
    assert (caught.value.kind, caught.value.layer) == (Failure.RAISED, "embeddings.word_embeddings")


def test_an_infinity_that_was_there_is_not_blamed() -> None:
    """A mask of minus infinity is no fault; the first value that became infinite is."""
    nodes = [
        helper.make_node("Greater", ["x", "limit"], ["far"], name="/mask/Greater"),
        helper.make_node("Where", ["far", "low", "x"], ["masked"], name="/mask/Where"),
        helper.make_node("Softmax", ["masked"], ["p"], name="/mask/Softmax"),
        helper.make_node("MatMul", ["p", "w"], ["y"], name="/head/MatMul"),
    ]
    scalars = [helper.make_tensor(n, 1, [], [v]) for n, v in (("limit", 1.5), ("low", -np.inf))]
    model = model_of(nodes, [initializer("w", 32, 8), *scalars])
    with pytest.raises(VerificationError) as caught:
        compile(
            model,
            {"x": samples(3)},
            pipeline=Pipeline.of(planted.ToNan(layer="head")),
            reproducers=None,
        )
    assert caught.value.layer == "head"
    assert "The first value that does is 'y' of layer head (MatMul)" in str(caught.value)


def test_a_model_that_cannot_be_verified_still_holds_passes_to_their_word(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.ERROR)
    model = mlp()
    model.graph.node[2].op_type, model.graph.node[2].domain = "Mystery", "my.domain"
    model.opset_import.append(helper.make_opsetid("my.domain", 1))
    with pytest.raises(PassFailedError) as caught:
        compile(model, pipeline=Pipeline.of(planted.Silent(layer="encoder.down")), reproducers=None)
    assert (caught.value.kind, caught.value.layer) == (Failure.UNTRUE, "encoder.down")


def test_naming_that_fails_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no idea")

    monkeypatch.setattr("splitfold.compiler.debug.failure.blame.find_changes", broken)
    error = failure(planted.Silent(layer=LAYER))
    assert (error.kind, error.layer) == (Failure.UNTRUE, "")


def _canonical() -> ir.Model:
    model = ir.from_proto(encoder(layers=2))
    Pipeline.of(CanonicalizePass()).run(model)
    return model


def test_the_failing_node_is_found_by_cutting() -> None:
    model, feeds = _canonical(), token_batches()[0]
    assert first_failing_node(model, feeds, Target.cpu()) is None
    Pipeline.of(planted.BreakShape(layer=LAYER)).run(model)
    found = first_failing_node(model, feeds, Target.cpu())
    assert found is not None
    assert (found.op_type, found.outputs[0].name) == ("Add", f"{LAYER}.Add")


def test_changes_are_told_apart() -> None:
    before = _canonical()
    after = before.clone()
    assert not find_changes(before, after).all
    Pipeline.of(planted.DropBias(layer=LAYER)).run(after)
    changes = find_changes(before, after)
    assert [node.outputs[0].name for node in changes.lost] == [f"{LAYER}.Add"]
    assert [node.op_type for node in changes.rewired] == ["Add"]
    assert not changes.made


@pytest.mark.parametrize(
    ("message", "node"),
    [
        ("Non-zero status code returned while running MatMul node. Name:'/encoder/up/MatMul'", "up/MatMul"),
        ("Node (/encoder/act/Relu) Op (Relu) [ShapeInferenceError]", "act/Relu"),
        ("Bad node spec for node. Name: /encoder/up/Add OpType: Add", "up/Add"),
        ("ValueError: encoder.down: the weight is not a constant", "down/MatMul"),
        ("KeyError: 'hb'", "up/Add"),
        ("IndexError: list index out of range", None),
        ("hb is an ordinary word here", None),
    ],
)
def test_nodes_that_a_message_names(message: str, node: str | None) -> None:
    model = ir.from_proto(mlp())
    Pipeline.of(CanonicalizePass()).run(model)
    found = mentioned_node(model, message)
    assert (found.name if found is not None else None) == (f"/encoder/{node}" if node else None)
