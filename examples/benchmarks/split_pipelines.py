# SPDX-License-Identifier: Apache-2.0
"""Pipelines on MiniLM: splitting where it pays, and outliers apart, beside plain weights of the same size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from splitfold.compiler import Tolerance, compile
from splitfold.examples.benchmarks.data import Feeds
from splitfold.examples.benchmarks.report import open_bare, say
from splitfold.examples.benchmarks.split_forms import linear_layers
from splitfold.examples.benchmarks.split_tables import Table
from splitfold.examples.benchmarks.weight_subjects import Subject
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.pipeline import Pipeline
from splitfold.runtime.model_file import weight_bytes

__all__ = ["chooser_table", "outlier_tables", "planted"]

BATCHES = 16
APART = "quantize-weights{bits=8,block=16,symmetric=true,only=[*:outliers]}"
PLANTED = 30.0
CHANNELS = 4
"""Value channels of each layer that are made small, and the output weights that meet them large."""


@dataclass(frozen=True)
class Row:
    """One file: bits a weight of all linear layers (scales, zero points and all), and results."""

    name: str
    bits: float
    found: Mapping[str, float]
    split: str


def plain(bits: int, block: int, method: str = "rtn") -> str:
    """Pipeline of plain weights."""
    return f"quantize-weights{{method={method},bits={bits},block={block}}}"


def apart(bits: int, block: int, share: float, method: str = "rtn") -> str:
    """Pipeline of outliers in 8 bits, the rest plain."""
    searched = "rtn" if method == "rtn" else "mse"
    first = f"split-outliers{{bits={bits},block={block},share={share},method={searched}}}"
    return f"{first},{APART},{plain(bits, block, method)}"


def row(subject: Subject, text: str, batches: Sequence[Feeds], folder: Path, name: str = "") -> Row:
    """Compile, and measure the file."""
    artifact = compile(
        subject.model,
        calibration=batches,
        pipeline=Pipeline.parse(f"canonicalize,{text}"),
        tolerance=Tolerance(cosine=None),
        reproducers=None,
    )
    whole = ir.load(subject.model)
    CanonicalizePass()(whole)
    held = {layer.weight: layer.weight_array() for layer in linear_layers(whole)}
    weights, kept = sum(array.size for array in held.values()), sum(array.nbytes for array in held.values())
    bits = 8 * (weight_bytes(artifact.model) - weight_bytes(whole) + kept) / weights
    file = artifact.save_model(folder / "pipeline.onnx")
    split = [record for record in artifact.records if record.text.startswith("split-")]
    counts = f"{len(dict(split[0].applied))} of {len(held)}" if split else ""
    result = Row(name or text, bits, subject.measure(open_bare(file)), counts)
    say(f"{subject.name} {result}")
    return result


def _table(title: str, rows: Sequence[Row]) -> Table:
    names = tuple(rows[0].found)
    table = Table(title, ("pipeline", "split layers", "bits a weight", *names))
    for item in rows:
        numbers = (f"{item.found[name]:.4f}" for name in names)
        table.add(item.name, item.split, f"{item.bits:.2f}", *numbers)
    return table


def chooser_table(subject: Subject, folder: Path) -> Table:
    """Splitting chosen by error within 3 bits a weight, beside plain 3-bit weights and those of its size."""
    batches = subject.calibration(0)[:BATCHES]
    options = "select=error,bits=2,budget=3"
    texts = [
        plain(3, 32),
        plain(2, 32),
        plain(2, 64),
        plain(2, 128),
        f"split-layers{{{options},block=128,min-gain=0}},{plain(2, 128)}",
        f"split-layers{{{options},block=256,min-gain=0}},{plain(2, 256)}",
        apart(2, 64, 0.05),
        apart(2, 64, 0.05, "mse"),
        plain(2, 32, "mse"),
        plain(3, 32, "mse"),
        apart(2, 64, 0.05, "gptq"),
        f"split-layers{{{options},block=128,min-gain=0}},{plain(2, 128, 'gptq')}",
        plain(2, 32, "gptq"),
        plain(2, 64, "gptq"),
        plain(2, 128, "gptq"),
    ]
    rows = [row(subject, text, batches, folder) for text in texts]
    table = _table("MiniLM, splitting where it pays, at most 3 bits a weight all told", rows)
    small = max((item for item in rows if item.split and item.bits <= 3.05), key=_cosine)
    other = max((item for item in rows if not item.split and item.bits <= small.bits + 0.1), key=_cosine)
    table.expect(
        f"best split form of at most 3 bits ({small.bits:.2f}): cosine {_cosine(small):.4f}, plain of its "
        f"size ({other.bits:.2f}): {_cosine(other):.4f}",
        _cosine(small) > _cosine(other),
    )
    three = rows[0]
    table.expect(
        f"and plain 3 bits, block 32, which take {three.bits:.2f}: {_cosine(three):.4f}",
        _cosine(small) > _cosine(three),
    )
    table.show()
    return table


def _cosine(item: Row) -> float:
    return item.found["cosine"]


OUTLIERS = (
    (apart(2, 64, 0.05), (plain(2, 32), plain(2, 16))),
    (apart(2, 64, 0.05, "mse"), (plain(2, 32, "mse"), plain(2, 16, "mse"))),
    (apart(2, 64, 0.05, "gptq"), (plain(2, 32, "gptq"), plain(2, 16, "gptq"))),
    (apart(4, 128, 0.05), (plain(4, 64), plain(4, 32))),
    (apart(4, 128, 0.05, "mse"), (plain(4, 64, "mse"), plain(4, 32, "mse"))),
)


def outlier_tables(subject: Subject, folder: Path) -> list[Table]:
    """Outliers in 8 bits beside plain weights of as many bits or more: MiniLM, and with planted outliers."""
    batches = subject.calibration(0)[:BATCHES]
    loud = replace(subject, name="MiniLM with planted outliers", model=planted(subject.model, folder))
    tables = []
    for own, groups in ((subject, OUTLIERS), (loud, (OUTLIERS[0], OUTLIERS[3]))):
        rows: list[Row] = []
        verdicts = []
        for ours, others in groups:
            first, *beside = (row(own, text, batches, folder) for text in (ours, *others))
            rows += [first, *beside]
            best = max((_cosine(item) for item in beside if item.bits <= 1.03 * first.bits), default=-1.0)
            verdicts.append(
                (f"{first.name}: {_cosine(first):.4f}, plain of its size {best:.4f}", _cosine(first) > best)
            )
        table = _table(f"{own.name}, outliers apart", rows)
        for what, came in verdicts:
            table.expect(what, came)
        table.show()
        tables.append(table)
    return tables


def planted(path: Path, folder: Path) -> Path:
    """MiniLM with outliers planted in each layer's output weights, the same function: some value channels are
    divided, and the rows that read them multiplied."""
    model = ir.load(path)
    CanonicalizePass()(model)
    layers = {layer.name: layer for layer in linear_layers(model)}
    values = [name for name in layers if name.endswith("attention.self.value")]
    rng = np.random.default_rng(0)
    for name in values:
        value, dense = layers[name], layers[name.replace("self.value", "output.dense")]
        factor = np.ones(value.weight_array().shape[1], np.float32)
        factor[rng.permutation(len(factor))[:CHANNELS]] = PLANTED
        add = next(iter(value.output.uses())).node
        bias = next(given for given in add.inputs if given is not None and given.const_value is not None)
        for held, array in (
            (value.weight, value.weight_array() / factor),
            (bias, bias.const_value.numpy() / factor),  # type: ignore[union-attr]
            (dense.weight, dense.weight_array() * factor[:, None]),
        ):
            held.const_value = ir.tensor(array.astype(np.float32), name=held.name)
    result = folder / "planted.onnx"
    ir.save(model, result)
    return result
