# SPDX-License-Identifier: Apache-2.0
"""Pass pages: Markdown that documents a pass, whose cases are golden and numerical tests at once.

A section that holds an ``onnx`` block is a case. Bullets before the block direct it::

    - pipeline: `quantize-weights{bits=4}`     the passes to run, in text form
    - sqnr: 20                                 dB that the outputs keep at least; needed for inexact passes
    - feeds: `x = seeded(0, 1)`                inputs, where synthetic ones will not do
    - target: without matmul-nbits             a target that lacks a carrier
    - raises: SpecError: no layer matches      the error that is expected instead of a graph

The ``text`` block is the after side; ``pytest --accept`` writes it. As ONNX text can neither name layers nor
hold shapes of inner values, a graph is named and its shapes are inferred before the pipeline runs; on all
pages but that of canonicalize it is canonicalized too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from onnx_ir.passes import common
from seeded import feeds_for, parse_graph

from splitfold.passes.base import Context, Contract, Pass
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.identity import name_layers
from splitfold.passes.pipeline import PassRecord, Pipeline
from splitfold.passes.shapes import infer_shapes
from splitfold.passes.text import render_model, render_record
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.compare import deviation, exactness
from splitfold.runtime.errors import SplitfoldError
from splitfold.runtime.feeds import Array, Feeds
from splitfold.runtime.session import Optimization, Session
from splitfold.runtime.target import Carrier, Target

__all__ = ["UNCHANGED", "Case", "Result", "accept", "check_case", "read_page", "run_case", "start"]

UNCHANGED = "unchanged"
EXACT_RTOL = 1e-5
_SECTION = re.compile(r"^## (?P<title>.+)$", re.MULTILINE)
_BULLET = re.compile(r"^- (?P<key>\w+): (?P<value>.+)$", re.MULTILINE)
_BLOCK = re.compile(r"^```(?P<kind>onnx|text)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
_MEASURED = re.compile(r"-?\d+\.\d dB")
_BATCHES = 4


@dataclass(frozen=True)
class Case:
    """One case of a page: `before` is ONNX text, `after` our own, `options` its bullets."""

    page: str
    title: str
    before: str
    after: str
    options: dict[str, str] = field(default_factory=dict)

    @property
    def pipeline(self) -> Pipeline:
        return Pipeline.parse(self.options["pipeline"])

    @property
    def target(self) -> Target:
        lacking = self.options.get("target", "").removeprefix("without ")
        target = Target.cpu()
        return replace(target, carriers=target.carriers - {Carrier(lacking)}) if lacking else target


@dataclass(frozen=True)
class Result:
    """A case that was run: the model before and after, its record, its text."""

    before: ir.Model
    after: ir.Model
    record: PassRecord
    text: str


def read_page(path: Path) -> list[Case]:
    """Return the cases of a page."""
    parts = _SECTION.split(path.read_text(encoding="utf-8"))
    cases = []
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        blocks = {match["kind"]: match["body"] for match in _BLOCK.finditer(body)}
        if "onnx" in blocks:
            options = {match["key"]: match["value"].strip().strip("`") for match in _BULLET.finditer(body)}
            cases.append(Case(path.stem, title.strip(), blocks["onnx"], blocks.get("text", ""), options))
    return cases


def start(case: Case) -> ir.Model:
    """Return the graph before: named, shapes inferred, and canonical where the page is of another pass."""
    proto = parse_graph(case.before)
    onnx.checker.check_model(proto)
    model = ir.from_proto(proto)
    common.NameFixPass()(model)
    infer_shapes(model)
    name_layers(model)
    if case.page != CanonicalizePass.name:
        CanonicalizePass()(model)
    return model


def context_of(case: Case, model: ir.Model) -> Context:
    """Return the case's target, and four batches of seeded calibration data."""
    directives = case.options.get("feeds", "")
    batches: list[Feeds] = [feeds_for(model, directives, seed=seed) for seed in range(1, _BATCHES + 1)]
    return Context(case.target, Calibration.of(batches))


def run_case(case: Case) -> Result:
    """Run the pipeline of a case, and hold each pass to its word on `modified`, now and in a second run."""
    before = start(case)
    after = before.clone()
    context = context_of(case, before)
    texts = [render_model(after)]
    for step in case.pipeline:
        (record,) = Pipeline.of(step).run(after, context)
        texts.append(render_model(after))
        changed = texts[-1] != texts[-2]
        assert record.modified == changed, (
            f"{step} says modified={record.modified}, its text changed={changed}"
        )
        _check_second_run(step, after, context)
    body = UNCHANGED if texts[-1] == texts[0] else texts[-1]
    found = _MEASURED.sub("... dB", render_record(record))  # what was measured differs between machines
    return Result(before, after, record, "\n".join(filter(None, [body, found])) + "\n")


def _check_second_run(step: Pass, model: ir.Model, context: Context) -> None:
    again = model.clone()
    (record,) = Pipeline.of(step).run(again, context)
    assert not record.modified, f"a second run of {step} finds something: {record.applied}"
    assert render_model(again) == render_model(model), f"a second run of {step} changes something"


def check_case(case: Case) -> str:
    """Run a case, check model and numbers, and return the text of its after side (empty where it raises)."""
    expected = case.options.get("raises")
    if expected is not None:
        _check_raises(case, expected)
        return ""
    result = run_case(case)
    onnx.checker.check_model(ir.to_proto(result.after), full_check=True)
    _check_numbers(case, result)
    return result.text


def _check_raises(case: Case, expected: str) -> None:
    kind, _, words = expected.partition(": ")
    with pytest.raises(SplitfoldError, match=re.escape(words)) as raised:
        run_case(case)
    assert type(raised.value).__name__ == kind


def _check_numbers(case: Case, result: Result) -> None:
    feeds = feeds_for(result.before, case.options.get("feeds", ""))
    reference = Session(result.before, threads=1, optimization=Optimization.OFF).run(feeds)
    lossy = any(step.contract is not Contract.EXACT for step in case.pipeline) and result.record.applied
    for optimization in Optimization if lossy else (Optimization.OFF,):
        actual = Session(result.after, threads=1, optimization=optimization).run(feeds)
        assert list(actual) == list(reference), f"the outputs are {list(actual)}, not {list(reference)}"
        for name, array in reference.items():
            if lossy:
                _check_close(name, array, actual[name], float(case.options["sqnr"]), optimization)
            else:
                found = exactness(array, actual[name], rtol=EXACT_RTOL)
                assert found.excess <= 1, (
                    f"'{name}' moved by {found.max_abs:.3g}, {found.excess:.3g} times the bound"
                )


def _check_close(name: str, reference: Array, actual: Array, floor: float, how: Optimization) -> None:
    found = deviation([reference], [actual])
    assert floor <= found.sqnr_db, f"'{name}' has {found}, below {floor:g} dB (optimisations {how.value})"


def accept(path: Path, case: Case, text: str) -> None:
    """Write `text` as the after side of a case."""
    page = path.read_text(encoding="utf-8")
    at = page.index(f"## {case.title}\n")
    end = next((match.start() for match in _SECTION.finditer(page) if match.start() > at), len(page))
    section = page[at:end]
    block = f"```text\n{text}```"
    kept = [match for match in _BLOCK.finditer(section) if match["kind"] == "text"]
    if not text:
        changed = section
    elif kept:
        changed = section[: kept[0].start()] + block + section[kept[0].end() :]
    else:
        changed = f"{section.rstrip()}\n\n{block}\n\n"
    path.write_text((page[:at] + changed + page[end:]).rstrip() + "\n", encoding="utf-8")
