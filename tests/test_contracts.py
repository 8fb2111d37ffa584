# SPDX-License-Identifier: Apache-2.0
"""What every pass owes its caller, checked for all passes at once."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import subprocess
import sys
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from detours import Make, detour, with_detours
from page import Case, read_page, run_case
from quantizer_detours import through_quantizers
from random_graphs import random_model

from splitfold.passes.base import Context, Contract, LayerPass, Pass
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.identity import layers_of, name_layers
from splitfold.passes.pipeline import PassRecord, Pipeline
from splitfold.passes.spec import parse_pass, pass_text
from splitfold.passes.table import PASSES
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.compare import deviation, exactness
from splitfold.runtime.digest import content_digest
from splitfold.runtime.feeds import Feeds, synthetic_feeds
from splitfold.runtime.session import Optimization, Session

PAGES = Path(__file__).parent / "passes"
SEEDS = range(120)
RTOL = 3e-5
"""Deep random graphs amplify what re-association changes."""
EXACT = {
    "canonicalize": 100,
    "fold-scales{min-gain=-100}": 20,
    "fold-scales{data-free=true}": 5,
    "drop-nan-guards": 10,
    "flatten-heads": 0,
    "fold-clips": 0,
    "fuse-attention": 0,
    "fuse-cached-attention": 0,
    "fuse-norms": 0,
    "fuse-rotary": 0,
    "fold-multipliers": 10,
    "legalize": 0,
    "merge-projections": 10,
    "merge-transposes": 10,
    "simplify-quantizers": 100,
    "simplify-reshapes": 10,
    "split-activations": 20,
    "split-activations{at=functions,parts=2}": 10,
    "split-activations{at=outputs}": 10,
    "split-layers{embeddings=true}": 20,
    "split-layers{by=channel,split-bias=true}": 20,
    "split-layers{by=magnitude,scope=channel,form=weight}": 20,
    "split-outliers{most=0.5,share=0.5,min-gain=-100}": 10,
    "split-outliers{bits=2,axis=output,by=weight,most=0.5,share=0.5,min-gain=-100}": 10,
    "unfuse-norms": 1,
}
"""Exact passes with options, and how often they find something to do in the random graphs."""
DETOURS: dict[str, Make] = {
    "drop-nan-guards": detour,
    "fold-multipliers": detour,
    "merge-transposes": detour,
    "simplify-quantizers": through_quantizers,
    "simplify-reshapes": detour,
}
"""Passes that remove detours, and those that are put into the random graphs for them."""
LOSSY = {
    "assign-precision{choices=[fp32,int8-static,w4],budget=[12code-bits],signal=local-error}": 10.0,
    "assign-precision{signal=random,error=bits}": 0.0,
    "split-layers{form=weight,embeddings=true},quantize-parts{grid=own,form=codes}": 20.0,
    "split-layers{form=weight},quantize-parts{bits=2,per=channel}": 0.0,
    "choose-carriers": 15.0,
    "choose-carriers{choices=[fp32,int8-static,w4],rows=1,margin=0.0}": 10.0,
    "quantize-activations": 15.0,
    "quantize-activations{calibrator=entropy,symmetric=true,weight-bits=7}": 15.0,
    "quantize-activations{calibrator=mse,min-sqnr=30}": 15.0,
    "quantize-activations{calibrator=extreme-value,form=integer,correct-bias=all}": 15.0,
    "quantize-dynamic": 25.0,
    "quantize-dynamic{min-sqnr=35}": 30.0,
    "quantize-embeddings{min-bytes=0}": 35.0,
    "quantize-embeddings{bits=4,block=16,min-bytes=0}": 15.0,
    "quantize-weights": 10.0,
    "quantize-weights{bits=2,block=16,symmetric=true,accuracy-level=1}": 0.0,
    "quantize-weights{bits=8,block=16,form=qdq}": 35.0,
    "quantize-weights{method=mse}": 10.0,
    "quantize-weights{method=awq}": 10.0,
    "quantize-weights{method=gptq,act-order=true}": 10.0,
    "quantize-weights{method=gptq,bits=3,symmetric=true}": 5.0,
    "quantize-weights{method=dgq,bits=3,block=16}": 5.0,
    "quantize-weights{method=dgq,form=int8-static}": 10.0,
    "quantize-weights{method=dgq,form=int8-dynamic,expand=offline}": 10.0,
    "quantize-weights{method=dgq,form=int8-token}": 10.0,
    "simulate-quantization": 15.0,
    "simulate-quantization{weights=4,activations=6,weight-ranges=searched,products=true}": 5.0,
    "simulate-quantization{weights=none,calibrator=percentile-search}": 10.0,
    "quantize-weights{block=16},widen-blocks": 5.0,
}
"""Lossy passes with options, and the dB that every output of a random graph keeps."""
ids = pytest.mark.parametrize("kind", PASSES, ids=[kind.name for kind in PASSES])


def variants(kind: type[Pass]) -> list[Pass]:
    """Return the pass with its defaults, and with each option at several values that it allows."""
    found = [kind()]
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        for value in _values(hints[field.name]):
            try:
                found.append(dataclasses.replace(kind(), **{field.name: value}))
            except ValueError:
                continue
    return found


def _values(hint: object) -> list[Any]:
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return list(hint)
    if hint is bool:
        return [False, True]
    if hint is int:
        return [0, 1, 2, 3, 4, 7, 8, 16, 128]
    if hint is float:
        return [0.5, 12.5, 99.9, 1e-7]
    if typing.get_origin(hint) is tuple:
        return [
            ("a.b.*",),
            ("plain", "two words", 'a "quoted" one', "comma, {brace} [bracket]"),
            ("back\\slash", '\\"', "ends here\\"),
        ]
    return ["text"] if hint is str else []


@ids
def test_page_exists_and_names_the_options(kind: type[Pass]) -> None:
    text = (PAGES / f"{kind.name}.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {kind.name}\n")
    assert f"Contract: {kind.contract.value}" in text
    missing = [
        field.name for field in dataclasses.fields(kind) if f"`{field.name.replace('_', '-')}`" not in text
    ]
    assert not missing


@ids
def test_docstring_shows_before_and_after(kind: type[Pass]) -> None:
    text = inspect.getdoc(kind) or ""
    assert "Before::" in text
    assert "After::" in text


@ids
def test_text_form_round_trips(kind: type[Pass]) -> None:
    made = variants(kind)
    assert str(made[0]) == kind.name
    assert len({str(step) for step in made}) > 1, "no option changes the text"
    for step in made:
        assert parse_pass(pass_text(step), PASSES) == step
    assert Pipeline.parse(str(Pipeline(tuple(made)))) == Pipeline(tuple(made))


def test_names_and_classes_agree() -> None:
    for kind in PASSES:
        words = kind.__name__.removesuffix("Pass")
        dashed = "".join(f"-{letter.lower()}" if letter.isupper() else letter for letter in words).lstrip("-")
        assert dashed == kind.name
        assert kind.__module__ == f"splitfold.passes.{kind.name.replace('-', '_')}"
    assert len({kind.name for kind in PASSES}) == len(PASSES)


# Identity of layers


def nodes(model: ir.Model) -> Iterator[ir.Node]:
    for graph in model.graphs():
        yield from graph


def layer_names(model: ir.Model) -> set[str]:
    return {name for node in nodes(model) for name in layers_of(node)}


def check_identity(before: ir.Model, after: ir.Model, record: PassRecord) -> None:
    nameless = [node.name for node in nodes(after) if not layers_of(node)]
    assert not nameless, f"{record.text} leaves {nameless} without a layer"
    invented = layer_names(after) - layer_names(before)
    assert not invented, f"{record.text} invents the layers {invented}"
    applied = {name for layer, _ in record.applied if layer != "model" for name in layer.split("+")}
    lost = applied - layer_names(after)
    assert not lost, f"{record.text} loses the layers {lost} that it rewrote"


CASES = [
    case for path in sorted(PAGES.glob("*.md")) for case in read_page(path) if "raises" not in case.options
]


@pytest.mark.parametrize("case", CASES, ids=[f"{case.page}: {case.title}" for case in CASES])
def test_pages_keep_identity(case: Case) -> None:
    result = run_case(case)
    if len(case.pipeline) == 1 and "local" not in case.before:
        check_identity(result.before, result.after, result.record)


# Random graphs


@dataclasses.dataclass(frozen=True)
class Start:
    """A random model, named and canonical, with what it computes."""

    model: ir.Model
    canonical: ir.Model
    feeds: Feeds
    reference: dict[str, np.ndarray]


@cache
def started(seed: int, make: Make | None = None) -> Start:
    model = random_model(seed)
    if make is not None:
        model = ir.from_proto(with_detours(ir.to_proto(model), seed, make))
    name_layers(model)
    canonical = model.clone()
    CanonicalizePass()(canonical)
    feeds = synthetic_feeds(model, seed=seed)
    return Start(model, canonical, feeds, run(model, feeds))


def run(
    model: ir.Model, feeds: Feeds, optimization: Optimization = Optimization.OFF
) -> dict[str, np.ndarray]:
    return Session(model, threads=1, optimization=optimization).run(feeds)


def check_valid(model: ir.Model) -> None:
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def apply(step: Pass, before: ir.Model, feeds: Feeds) -> tuple[ir.Model, PassRecord]:
    """Run a pass on a copy; hold it to its word on `modified`, identity and idempotence."""
    after = before.clone()
    context = Context(
        calibration=Calibration.of([feeds, *(synthetic_feeds(before, seed=s) for s in (1001, 1002))])
    )
    digest = content_digest(after)
    (record,) = Pipeline.of(step).run(after, context)
    check_valid(after)
    check_identity(before, after, record)
    if not record.modified:
        assert content_digest(after) == digest, f"{step} changed the model and says it did not"
    digest = content_digest(after)
    (again,) = Pipeline.of(step).run(after, context)
    assert not again.modified, f"a second run of {step} finds {again.applied}"
    assert content_digest(after) == digest, f"a second run of {step} changes something"
    return after, record


@pytest.mark.parametrize(("text", "floor"), EXACT.items(), ids=list(EXACT))
def test_random_graphs_stay_equal(text: str, floor: int) -> None:
    step = parse_pass(text, PASSES)
    seeds = SEEDS if text == step.name else SEEDS[:40]
    applied = 0
    for seed in seeds:
        start = started(seed, DETOURS.get(step.name))
        before = start.model if isinstance(step, CanonicalizePass) else start.canonical
        after, record = apply(step, before, start.feeds)
        applied += len(record.applied)
        for name, actual in run(after, start.feeds).items():
            found = exactness(start.reference[name], actual, rtol=RTOL)
            assert found.excess <= 1, (
                f"seed {seed}: {name} moved by {found.max_abs:.3g}, {found.excess:.3g} times the bound"
            )
    print(f"\n{text}: {applied} rewrites in {len(seeds)} graphs")
    assert applied >= floor


@pytest.mark.parametrize(("text", "floor"), LOSSY.items(), ids=list(LOSSY))
def test_random_graphs_stay_valid_and_finite(text: str, floor: float) -> None:
    *prepare, step = Pipeline.parse(text)
    seeds = SEEDS if text == step.name else SEEDS[:40]
    applied, worst = 0, float("inf")
    for seed in seeds:
        start = started(seed)
        before = start.canonical.clone()
        Pipeline.of(*prepare).run(before)
        after, record = apply(step, before, start.feeds)
        applied += len(record.applied)
        for optimization in Optimization if record.modified else ():
            for name, actual in run(after, start.feeds, optimization).items():
                assert np.isfinite(actual).all(), f"seed {seed}: {name} is not finite"
                found = deviation([start.reference[name]], [actual])
                worst = min(worst, found.sqnr_db)
                assert found.sqnr_db > floor, (
                    f"seed {seed}: {name} has {found} (optimisations {optimization.value})"
                )
    print(f"\n{text}: {applied} layers applied in {len(seeds)} graphs, worst output {worst:.1f} dB")
    assert applied >= 10


def test_every_pass_meets_random_graphs() -> None:
    for contract, texts in ((Contract.LOSSY, LOSSY), (Contract.EXACT, EXACT)):
        tried = {Pipeline.parse(text).steps[-1].name for text in texts}
        assert tried == {kind.name for kind in PASSES if kind.contract is contract}


def test_random_graphs_hold_what_passes_rewrite() -> None:
    operators = {node.op_type for seed in SEEDS for node in nodes(started(seed).model)}
    assert operators >= {
        "MatMul",
        "Gemm",
        "Conv",
        "BatchNormalization",
        "Identity",
        "Dropout",
        "Constant",
        "If",
        "Concat",
        "Gather",
    }


def test_layer_passes_refuse_unknown_patterns() -> None:
    from splitfold.passes.errors import SpecError

    for kind in PASSES:
        if issubclass(kind, LayerPass):
            model = random_model(3)
            CanonicalizePass()(model)
            with pytest.raises(SpecError, match="no layer matches 'nothing-of-this-name'"):
                kind(exclude=("nothing-of-this-name",)).run(model, Context())


# Layering


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("splitfold.runtime", ("splitfold.passes", "splitfold.compiler", "torch", "onnxscript", "networkx")),
        ("splitfold.passes", ("splitfold.compiler", "torch")),
        ("splitfold.compiler", ("torch",)),
    ],
)
def test_layers_import_nothing_above_them(package: str, forbidden: tuple[str, ...]) -> None:
    code = (
        "import importlib, pkgutil, sys\n"
        f"package = importlib.import_module({package!r})\n"
        "for module in pkgutil.iter_modules(package.__path__, package.__name__ + '.'):\n"
        "    if not module.name.endswith('__main__') and not module.ispkg:\n"
        "        importlib.import_module(module.name)\n"
        "print('\\n'.join(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.split()
    assert package in loaded
    found = [
        name
        for name in loaded
        if name in forbidden or name.startswith(tuple(f"{word}." for word in forbidden))
    ]
    assert not found, f"importing {package} pulls in {found[:3]}"
