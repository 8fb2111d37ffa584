# SPDX-License-Identifier: Apache-2.0
"""Snapshots: the model before the first pass and after each one, as files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import onnx_ir as ir

from splitfold.compiler.debug.weights_file import WeightsFile
from splitfold.compiler.manifest import record_values
from splitfold.passes.base import Pass
from splitfold.passes.pipeline import PassRecord
from splitfold.passes.text import render_model
from splitfold.runtime.errors import ArtifactError
from splitfold.runtime.model_file import check_folder

__all__ = ["Snapshots"]

_WEIGHTS = "weights.data"
_OWN = re.compile(r"\d{2,}-[a-z0-9-]+\.(onnx|txt|json)|weights\.data")
"""Names of the files that an earlier run left; nothing else in the folder is touched."""


class Snapshots:
    """Observer that writes the model before the first pass and after each pass::

        compile(model, observers=[Snapshots("steps")])

    The files are numbered: ``00-input.onnx``, ``01-canonicalize.onnx``, and so on. Beside each lies its text
    (``.txt``), and beside all but the first the record of the pass (``.json``); weights stand once, in
    ``weights.data``. Each ``.onnx`` is a model like any other: the pipeline can be resumed from it. Every
    file is whole from the moment it is there, so that a run that fails leaves what came before. A compilation
    that repairs itself runs its pipeline again: the last run's snapshots remain.

    Args:
        folder: where they go; it is made if need be.
        overwrite: whether the folder may hold files already. Snapshots among them are replaced when the run
            starts, other files stay.

    Raises:
        ArtifactError: the folder is a file, is not empty and `overwrite` is false, or cannot be written; in
            the run also where the model reads its weights from it.
    """

    def __init__(self, folder: str | Path, *, overwrite: bool = False) -> None:
        self._folder = Path(folder)
        check_folder(self._folder, overwrite=overwrite)
        self._models: list[Path] = []
        self._weights = WeightsFile(self._folder / _WEIGHTS)
        self._digits = 2

    @property
    def models(self) -> tuple[Path, ...]:
        """The ``.onnx`` files of this run so far, in order."""
        return tuple(self._models)

    def before_pass(self, step: Pass, model: ir.Model, index: int, total: int) -> None:
        """Before the first pass, clear the folder of earlier snapshots and write the model."""
        if index:
            return
        self._digits = max(2, len(str(total)))
        try:
            self._start(model)
        except OSError as error:
            raise self._failed(error) from error
        self._write("input", model, None)

    def after_pass(self, step: Pass, model: ir.Model, record: PassRecord) -> PassRecord:
        """Write the model and the record of the pass."""
        self._write(step.name, model, record)
        return record

    def _start(self, model: ir.Model) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        own = [file for file in self._folder.iterdir() if _OWN.fullmatch(file.name)]
        replaced = {file.resolve() for file in own}
        for value in (value for graph in model.graphs() for value in graph.initializers.values()):
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and Path(tensor.path).resolve() in replaced:
                raise ArtifactError(
                    f"the model reads its weights from {tensor.path}, which its own snapshots would replace: "
                    "choose another folder."
                )
        for file in own:
            file.unlink()
        self._models = []
        self._weights = WeightsFile(self._folder / _WEIGHTS)

    def _write(self, name: str, model: ir.Model, record: PassRecord | None) -> None:
        stem = f"{len(self._models):0{self._digits}d}-{name}"
        try:
            if record is not None:
                values = {**record_values(record), "seconds": round(record.seconds, 6)}
                self._write_file(
                    f"{stem}.json", json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False).encode()
                )
            self._write_file(f"{stem}.txt", f"{render_model(model)}\n".encode())
            content = ir.to_proto(self._weights.apart(model)).SerializeToString()
            self._models.append(self._write_file(f"{stem}.onnx", content))
        except OSError as error:
            raise self._failed(error) from error

    def _write_file(self, name: str, content: bytes) -> Path:
        file, part = self._folder / name, self._folder / f".{name}.part"
        try:
            part.write_bytes(content)
            return part.replace(file)
        finally:
            part.unlink(missing_ok=True)

    def _failed(self, error: OSError) -> ArtifactError:
        return ArtifactError(f"cannot write snapshots to {self._folder}: {error.strerror or error}.")
