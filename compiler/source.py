# SPDX-License-Identifier: Apache-2.0
"""Whatever the user brings, as an `onnx_ir.Model` with example feeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from splitfold.compiler.capture import Captured, capture_torch, is_torch_model
from splitfold.compiler.errors import CaptureError
from splitfold.compiler.runnable import missing_kernels, random_outputs
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.compare import deviation
from splitfold.runtime.errors import SessionError, UnsupportedError
from splitfold.runtime.feeds import Array, Feeds, check_feeds, model_inputs, synthetic_feeds
from splitfold.runtime.model_file import model_path, read_model
from splitfold.runtime.session import Optimization, Session
from splitfold.runtime.target import Target

__all__ = ["Source", "load_source", "read_graph"]

_SIZES = (8, 1, 32, 512, 224)
"""Sizes tried for dynamic axes where the user gave no inputs and the model does not run with the first."""


_CAPTURE_LIMIT = 1e-2
"""Relative L2 distance of the captured graph's outputs from torch's: far beyond float32, reached by float16
models."""


@dataclass(frozen=True)
class Source:
    """The model as it came, and the inputs that its outputs are compared on.

    Attributes:
        model: the ONNX graph before any pass.
        feeds: example inputs.
        path: the file it was read from, or None.
        synthetic: whether `feeds` were made up.
        calibration: the user's data under the model's input names, or None.
        unrunnable: why the model cannot be run here and so not be verified (custom operators); empty where it
            can.
    """

    model: ir.Model
    feeds: Feeds
    path: Path | None
    synthetic: bool
    calibration: Calibration | None = None
    unverified: str = ""
    opens: bool = True


def load_source(
    model: object, example_inputs: object, dynamic_shapes: object, calibration: object, target: Target
) -> Source:
    """Return the model as ONNX IR, with example feeds: the user's, else calibration's first batch, else
    seeded synthetic ones.

    Raises:
        CaptureError: the model is nothing that can be compiled, or its weights hold NaN or infinity.
        ArtifactError: a file cannot be read.
        CalibrationError: the calibration data is nothing that can be walked, or its first batch does not fit.
        ValueError: example inputs that do not fit.
    """
    if is_torch_model(model):
        captured = capture_torch(model, example_inputs, dynamic_shapes)
        check_finite(captured.model)
        _check_captured(captured, target)
        return Source(captured.model, captured.feeds, None, False, _calibration(captured.model, calibration))
    read, path = read_graph(model)
    check_finite(read)
    data, missing = _calibration(read, calibration), missing_kernels(read, target)
    synthetic = example_inputs is None and data is None
    if example_inputs is not None:
        feeds = _named(read, example_inputs)
    elif data is not None:
        feeds = next(iter(data.checked(read)))
    else:
        feeds = {} if missing else runnable_feeds(read, target)
    reason = missing or random_outputs(read, feeds, target)
    return Source(read, feeds, path, synthetic, data, reason, opens=not missing)


def _check_captured(captured: Captured, target: Target) -> None:
    """Raise `CaptureError` where the ONNX graph does not compute what torch does."""
    outputs = Session(captured.model, target, optimization=Optimization.OFF).run(captured.feeds)
    if len(outputs) != len(captured.outputs):
        return  # torch also returned values that are no outputs of the graph, such as constants
    for (name, actual), expected in zip(outputs.items(), captured.outputs, strict=True):
        if expected.shape != actual.shape:
            raise CaptureError(
                f"the captured graph gives '{name}' the shape {actual.shape}, torch gives {expected.shape}."
            )
        found = deviation([expected], [actual])
        if found.relative > _CAPTURE_LIMIT:
            raise CaptureError(
                f"the captured graph is not the torch model: output '{name}' is off by "
                f"{found.relative:.2g} of its norm ({found})."
            )


def _calibration(model: ir.Model, calibration: object) -> Calibration | None:
    """Return the user's data with batches named and cut as `model` wants them; the first one is checked here,
    early."""
    if calibration is None:
        return None
    names = tuple(value.name or "" for value in model_inputs(model))
    data = Calibration.of(calibration, inputs=names).fitted(model)
    next(iter(data.checked(model)))
    return data


def read_graph(model: object) -> tuple[ir.Model, Path | None]:
    """Return an ONNX model, in memory or named by a path, as a copy in ONNX IR, and the file that it came
    from.

    Raises:
        CaptureError: it is no ONNX model.
        ArtifactError: the file cannot be read.
    """
    if isinstance(model, ir.Model):
        return model.clone(), None
    if isinstance(model, onnx.ModelProto):
        made = ir.from_proto(model)
        made.graph.sort()
        return made, None
    if isinstance(model, str | Path):
        file = model_path(model)
        return read_model(file), file
    raise CaptureError(
        f"cannot compile a {type(model).__name__}: pass an nn.Module, ExportedProgram, path, "
        "onnx.ModelProto, onnx_ir.Model or artifact folder."
    )


def check_finite(model: ir.Model) -> None:
    """Raise `CaptureError` for the first weight matrix that holds NaN or infinity (a scalar -inf is a
    legitimate mask)."""
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if (
                tensor is None
                or tensor.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
                or tensor.size < 2
            ):
                continue
            array = tensor.numpy()
            if np.isnan(array).any() or (np.isinf(array).any() and _is_weight(value)):
                raise CaptureError(
                    f"weight '{name}' holds NaN or infinity: the model is damaged (a diverged training?)."
                )


def _is_weight(value: ir.Value) -> bool:
    return any(
        use.node.op_type in ("MatMul", "Gemm", "Conv", "ConvTranspose", "BatchNormalization")
        for use in value.uses()
    )


def _named(model: ir.Model, example_inputs: object) -> Feeds:
    names = [value.name or "" for value in model_inputs(model)]
    if isinstance(example_inputs, Mapping):
        feeds: dict[str, Array] = {str(name): _array(value) for name, value in example_inputs.items()}
    else:
        items = list(example_inputs) if isinstance(example_inputs, tuple | list) else [example_inputs]
        if len(items) != len(names):
            raise ValueError(f"{len(items)} example inputs, the model has {len(names)}: {', '.join(names)}.")
        feeds = {name: _array(value) for name, value in zip(names, items, strict=True)}
    check_feeds(model, feeds, where="the example inputs")
    return feeds


def _array(value: object) -> Array:
    detach = getattr(value, "detach", None)
    return np.asarray(detach().cpu().numpy() if detach is not None else value)


def runnable_feeds(model: ir.Model, target: Target) -> Feeds:
    """Return synthetic feeds that the model runs with, trying several sizes of its dynamic axes.

    Raises:
        UnsupportedError: none of them runs.
    """
    session = Session(model, target, optimization=Optimization.OFF)
    last = ""
    for feeds in _candidates(model):
        try:
            session.run(feeds)
        except SessionError as error:
            last = str(error)
            continue
        return feeds
    raise UnsupportedError(
        f"the model does not run on synthetic inputs: pass example inputs (--inputs). {last}"
    )


def _candidates(model: ir.Model) -> Iterator[Feeds]:
    static = all(value.shape is not None and value.shape.is_static() for value in model_inputs(model))
    for size in _SIZES[:1] if static else _SIZES:
        yield synthetic_feeds(model, size=size)
