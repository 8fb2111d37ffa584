# SPDX-License-Identifier: Apache-2.0
"""Reading and writing `.onnx` files: clear errors, external data, nothing half-written."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

from splitfold.runtime.errors import ArtifactError

__all__ = [
    "MODEL_FILE",
    "WEIGHTS_FILE",
    "check_folder",
    "file_digest",
    "model_path",
    "new_folder",
    "read_model",
    "scratch_folder",
    "self_contained",
    "weight_bytes",
    "write_model",
]

MODEL_FILE = "model.onnx"
WEIGHTS_FILE = "model.onnx.data"
_EXTERNAL_ABOVE = 1_500_000_000
"""Bytes of weights above which they go to a file of their own: protobuf ends at 2 GB."""
_UNPACKED_FROM = 1024
"""Bytes from which on a weight is taken out of the protobuf."""


def model_path(place: str | Path) -> Path:
    """Return the ``.onnx`` file of an artifact folder, or the file itself.

    Raises:
        ArtifactError: the place may not be looked at.
    """
    path = Path(place)
    try:
        return path / MODEL_FILE if path.is_dir() else path
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {_reason(error)}.") from error


def read_model(path: Path) -> ir.Model:
    """Read an ``.onnx`` file; external weights are memory mapped: they stay on disk until they are used.

    Raises:
        ArtifactError: no such file, not an ONNX model, truncated, or external data missing or too short.
    """
    try:
        if not path.is_file():
            raise ArtifactError(f"no such file: {path}")
        with path.open("rb"):
            pass
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {_reason(error)}.") from error
    try:
        model = ir.load(path)
        model.graph.sort()  # the runtime runs nodes in any order; copying a model wants them sorted
    except Exception as error:
        raise ArtifactError(
            f"{path} is not an ONNX model, or it is truncated ({type(error).__name__}: {error})."
        ) from error
    if not len(model.graph) and not model.graph.outputs:
        raise ArtifactError(f"{path} holds no graph: it is not an ONNX model, or it is truncated.")
    if not model.opset_imports and model.ir_version >= 3:
        raise ArtifactError(f"{path} names no opset: it is not an ONNX model, or it is truncated.")
    _check_external(model, path)
    if weight_bytes(model) <= _EXTERNAL_ABOVE:
        _embed(model)
    _unpack(model)
    return model


def self_contained(model: ir.Model) -> ir.Model:
    """Return `model`, or where weights of it stand in other files a copy that holds views of them: it can be
    serialized without those files."""
    if not any(isinstance(value.const_value, ir.ExternalTensor) for value in _initializers(model)):
        return model
    copy = model.clone()
    _embed(copy)
    return copy


def _embed(model: ir.Model) -> None:
    files: dict[str, np.ndarray] = {}
    for value in _initializers(model):
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = _view(value.const_value, files)


def _unpack(model: ir.Model) -> None:
    """Take the bytes of large weights out of the protobuf that they came in, once: each look at them there
    copies them."""
    for value in _initializers(model):
        tensor = value.const_value
        if isinstance(tensor, ir.TensorProtoTensor) and tensor.nbytes >= _UNPACKED_FROM and _plain(tensor):
            value.const_value = ir.Tensor(
                tensor.numpy(), tensor.dtype, name=tensor.name, doc_string=tensor.doc_string
            )


def _plain(tensor: ir.TensorProtoTensor) -> bool:
    """Whether a NumPy array holds the same bytes, and nothing else is known of it."""
    return tensor.dtype.bitwidth >= 8 and tensor.dtype is not ir.DataType.STRING and not tensor.metadata_props


def _view(tensor: ir.ExternalTensor, files: dict[str, np.ndarray]) -> ir.TensorProtocol:
    """Return a tensor over the bytes of the mapped file; all tensors of one file share one mapping."""
    if not tensor.nbytes:
        return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)
    if tensor.path not in files:
        files[tensor.path] = np.memmap(tensor.path, np.uint8, "r")
    start, shape = tensor.offset or 0, ir.Shape(tensor.shape.numpy())
    held = np.asarray(files[tensor.path][start : start + tensor.nbytes])
    if tensor.dtype.bitwidth < 8:
        return ir.PackedTensor(held, tensor.dtype, shape=shape, name=tensor.name)
    array = held.view(tensor.dtype.numpy()).reshape(shape.numpy())
    return ir.Tensor(array, dtype=tensor.dtype, shape=shape, name=tensor.name)


def _initializers(model: ir.Model) -> list[ir.Value]:
    return [value for graph in model.graphs() for value in graph.initializers.values()]


def _check_external(model: ir.Model, path: Path) -> None:
    for value in _initializers(model):
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        data = Path(tensor.path)
        if not data.resolve().is_relative_to(path.parent.resolve()):
            raise ArtifactError(
                f"{path}: external data of '{value.name}' lies outside the model's folder, in {data}: ONNX "
                "allows none; copy it beside the model."
            )
        if not data.is_file():
            raise ArtifactError(f"{path}: external data of '{value.name}' is missing: {data} does not exist.")
        end = (tensor.offset or 0) + max(tensor.length or 0, tensor.nbytes)
        if data.stat().st_size < end:
            raise ArtifactError(
                f"{path}: external data of '{value.name}' is truncated: {data} ends before byte {end}."
            )


def weight_bytes(model: ir.Model) -> int:
    """Return the bytes of all initializers, those of subgraphs included."""
    return sum(
        value.const_value.nbytes
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    )


def write_model(model: ir.Model, folder: Path, name: str = MODEL_FILE) -> list[Path]:
    """Write `model` as `folder/name`, weights beside it where they exceed 1.5 GB; return the files written.

    Raises:
        ArtifactError: the disk is full or the folder not writable; files already written are removed.
    """
    files = [folder / name]
    external = f"{name}.data" if weight_bytes(model) > _EXTERNAL_ABOVE else None
    if external is not None:
        files.append(folder / external)
    whole = model if external is not None else self_contained(model)
    try:
        ir.save(whole, files[0], external_data=external)
    except OSError as error:
        for file in files:
            file.unlink(missing_ok=True)
        raise ArtifactError(f"cannot write {files[0]}: {_reason(error)}.") from error
    return files


def _reason(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return "no space left on the device; nothing half-written remains"
    return error.strerror or str(error)


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Raise `ArtifactError` where `folder` is a file, is not empty and `overwrite` is false, or may not be
    looked at."""
    try:
        is_file, is_full = folder.is_file(), folder.is_dir() and any(folder.iterdir())
    except OSError as error:
        raise ArtifactError(f"cannot write to {folder}: {_reason(error)}.") from error
    if is_file:
        raise ArtifactError(f"{folder} is a file, not a folder.")
    if is_full and not overwrite:
        raise ArtifactError(
            f"the folder {folder} is not empty: choose another one, or pass overwrite=True (--overwrite)."
        )


@contextlib.contextmanager
def new_folder(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a scratch folder that takes the place of `folder` on success and vanishes on failure.

    Raises:
        ArtifactError: `folder` is a file, is not empty and `overwrite` is false, or cannot be written.
    """
    check_folder(folder, overwrite=overwrite)
    with scratch_folder(folder) as scratch:
        yield scratch
        _replace(folder, scratch)


@contextlib.contextmanager
def scratch_folder(place: Path) -> Iterator[Path]:
    """Yield an empty folder beside `place`, on the same disk, that vanishes afterwards.

    Raises:
        ArtifactError: it cannot be made, or an `OSError` came out of the block.
    """
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    except OSError as error:
        raise ArtifactError(f"cannot write to {place.parent}: {_reason(error)}.") from error
    try:
        yield scratch
    except OSError as error:
        raise ArtifactError(f"cannot write {place}: {_reason(error)}.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _replace(folder: Path, scratch: Path) -> None:
    scratch.chmod(0o755)
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
        folder.rename(old / folder.name)
        try:
            scratch.rename(folder)
        except OSError:
            (old / folder.name).rename(folder)
            raise
        finally:
            shutil.rmtree(old, ignore_errors=True)
    else:
        scratch.rename(folder)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
