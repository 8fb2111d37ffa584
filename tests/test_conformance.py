# SPDX-License-Identifier: Apache-2.0
"""The canonical form against models of others: ONNX's node tests, ONNX Runtime's graphs, real models."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from splitfold.compiler import presets
from splitfold.passes.errors import PassFailedError
from splitfold.passes.identity import layers_of
from splitfold.runtime.compare import exactness
from splitfold.runtime.errors import SplitfoldError
from splitfold.runtime.feeds import Array, Feeds, synthetic_feeds
from splitfold.runtime.session import Optimization, Session

SHARED = Path(os.environ.get("SPLITFOLD_SHARED", Path(__file__).parents[2] / "shared"))
RTOL = 1e-5
MODEL_FEEDS: dict[str, dict[str, Array]] = {
    "silero_vad_16k": {
        "input": np.random.default_rng(0).standard_normal((2, 512)).astype(np.float32) * np.float32(0.1),
        "sr": np.array(16000, np.int64),
    }
}
"""Inputs that have to be right for the model to run at all."""

TRIES = 20
"""Runs after which a model that always gives the same is taken to be deterministic: a Dropout of few
elements may drop the same ones twice."""

COMPARED, ORIGINAL_FAILS, REFUSED, RANDOM_VALUES = (
    "compared",
    "original does not run",
    "refused",
    "random or untyped",
)


def outputs(model: ir.Model | onnx.ModelProto, feeds: Feeds) -> list[object]:
    opened = model if isinstance(model, ir.Model) else ir.from_proto(model)
    return list(Session(opened, threads=1, optimization=Optimization.OFF).run(feeds).values())


def difference(reference: object, actual: object, rtol: float = RTOL) -> str | None:
    """Return how two outputs differ, or None; sequences and maps are compared element by element."""
    if isinstance(reference, list):
        if not isinstance(actual, list) or len(actual) != len(reference):
            return "sequences of different length"
        found = [difference(r, a, rtol) for r, a in zip(reference, actual, strict=True)]
        return next((text for text in found if text), None)
    if isinstance(reference, np.ndarray) and isinstance(actual, np.ndarray):
        excess = exactness(reference, actual, rtol=rtol)
        return (
            None if excess.excess <= 1 else f"max {excess.max_abs:.3g}, {excess.excess:.3g} times the bound"
        )
    return None if reference == actual else "different values"


def exact_outcome(proto: onnx.ModelProto, feeds: Feeds) -> tuple[str, str]:
    """Return the kind of outcome of the `exact` preset, and what is wrong, or an empty text."""
    try:
        reference = outputs(proto, feeds)
    except SplitfoldError:
        return ORIGINAL_FAILS, ""
    model = ir.from_proto(proto)
    try:
        presets.exact().run(model)
    except PassFailedError as error:
        return COMPARED, str(error)
    except SplitfoldError as error:
        return REFUSED, str(error)
    problem = _wrong(proto, model, feeds, reference)
    if problem and any(_differ(reference, outputs(proto, feeds)) for _ in range(TRIES)):
        return RANDOM_VALUES, ""
    return COMPARED, problem


def _wrong(proto: onnx.ModelProto, model: ir.Model, feeds: Feeds, reference: list[object]) -> str:
    valid_before = _validity(proto) is None
    invalid = _validity(ir.to_proto(model)) if valid_before else None
    if invalid is not None:
        return f"invalid: {invalid}"
    try:
        actual = outputs(model, feeds)
    except SplitfoldError as error:
        return f"does not run any more: {error}"
    return _differ(reference, actual) or _deployed(proto, model, feeds) or _second_run(model)


def _deployed(proto: onnx.ModelProto, model: ir.Model, feeds: Feeds) -> str:
    """Return what goes wrong where the runtime optimises the model, if it can optimise the original."""
    try:
        Session(ir.from_proto(proto), threads=1).run(feeds)
    except SplitfoldError:
        return ""
    try:
        Session(model, threads=1).run(feeds)
    except SplitfoldError as error:
        return f"does not run as deployed: {error}"
    return ""


def _differ(reference: list[object], actual: list[object]) -> str:
    if len(actual) != len(reference):
        return "another number of outputs"
    found = [difference(r, a) for r, a in zip(reference, actual, strict=True)]
    return next((text for text in found if text), "")


def _second_run(model: ir.Model) -> str:
    nameless = [node.name for graph in model.graphs() for node in graph if not layers_of(node)]
    if nameless:
        return f"{nameless[0]} has no layer"
    again = [record for record in presets.exact().run(model) if record.modified]
    return f"a second run finds {again[0].applied} ({again[0].text})" if again else ""


def _validity(proto: onnx.ModelProto) -> str | None:
    try:
        onnx.checker.check_model(proto)
    except (onnx.checker.ValidationError, ValueError) as error:
        return str(error).splitlines()[0]
    return None


def report(what: str, counts: Counter[str], wrong: list[str]) -> None:
    print(f"\n{what}: " + ", ".join(f"{count} {kind}" for kind, count in counts.most_common()))
    assert not wrong, f"{len(wrong)} wrong:\n" + "\n".join(wrong)


def node_cases() -> list[tuple[str, onnx.ModelProto, Feeds]]:
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tests = load_model_tests(kind="node")
    found: list[tuple[str, onnx.ModelProto, Feeds]] = []
    for test in tests:
        if test.model is not None and test.data_sets:
            inputs = test.data_sets[0][0]
            names = [value.name for value in test.model.graph.input]
            found.append((test.name, test.model, dict(zip(names, inputs, strict=False))))
    return found


def test_node_tests() -> None:
    counts: Counter[str] = Counter()
    wrong, refused = [], []
    for name, proto, feeds in node_cases():
        kind, problem = exact_outcome(proto, feeds)
        counts[kind] += 1
        if kind == COMPARED and problem:
            wrong.append(f"{name}: {problem}")
        elif kind == REFUSED:
            refused.append(f"{name}: {problem}")
    report("ONNX node tests", counts, [*wrong, *refused])
    assert counts[COMPARED] >= 900


def _needs_shared(folder: str) -> Path:
    place = SHARED / folder
    if not place.is_dir():
        pytest.skip(f"{place} is absent (set SPLITFOLD_SHARED)")
    return place


def _feeds(proto: onnx.ModelProto) -> dict[str, Array] | None:
    try:
        return synthetic_feeds(ir.from_proto(proto))
    except SplitfoldError:
        return None


def test_graph_transform_graphs() -> None:
    files = sorted(_needs_shared("graphs/ort_transform").rglob("*.onnx"))
    counts: Counter[str] = Counter()
    wrong = []
    for file in files:
        proto = onnx.load(file)
        feeds = _feeds(proto)
        kind, problem = exact_outcome(proto, feeds) if feeds is not None else (RANDOM_VALUES, "")
        counts[kind] += 1
        if kind == REFUSED:
            print(f"refused {file.name}: {problem}")
        elif problem:
            wrong.append(f"{file.relative_to(SHARED)}: {problem}")
    report("ONNX Runtime transform graphs", counts, wrong)
    assert counts[COMPARED] >= 150


def test_real_models() -> None:
    counts: Counter[str] = Counter()
    wrong = []
    for file in sorted(_needs_shared("models").glob("*.onnx")):
        proto = onnx.load(file)
        feeds = synthetic_feeds(ir.from_proto(proto)) | MODEL_FEEDS.get(file.stem, {})
        kind, problem = exact_outcome(proto, feeds)
        counts[kind] += 1
        if kind != COMPARED or problem:
            wrong.append(f"{file.name}: {kind} {problem}")
    report("real models", counts, wrong)
    assert counts[COMPARED] >= 8
