# SPDX-License-Identifier: Apache-2.0
"""Lifted models against the runtime: ONNX's node tests, the runtime's own graphs, real models."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

pytest.importorskip("torch", reason="lifting needs the extra 'torch'")

import torch
from lifting import largest_difference
from real_minilm import minilm, sentences
from test_conformance import MODEL_FEEDS, _feeds, _needs_shared

from splitfold.runtime.errors import SplitfoldError, UnsupportedError
from splitfold.runtime.feeds import Feeds, synthetic_feeds
from splitfold.runtime.lift import lift, lower_weights
from splitfold.runtime.session import Optimization, Session

ROUNDINGS = {"float16": 2e-3, "bfloat16": 2e-2}
"""Bounds for types so narrow that the order of a sum shows: two units in the last place or a little more."""
RANDOM = {"Dropout", "RandomUniform", "Multinomial"}
STEPS = 0.06
"""A few steps of an 8-bit quantizer, next to its largest number: a number on an edge may round the other way,
and meet an edge of the next quantizer."""
ON_AN_EDGE = 0.01
"""Share of numbers that may."""
SAME, REFUSED, WRONG = "the same", "refused", "wrong"
FLOATS = ("float16", "float32", "float64")


@dataclass
class Tally:
    """What came of the cases, also by operator."""

    counts: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def add(self, name: str, outcome: str, problem: str) -> None:
        self.counts[outcome] += 1
        if outcome == REFUSED:
            self.refused[problem.partition("(")[2].partition(")")[0] or problem] += 1
        elif outcome == WRONG:
            self.wrong.append(f"{name}: {problem}")

    def report(self, what: str) -> float:
        """Print the counts, and return the part that is the same."""
        total = self.counts.total()
        print(f"\n{what}: {dict(self.counts)}, {self.counts[SAME] / total:.1%} the same")
        print("  refused: " + ", ".join(f"{count} {name}" for name, count in self.refused.most_common()))
        assert not self.wrong, f"{len(self.wrong)} wrong:\n" + "\n".join(self.wrong)
        return self.counts[SAME] / total


def _array(value: Any) -> Any:
    """Return a tensor of a lifted model as the runtime would return it."""
    if isinstance(value, list | tuple):
        return [_array(item) for item in value]
    if not isinstance(value, torch.Tensor):
        return value
    held = value.detach()
    wide = held.dtype.is_floating_point and (held.element_size() == 1 or held.dtype is torch.bfloat16)
    return (held.float() if wide else held).numpy()


def _unlike(expected: Any, found: Any, rtol: float, atol: float) -> str:
    """Return how a result differs from what is expected, or an empty text."""
    if isinstance(expected, list):
        if not isinstance(found, list) or len(found) != len(expected):
            return "another length"
        return next(
            filter(None, (_unlike(e, f, rtol, atol) for e, f in zip(expected, found, strict=True))), ""
        )
    want, got = np.asarray(expected), np.asarray(found)
    if want.shape != got.shape:
        return f"shape {got.shape}, not {want.shape}"
    if want.dtype.name in ("bool", "int64", "int32", "int8", "uint8", *FLOATS) and want.dtype != got.dtype:
        return f"{got.dtype}, not {want.dtype}"
    if want.dtype.kind in "OSU":
        return "" if np.array_equal(want, got) else "other texts"
    loose = max(ROUNDINGS.get(want.dtype.name, 0), rtol)
    if want.dtype.kind not in "fc":
        want, got = want.astype(np.float64), got.astype(np.float64)
    near = np.allclose(want, got, loose, max(atol, loose if loose > rtol else 0), equal_nan=True)
    if near and atol >= STEPS:
        share = float(np.mean(~np.isclose(want, got, loose, atol / 60, equal_nan=True)))
        return "" if share <= ON_AN_EDGE else f"{share:.1%} are off by more than rounding"
    return "" if near else f"off by {np.nanmax(np.abs(want - got)):.3g}"


def _reference(proto: onnx.ModelProto, feeds: Feeds) -> list[Any] | None:
    """Return what the runtime computes node by node, or None where it does not run the model."""
    try:
        session = Session(ir.from_proto(proto), threads=1, optimization=Optimization.OFF)
        return list(session.run(feeds).values())
    except SplitfoldError:
        return None


def _outcome(
    proto: onnx.ModelProto, feeds: Feeds, expected: list[Any], rtol: float, atol: float
) -> tuple[str, str]:
    """Return what came of the lift, and what is refused or wrong."""
    try:
        lifted = lift(ir.from_proto(proto))
        found = [_array(value) for value in lifted.run(feeds).values()]
    except UnsupportedError as error:
        return REFUSED, str(error)
    except Exception as error:  # anything else that stops it is a failure of the lift
        return WRONG, f"{type(error).__name__}: {str(error)[:200]}"
    unlike = _unlike(expected, found, rtol, atol)
    return (WRONG, unlike) if unlike else (SAME, "")


def _is_float(arrays: list[Any]) -> bool:
    return any(str(getattr(array, "dtype", "")) in FLOATS for array in arrays)


@dataclass(frozen=True)
class NodeTest:
    """One of ONNX's node tests: its model, inputs, what it expects, and within which bounds."""

    name: str
    proto: onnx.ModelProto
    feeds: dict[str, Any]
    expected: list[Any]
    rtol: float
    atol: float

    def passes(self) -> bool:
        """Whether the runtime passes it."""
        found = _reference(self.proto, self.feeds)
        return found is not None and not _unlike(self.expected, found, self.rtol, self.atol)


