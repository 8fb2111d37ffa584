# SPDX-License-Identifier: Apache-2.0
"""An artifact: the compiled model, and the manifest that says how it came about.

Loading one needs onnxruntime and no torch.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from splitfold.runtime.errors import ArtifactError, UnsupportedError
from splitfold.runtime.feeds import Feeds
from splitfold.runtime.model_file import (
    MODEL_FILE,
    file_digest,
    new_folder,
    read_model,
    scratch_folder,
    write_model,
)
from splitfold.runtime.offline import OFFLINE_KEY, offline, offline_differences, offline_facts
from splitfold.runtime.options import SessionOptions
from splitfold.runtime.session import Session
from splitfold.runtime.target import Target

__all__ = [
    "MANIFEST_FILE",
    "MANIFEST_KEY",
    "PARTS_KEY",
    "Artifact",
    "check_files",
    "named_target",
    "read_manifest",
]

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
PARTS_KEY = "parts"
"""Key of the manifest of a bundle under which the manifests of its parts stand."""
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
        """Open the model on its target, with the session options that the manifest names.

        Args:
            threads: intra-operator threads; 0 is those of the options, or else the runtime's choice.
        """
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
            self._write(scratch)
        return place

    def save_optimized(
        self, folder: str | Path, *, overwrite: bool = False, feeds: Feeds | None = None
    ) -> Path:
        """Write the artifact as `save` does, its graph as the runtime's own optimisation leaves it, so that
        sessions open faster; return `folder`.

        The graph suits this processor and this version of the runtime: on others it may be slow or not open.
        The manifest names both under ``offline_optimized``, and `load` warns where they differ. Nodes that
        the runtime made bear no names of layers.

        Args:
            folder: where to.
            overwrite: whether what is there is replaced.
            feeds: inputs on which both graphs must give the same outputs; default synthetic ones, where they
                can be made up.

        Raises:
            ArtifactError: as `save`, or the outputs differ.
            SessionError: the runtime does not open the model, or the target's provider compiles it.
        """
        place = Path(folder)
        manifest = {**self.manifest, OFFLINE_KEY: offline_facts(self.model)}
        with (
            new_folder(place, overwrite=overwrite) as scratch,
            offline(self.model, self.target, feeds) as made,
        ):
            replace(self, model=made, manifest=manifest)._write(scratch)
        return place

    def _write(self, folder: Path) -> None:
        written = write_model(self.stamped(), folder)
        files = {file.name: file_digest(file) for file in written}
        text = json.dumps({**self.manifest, "files": files}, indent=1, sort_keys=True, ensure_ascii=False)
        (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")

    def save_model(self, path: str | Path) -> Path:
        """Write the model alone as one ``.onnx`` file (replacing it), weights beside it above 1.5 GB, and
        return its path.

        Raises:
            ArtifactError: it cannot be written; what was there before remains.
        """
        file = Path(path)
        with scratch_folder(file) as scratch:
            written = write_model(self.stamped(), scratch, file.name)
            for part in reversed(written):  # the weights first: the model is what readers look for
                part.replace(file.parent / part.name)
        return file

    def stamped(self) -> ir.Model:
        """Return a copy of the model whose own metadata hold the manifest."""
        model = self.model.clone()
        model.metadata_props[MANIFEST_KEY] = json.dumps(
            dict(self.manifest), sort_keys=True, ensure_ascii=False
        )
        return model

    @staticmethod
    def load(folder: str | Path) -> Artifact:
        """Read an artifact folder.

        Raises:
            ArtifactError: no such folder, files missing, bytes that differ from the manifest's digests, or a
                bundle.
        """
        place = Path(folder)
        manifest = read_manifest(place)
        if PARTS_KEY in manifest:
            parts = ", ".join(map(str, manifest[PARTS_KEY]))
            raise ArtifactError(f"{place} holds several artifacts ({parts}): Bundle.load reads it.")
        check_files(place, manifest)
        kept = {key: value for key, value in manifest.items() if key != "files"}
        if differences := offline_differences(kept):
            logger.warning(
                "%s was optimised offline elsewhere: %s. It may be slow here, or not open: compile it here.",
                place,
                "; ".join(differences),
            )
        return Artifact(read_model(place / MODEL_FILE), kept, named_target(kept))


def named_target(manifest: Mapping[str, Any]) -> Target:
    """Return the target that a manifest names, with its session options; the CPU provider for one of the
    user's own."""
    options = SessionOptions.of(manifest.get("session", {}))
    try:
        return Target.named(str(manifest.get("target", "cpu"))).with_options(options)
    except UnsupportedError:
        return Target.cpu().with_options(options)


def check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Compare the files that a manifest names with their digests.

    Raises:
        ArtifactError: one is missing or has changed.
    """
    for name, digest in dict(manifest.get("files", {})).items():
        file = folder / name
        if not file.is_file():
            raise ArtifactError(f"{folder} lacks {name}, which its manifest names.")
        if file_digest(file) != digest:
            raise ArtifactError(
                f"{file} is not the file that was verified: its digest differs from the manifest's."
            )


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
