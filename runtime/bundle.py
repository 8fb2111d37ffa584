# SPDX-License-Identifier: Apache-2.0
"""Artifacts of one model for different work in one folder, each weight that several hold stored once."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

from splitfold.runtime.artifact import (
    MANIFEST_FILE,
    PARTS_KEY,
    Artifact,
    check_files,
    named_target,
    read_manifest,
)
from splitfold.runtime.errors import ArtifactError
from splitfold.runtime.model_file import file_digest, new_folder, read_model

__all__ = ["DECODE", "PREFILL", "SHARED_FILE", "Bundle"]

DECODE, PREFILL = "decode", "prefill"
"""Names of the parts that `Generator.open` looks for: one token a call, and a prompt."""
SHARED_FILE = "weights.data"
_STORED_FROM = 1024
"""Bytes from which on a weight stands in the shared file."""
_PAGE = 4096
"""Weights begin at its multiples, so that they can be mapped."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Bundle:
    """Several artifacts that are saved together.

    In the folder each part is an ``.onnx`` file of its own, which bare ONNX Runtime opens, and
    ``weights.data`` holds the weights of all: bytes that several parts hold once, whatever name, type and
    shape they have there. The runtime maps that file, so that sessions of several parts share what they read
    from it, but for weights that a kernel repacks for itself.

    Attributes:
        parts: at least one, by name, of letters, digits, ``_`` and ``-``.

    Raises:
        ValueError: there is no part, or a name that no file can have.
    """

    parts: Mapping[str, Artifact]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("a bundle has at least one part.")
        wrong = [name for name in self.parts if not _NAME.fullmatch(name)]
        if wrong:
            raise ValueError(f"'{wrong[0]}' is no name of a part: letters, digits, '_' and '-'.")

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write all parts into `folder`, all or nothing, and return it; the same parts give the same bytes.

        Raises:
            ArtifactError: `folder` is not empty and `overwrite` is false, or it cannot be written.
        """
        place = Path(folder)
        with new_folder(place, overwrite=overwrite) as scratch:
            with (scratch / SHARED_FILE).open("wb") as file:
                store = _Store(file, scratch, {})
                models = {name: store.moved(part.stamped()) for name, part in self.parts.items()}
            for name, model in models.items():
                ir.save(model, scratch / f"{name}.onnx")
            written = sorted(scratch.iterdir())
            manifest = {
                PARTS_KEY: {name: dict(part.manifest) for name, part in self.parts.items()},
                "files": {file.name: file_digest(file) for file in written},
            }
            text = json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False)
            (scratch / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")
        return place

    @staticmethod
    def load(folder: str | Path) -> Bundle:
        """Read what `save` wrote; weights stay on disk until they are used.

        Raises:
            ArtifactError: it is no bundle, files are missing, or bytes differ from the manifest's digests.
        """
        place = Path(folder)
        manifest = read_manifest(place)
        parts = manifest.get(PARTS_KEY)
        if not isinstance(parts, Mapping) or not parts:
            raise ArtifactError(f"{place} is no bundle: its manifest names no parts (Artifact.load?).")
        check_files(place, manifest)
        return Bundle(
            {
                name: Artifact(read_model(place / f"{name}.onnx"), kept, named_target(kept))
                for name, kept in parts.items()
            }
        )


@dataclass(frozen=True)
class _Store:
    """The shared file, open for writing.

    Attributes:
        file: it.
        folder: where it stands.
        offsets: where what stands, by digest of the bytes.
    """

    file: BinaryIO
    folder: Path
    offsets: dict[bytes, int]

    def moved(self, model: ir.Model) -> ir.Model:
        """Move the weights of `model` into the file, and return it."""
        for graph in model.graphs():
            for value in graph.initializers.values():
                tensor = value.const_value
                if (
                    tensor is not None
                    and tensor.nbytes >= _STORED_FROM
                    and tensor.dtype != ir.DataType.STRING
                ):
                    value.const_value = self._held(tensor)
        return model

    def _held(self, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        content = tensor.tobytes()
        digest = hashlib.sha256(content).digest()
        if digest not in self.offsets:
            end = self.file.seek(0, 2)
            self.offsets[digest] = self.file.seek(-(-end // _PAGE) * _PAGE)
            self.file.write(content)
        return ir.ExternalTensor(
            SHARED_FILE,
            self.offsets[digest],
            len(content),
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=tensor.name or "",
            base_dir=self.folder,
        )
