# SPDX-License-Identifier: Apache-2.0
"""Calibration data: a re-iterable stream of feeds, never all in memory, with a digest."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from splitfold.runtime.errors import CalibrationError
from splitfold.runtime.feeds import Array, Feeds, check_feeds, model_inputs

__all__ = ["Calibration"]


@dataclass(frozen=True)
class Calibration:
    """Batches of feeds that can be walked as often as an analysis needs.

    Build it with `of` (any source) or `from_path` (an ``.npz`` file or a folder of them). Only one batch is
    held at a time.
    """

    batches: Callable[[], Iterator[Feeds]]
    """Starts a new walk over the batches."""
    resized: Callable[[int], Iterator[Feeds]] | None = None
    """Starts a walk over batches of another size, where the source is a row of samples (one ``.npz``)."""

    def __iter__(self) -> Iterator[Feeds]:
        return self.batches()

    @staticmethod
    def of(source: object, *, inputs: tuple[str, ...] = (), batch: int = 16) -> Calibration:
        """Return calibration data from whatever the user has.

        Args:
            source: a `Calibration`; a path; one feeds mapping; a re-iterable of feeds (list,
                ``torch.utils.data.DataLoader``); a function that returns a fresh iterator. A batch may be a
                mapping by input name, or a tuple (or one array) in the order of `inputs`.
            inputs: the model's input names, for batches that are not mappings.
            batch: samples a batch, where `source` is one ``.npz`` file.

        Raises:
            CalibrationError: `source` is a used-up or one-shot iterator, or nothing of the above.
        """
        if isinstance(source, Calibration):
            return source
        if isinstance(source, str | Path):
            return Calibration.from_path(Path(source), batch=batch)
        if isinstance(source, Mapping):
            return Calibration(lambda: iter([_feeds(source, inputs)]))
        if isinstance(source, Iterator):
            raise CalibrationError(
                "calibration is a one-shot iterator, and it is walked more than once: pass the generator "
                "function itself, or a list."
            )
        start = source if callable(source) and not isinstance(source, Iterable) else None
        if start is None and not isinstance(source, Iterable):
            raise CalibrationError(
                f"calibration is a {type(source).__name__}: pass an iterable of feeds, a generator "
                "function, an .npz path or a folder."
            )

        def walk() -> Iterator[Feeds]:
            items = start() if start is not None else source
            if not isinstance(items, Iterable):
                raise CalibrationError(
                    f"the calibration function returned a {type(items).__name__}, not an iterator of feeds."
                )
            return (_feeds(item, inputs) for item in items)

        return Calibration(walk)

    @staticmethod
    def from_path(path: Path, *, batch: int = 16) -> Calibration:
        """Return the samples of an ``.npz`` (keys are input names, first axis = sample) or of a folder of
        ``.npz`` files.

        In a folder each file is one batch as it stands. A single file is cut into batches of `batch` samples.

        Raises:
            CalibrationError: nothing there, not an ``.npz``, or arrays of different length.
        """
        if path.is_dir():
            files = sorted(path.glob("*.npz"))
            if not files:
                raise CalibrationError(f"the calibration folder {path} holds no .npz file.")
            return Calibration(lambda: (_load(file) for file in files))
        arrays = _load(path)
        counts = {name: len(array) if array.ndim else 1 for name, array in arrays.items()}
        samples = max((count for name, count in counts.items() if arrays[name].ndim), default=0)
        if samples == 0:
            raise CalibrationError(f"{path} holds no sample.")
        if wrong := [name for name, count in counts.items() if arrays[name].ndim and count != samples]:
            raise CalibrationError(
                f"{path}: first axes differ ({ {n: counts[n] for n in counts} }): '{wrong[0]}' should have "
                f"{samples} samples."
            )
        return Calibration(lambda: _cut(arrays, samples, batch), lambda size: _cut(arrays, samples, size))

    def fitted(self, model: ir.Model) -> Calibration:
        """Return the same samples in batches of the size that `model` is fixed to; unchanged where its batch
        axis is free.

        Samples that do not fill a last batch of a fixed size are left out.
        """
        size = _fixed_batch(model)
        start = self.resized
        if start is None or size is None:
            return self
        return Calibration(lambda: _full(start(size), size), start)

    def digest(self) -> str:
        """Return the SHA-256 over names, dtypes, shapes and bytes of all batches, in order."""
        total = hashlib.sha256()
        for feeds in self:
            for name in sorted(feeds):
                array = np.ascontiguousarray(feeds[name])
                total.update(f"{name}:{array.dtype}:{array.shape};".encode())
                total.update(array.tobytes())
        return total.hexdigest()

    def checked(self, model: ir.Model) -> Calibration:
        """Return the same data, each batch checked against the inputs of `model` when it is read.

        Raises:
            CalibrationError: (while walking) a batch does not fit, or there is none.
        """

        def walk() -> Iterator[Feeds]:
            count = 0
            for feeds in self:
                try:
                    check_feeds(model, feeds, where=f"the feeds of calibration batch {count}")
                except ValueError as error:
                    raise CalibrationError(str(error)) from error
                count += 1
                yield feeds
            if count == 0:
                raise CalibrationError("the calibration data is empty: at least one batch is needed.")

        return Calibration(walk)


def _fixed_batch(model: ir.Model) -> int | None:
    """Return the size of the first axis that all inputs of `model` with axes agree on, or None."""
    firsts = {value.shape[0] for value in model_inputs(model) if value.shape is not None and len(value.shape)}
    size = firsts.pop() if len(firsts) == 1 else None
    return size if isinstance(size, int) and size > 0 else None


def _full(batches: Iterable[Feeds], size: int) -> Iterator[Feeds]:
    """Yield batches of `size` samples, and a first one in any case: an error can then say what it holds."""
    for position, feeds in enumerate(batches):
        if position == 0 or all(array.ndim == 0 or len(array) == size for array in feeds.values()):
            yield feeds


def _feeds(item: object, inputs: tuple[str, ...]) -> Feeds:
    if isinstance(item, Mapping):
        return {str(name): _array(value) for name, value in item.items()}
    values = list(item) if isinstance(item, tuple | list) else [item]
    names = inputs or tuple(f"{position}" for position in range(len(values)))
    if len(values) < len(names):
        raise CalibrationError(
            f"a calibration batch has {len(values)} arrays, the model has {len(names)} inputs: {names}."
        )
    return {name: _array(value) for name, value in zip(names, values, strict=False)}


def _array(value: object) -> Array:
    detach = getattr(value, "detach", None)
    if detach is not None:  # a torch tensor, without importing torch
        value = detach().cpu().numpy()
    return np.asarray(value)


def _load(path: Path) -> dict[str, Array]:
    if not path.exists():
        raise CalibrationError(f"no calibration file at {path}.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (
        ValueError,
        OSError,
        AttributeError,
        TypeError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise CalibrationError(f"{path} is not an .npz of arrays: {error}") from error


def _cut(arrays: Mapping[str, Array], samples: int, batch: int) -> Iterator[Feeds]:
    for start in range(0, samples, batch):
        yield {name: a[start : start + batch] if a.ndim else a for name, a in arrays.items()}
