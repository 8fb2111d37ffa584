# SPDX-License-Identifier: Apache-2.0
"""An artifact on disk and its original, as `compile` returned them: what a report needs."""

from __future__ import annotations

from pathlib import Path

from splitfold.compiler.compiled import Compiled
from splitfold.compiler.debug.report.steps import records_from
from splitfold.compiler.locate import Located
from splitfold.compiler.source import load_source
from splitfold.runtime.artifact import Artifact, read_manifest
from splitfold.runtime.digest import content_digest
from splitfold.runtime.errors import ArtifactError
from splitfold.runtime.model_file import read_model
from splitfold.runtime.target import Target

__all__ = ["reopen"]


def reopen(place: Path, original: Located, data: object = None) -> Compiled:
    """Return the artifact at `place` with its original.

    Args:
        place: an artifact folder, or an ``.onnx`` file that splitfold wrote.
        original: the model that it was compiled from.
        data: inputs for both, in any form that `compile` takes as calibration; None makes them up.

    Raises:
        ArtifactError: there is no artifact, or `original` is not what its manifest names.
        CaptureError, CalibrationError: the original or the data cannot be read.
    """
    manifest = read_manifest(place)
    target = Target.named(str(manifest.get("target", "cpu")))
    model = Artifact.load(place).model if place.is_dir() else read_model(place)
    source = load_source(original.model, original.example_inputs, original.dynamic_shapes, data, target)
    found = content_digest(source.model)
    if manifest.get("source") != found:
        raise ArtifactError(
            f"this is not the model that {place} was made from: its digest is {found[:12]}, the manifest "
            f"names {str(manifest.get('source'))[:12]}. Pass the original model (--model)."
        )
    return Compiled(model, manifest, target, records=records_from(manifest), source=source)