def node_tests() -> Iterator[NodeTest]:
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = load_model_tests(kind="node")
    for case in cases:
        if case.model is not None and case.data_sets:
            inputs, expected = case.data_sets[0]
            names = [value.name for value in case.model.graph.input]
            feeds = dict(zip(names, map(_stored, inputs), strict=False))
            yield NodeTest(
                case.name, case.model, feeds, [_stored(value) for value in expected], case.rtol, case.atol
            )


def _stored(value: Any) -> Any:
    """Return an array of a node test; those of narrow types are stored as protobuf."""
    if isinstance(value, list):
        return [_stored(item) for item in value]
    return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def test_node_tests() -> None:
    """Those that the runtime passes, within their own bounds."""
    floats, others = Tally(), Tally()
    for case in node_tests():
        if case.passes():
            tally = floats if _is_float([*case.feeds.values(), *case.expected]) else others
            tally.add(case.name, *_outcome(case.proto, case.feeds, case.expected, case.rtol, case.atol))
    others.report("node tests without floats")
    assert floats.report("node tests with floats") >= 0.97
    assert floats.counts[SAME] >= 1100


@pytest.mark.slow
def test_graph_transform_graphs() -> None:
    tally = Tally()
    for file in sorted(_needs_shared("graphs/ort_transform").rglob("*.onnx")):
        proto = onnx.load(file)
        feeds = _feeds(proto)
        expected = None if feeds is None else _reference(proto, feeds)
        if feeds is None or expected is None or RANDOM & {node.op_type for node in proto.graph.node}:
            continue
        reals = [array for array in expected if array.dtype.kind == "f"]
        largest = max((float(np.abs(array).max(initial=0)) for array in reals), default=1.0)
        tally.add(file.name, *_outcome(proto, feeds, expected, 1e-3, _bound(proto) * max(1.0, largest)))
    tally.report("ONNX Runtime transform graphs")
    assert tally.counts[SAME] >= 150


def _bound(proto: onnx.ModelProto) -> float:
    """Return how far a result may be off, next to its largest number."""
    if any(node.op_type == "QuantizeLinear" for node in proto.graph.node):
        return STEPS
    kinds = [value.type.tensor_type.elem_type for value in proto.graph.input]
    kinds += [a.i for node in proto.graph.node for a in node.attribute if a.name == "to"]
    return ROUNDINGS["float16"] if onnx.TensorProto.FLOAT16 in kinds else 1e-4


def test_real_models() -> None:
    """Every model of the folder agrees within 1e-4, and all its weights get a gradient."""
    for file in sorted(_needs_shared("models").glob("*.onnx")):
        model = ir.load(file)
        feeds = synthetic_feeds(model) | MODEL_FEEDS.get(file.stem, {})
        lifted = lift(model)
        used = {name: feeds[name] for name in lifted.inputs}
        difference = largest_difference(model, feeds, lifted)
        sum(value.square().mean() for value in lifted.run(used).values()).backward()
        weights = [p for p in lifted.module.parameters() if p.requires_grad]
        without = sum(p.grad is None or not bool(p.grad.abs().sum() > 0) for p in weights)
        print(f"{file.stem}: off by {difference:.1e}, {len(weights)} weights, {without} without a gradient")
        assert difference < 1e-4, file.stem
        assert not without, file.stem
        assert not lower_weights(lifted, model)


def test_minilm() -> None:
    model = minilm()
    lifted = lift(model)
    for feeds in sentences():
        used = {name: feeds[name] for name in lifted.inputs}
        difference = largest_difference(model, used, lifted)
        print(f"MiniLM: off by {difference:.1e}")
        assert difference < 1e-4
