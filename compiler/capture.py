# SPDX-License-Identifier: Apache-2.0
"""Capture: a PyTorch module becomes an `onnx_ir.Model`; the only file that knows torch."""

from __future__ import annotations

import contextlib
import io
import logging
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from splitfold.compiler.errors import CaptureError
from splitfold.runtime.feeds import Array

if TYPE_CHECKING:
    import torch

__all__ = ["Captured", "capture_torch", "explain", "is_torch_model", "quiet", "split_inputs", "translated"]

_KEPT_METADATA = ("pkg.torch.onnx.name_scopes",)
"""The rest of the exporter's metadata holds local paths and source text."""


def is_torch_model(model: object) -> bool:
    """Whether `model` is an nn.Module (fx.GraphModule included) or an ExportedProgram, without importing
    torch."""
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(model).__mro__}
    return bool(names & {"torch.nn.modules.module.Module", "torch.export.exported_program.ExportedProgram"})


@dataclass(frozen=True)
class Captured:
    """A captured model.

    Attributes:
        model: its ONNX form.
        feeds: the example inputs by input name.
        outputs: what torch computes from them, in the order of the model's outputs.
    """

    model: ir.Model
    feeds: dict[str, Array]
    outputs: list[Array]


def capture_torch(model: object, example_inputs: object, dynamic_shapes: object) -> Captured:
    """Return the ONNX form of a torch model, its example inputs as feeds, and torch's own outputs to compare
    with.

    Args:
        model: module or exported program.
        example_inputs: a tuple of positional inputs, a mapping of keyword inputs, or ``(tuple, mapping)``;
            None for an exported program that carries its own.
        dynamic_shapes: as `torch.export.export` takes it.

    Raises:
        CaptureError: torch is missing, the inputs do not fit, or torch.export cannot trace the module.
    """
    try:
        import torch
    except ImportError as error:
        raise CaptureError("compiling a PyTorch model needs torch: pip install 'splitfold[torch]'") from error
    if isinstance(model, torch.export.ExportedProgram):
        program = model
        args, kwargs = split_inputs(example_inputs if example_inputs is not None else program.example_inputs)
    else:
        if not isinstance(model, torch.nn.Module):
            raise CaptureError(f"cannot capture a {type(model).__name__}.")
        args, kwargs = split_inputs(example_inputs)
        program = _export(model, args, kwargs, dynamic_shapes)
    captured = _to_onnx(program)
    return Captured(captured, _feeds(captured, args, kwargs), _outputs(program, args, kwargs))


def split_inputs(example_inputs: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return example inputs in any form that `capture_torch` takes as positional and keyword inputs.

    Raises:
        CaptureError: there are none.
    """
    if example_inputs is None:
        raise CaptureError(
            "a PyTorch model needs example_inputs: a tuple, a dict of keyword arguments, or (tuple, dict)."
        )
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if not isinstance(example_inputs, tuple | list):
        return (example_inputs,), {}
    items = tuple(example_inputs)
    if len(items) == 2 and isinstance(items[0], tuple | list) and isinstance(items[1], Mapping):
        return tuple(items[0]), dict(items[1])
    if items and isinstance(items[-1], Mapping):
        return items[:-1], dict(items[-1])
    return items, {}


def _export(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: object
) -> torch.export.ExportedProgram:
    import torch

    if module.training:
        raise CaptureError(
            f"{type(module).__name__} is in training mode: call .eval() first, or dropout and batch norms "
            "would be captured as they train."
        )
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(module, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)  # type: ignore[arg-type]
    except Exception as error:
        raise CaptureError(explain(module, error)) from error


def explain(module: torch.nn.Module, error: Exception) -> str:
    """Return a message with the user's module path and source line nearest to where tracing failed."""
    import torch

    names = {id(part): name or type(module).__name__ for name, part in module.named_modules()}
    where, line = type(module).__name__, ""
    for frame, number in _frames(error):
        owner = frame.f_locals.get("self")
        if isinstance(owner, torch.nn.Module) and id(owner) in names and frame.f_code.co_name == "forward":
            where, line = (
                names[id(owner)],
                f" (line {number} of {frame.f_code.co_filename.rsplit('/', 1)[-1]})",
            )
    text = str(error).strip()
    reason = next((row.strip() for row in text.splitlines() if row.strip()), type(error).__name__)
    return f"torch.export cannot trace module '{where}'{line}: {type(error).__name__}: {reason[:400]}"


def _frames(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    """Yield the frames of an exception and of those that it was raised from, outermost first."""
    chain: BaseException | None = error
    while chain is not None:
        yield from traceback.walk_tb(chain.__traceback__)
        chain = chain.__cause__ or chain.__context__


def _to_onnx(program: torch.export.ExportedProgram) -> ir.Model:
    model = translated(program).model
    _strip_metadata(model)
    return model


def translated(program: torch.export.ExportedProgram) -> torch.onnx.ONNXProgram:
    """Return what torch.onnx makes of an exported program: the ONNX model, and the program after
    decomposition.

    Raises:
        CaptureError: it cannot be translated.
    """
    import torch

    try:
        with quiet(), torch.no_grad():
            exported = torch.onnx.export(program, dynamo=True, verbose=False)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise CaptureError(
            f"torch.onnx.export cannot translate the exported program: {(lines or ['?'])[-1][:400]}"
        ) from error
    if exported is None:
        raise CaptureError("torch.onnx.export returned no model.")
    return exported


def _strip_metadata(model: ir.Model) -> None:
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for graph in model.graphs():
        for node in graph:
            for key in [key for key in node.metadata_props if key not in _KEPT_METADATA]:
                node.metadata_props.pop(key)
            for value in node.outputs:
                value.metadata_props.clear()
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()


def _feeds(model: ir.Model, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Array]:
    import torch
    from torch.utils import _pytree

    names = [value.name or "" for value in model.graph.inputs]
    by_name = {
        name: value for name, value in kwargs.items() if name in names and isinstance(value, torch.Tensor)
    }
    rest = _pytree.tree_leaves((args, {name: value for name, value in kwargs.items() if name not in by_name}))
    tensors = [value for value in rest if isinstance(value, torch.Tensor)]
    free = [name for name in names if name not in by_name]
    if len(free) != len(tensors):
        raise CaptureError(
            f"the captured model has inputs {names}, the example inputs hold {len(by_name) + len(tensors)} "
            "tensors."
        )
    feeds = by_name | dict(zip(free, tensors, strict=True))
    return {name: feeds[name].detach().cpu().numpy() for name in names}


def _outputs(
    program: torch.export.ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Array]:
    import torch
    from torch.utils import _pytree

    with quiet(), torch.no_grad():
        leaves = _pytree.tree_leaves(program.module()(*args, **kwargs))
    return [leaf.detach().cpu().numpy() for leaf in leaves if isinstance(leaf, torch.Tensor)]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter's prints, warnings and log records (its failures come as exceptions too); restore
    afterwards."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    sink = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
