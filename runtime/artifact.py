# SPDX-License-Identifier: Apache-2.0
"""An artifact: the compiled model, and the manifest that says how it came about.

Loading one needs onnxruntime and no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from splitfold.runtime.errors import ArtifactError
from splitfold.runtime.model_file import (
    MODEL_FILE,
    file_digest,
    new_folder,
    read_model,
    scratch_folder,
    write_model,
)
from splitfold.runtime.session import Session
from splitfold.runtime.target import Target

__all__ = ["MANIFEST_FILE", "MANIFEST_KEY", "Artifact", "read_manifest"]

MANIFEST_FILE = "manifest.json"
MANIFEST_KEY = "splitfold.manifest"
"""Key of the model's own metadata under which the manifest travels, so that a bare ``.onnx`` can be replayed.
"""


@dataclass(frozen=True)
class Artifact:
    """A compiled model.

    Attributes:
        model: the ONNX graph.
        manifest: what made it: pipeline, records, versions, digests, signature, verification. Plain JSON
            values.
        target: where it runs.
        records: the pass records, with times; empty for an artifact that was loaded.
    """

    model: ir.Model
    manifest: Mapping[str, Any]
    target: Target = field(default_factory=Target.cpu)
    records: tuple[Any, ...] = ()

    def session(self, *, threads: int = 0) -> Session:
        """Open the model on its target."""
        return Session(self.model, self.target, threads=threads)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write ``model.onnx`` (weights beside it above 1.5 GB) and ``manifest.json`` into `folder`, all or
        nothing, and return it.

        The same artifact gives the same bytes: no time, no machine stands in them.

        Raises:
            ArtifactError: `folder` is not empty and `overwrite` is false, or it cannot be written.
        """
        place = Path(folder)
        with new_folder(place, overwrite=overwrite) as scratch:
            written = write_model(self._stamped(), scratch)
            files = {file.name: file_digest(file) for file in written}
            text = json.dumps({**self.manifest, "files": files}, indent=1, sort_keys=True, ensure_ascii=False)
            (scratch / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")
        return place

    def save_model(self, path: str | Path) -> Path:
        """Write the model alone as one ``.onnx`` file (replacing it), weights beside it above 1.5 GB, and
        return its path.

        Raises:
            ArtifactError: it cannot be written; what was there before remains.
        """
        file = Path(path)
        with scratch_folder(file) as scratch:
            written = write_model(self._stamped(), scratch, file.name)
            for part in reversed(written):  # the weights first: the model is what readers look for
                part.replace(file.parent / part.name)
        return file

    def _stamped(self) -> ir.Model:
        model = self.model.clone()
        model.metadata_props[MANIFEST_KEY] = json.dumps(
            dict(self.manifest), sort_keys=True, ensure_ascii=False
        )
        return model

    @staticmethod
    def load(folder: str | Path) -> Artifact:
        """Read an artifact folder.

        Raises:
            ArtifactError: no such folder, files missing, or bytes that differ from the manifest's digests.
        """
        place = Path(folder)
        manifest = read_manifest(place)
        for name, digest in dict(manifest.get("files", {})).items():
            file = place / name
            if not file.is_file():
                raise ArtifactError(f"{place} lacks {name}, which its manifest names.")
            if file_digest(file) != digest:
                raise ArtifactError(
                    f"{file} is not the file that was verified: its digest differs from the manifest's."
                )
        kept = {key: value for key, value in manifest.items() if key != "files"}
        return Artifact(read_model(place / MODEL_FILE), kept)


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of an artifact folder or of an ``.onnx`` file that splitfold wrote.

    Raises:
        ArtifactError: there is none, or it is not JSON.
    """
    try:
        if path.is_dir():
            text = (path / MANIFEST_FILE).read_text(encoding="utf-8")
        else:
            text = read_model(path).metadata_props.get(MANIFEST_KEY, "")
        manifest = json.loads(text)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is no artifact: it has no {MANIFEST_FILE}.") from error
    except json.JSONDecodeError as error:
        raise ArtifactError(
            f"{path} carries no readable manifest: splitfold did not write it, or it was changed."
        ) from error
    if not isinstance(manifest, dict):
        raise ArtifactError(f"{path} carries no readable manifest.")
    return manifest
