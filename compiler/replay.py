# SPDX-License-Identifier: Apache-2.0
"""Replay: make an artifact again from its manifest, and say whether the same bytes come out."""

from __future__ import annotations

import dataclasses
import functools
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitfold.compiler.driver import compile
from splitfold.compiler.manifest import FORMAT, installed_version
from splitfold.compiler.plan_record import with_plan_files, with_recorded_plans
from splitfold.compiler.realisation import Unrealised
from splitfold.compiler.tolerance import Tolerance
from splitfold.passes.pipeline import Observer, Pipeline
from splitfold.runtime.artifact import Artifact, read_manifest
from splitfold.runtime.digest import content_digest
from splitfold.runtime.errors import ArtifactError
from splitfold.runtime.model_file import file_digest, model_path, read_model
from splitfold.runtime.offline import OFFLINE_KEY
from splitfold.runtime.options import SessionOptions
from splitfold.runtime.target import Target

__all__ = ["Replay", "replay"]

logger = logging.getLogger(__name__)

_CARRIED_OVER = ("metric", "search", "put_back", "too_slow")
"""What a replay cannot find again: the user's metric function is not in the manifest, and the layers that the
compiler put back to float are excluded from the start by the recorded pipeline."""


@dataclass(frozen=True)
class Replay:
    """The outcome of a replay.

    Attributes:
        artifact: what was built now.
        same_model: whether graph and weights are identical.
        same_files: whether the files are identical byte for byte.
        warnings: what differs between then and now: package versions, inputs, measured facts.
    """

    artifact: Artifact
    same_model: bool
    same_files: bool
    warnings: tuple[str, ...]


def replay(
    original: str | Path,
    model: object,
    example_inputs: object = None,
    *,
    calibration: object = None,
    dynamic_shapes: object = None,
    observers: Sequence[Observer] = (),
) -> Replay:
    """Build the artifact `original` again from its manifest.

    Args:
        original: an artifact folder, or an ``.onnx`` file that splitfold wrote.
        model: what it was compiled from.
        example_inputs: those of the original run, where it was given any.
        calibration: the original's calibration data.
        dynamic_shapes: as `compile` takes them, for a torch module.
        observers: are told of each pass.

    Raises:
        ArtifactError: no readable manifest, or `model` or `calibration` is not what the manifest names.
        SplitfoldError: whatever `compile` raises.
    """
    place = Path(original)
    manifest = read_manifest(place)
    if manifest.get("format") != FORMAT:
        raise ArtifactError(
            f"{place} has manifest format {manifest.get('format')}; this version replays format {FORMAT}."
        )
    _check_calibration_given(place, manifest, calibration)
    warnings = _version_warnings(manifest)
    again = functools.partial(
        compile,
        model,
        example_inputs,
        target=Target.named(str(manifest["target"])).with_options(
            SessionOptions.of(manifest.get("session", {}))
        ),
        calibration=calibration,
        dynamic_shapes=dynamic_shapes,
        tolerance=Tolerance(cosine=None),
        observers=observers,
        unrealised=Unrealised.KEEP,  # layers that went back to float stand in the recorded pipeline
        speed=None,  # likewise
    )
    with tempfile.TemporaryDirectory(prefix="splitfold-plans-") as folder:
        steps = Pipeline.parse(str(manifest["pipeline"]))
        built: Artifact = again(pipeline=with_plan_files(manifest, steps, Path(folder)))
        _check_digests(place, manifest, built.manifest)
        if "plans" in manifest and built.manifest.get("plans") != manifest["plans"]:
            warnings.append("another plan of precisions would be made now: the recorded one was carried out")
            built = again(pipeline=with_recorded_plans(manifest, steps, Path(folder)))
    return _compared(place, manifest, built, warnings)


def _compared(place: Path, manifest: Mapping[str, Any], built: Artifact, warnings: list[str]) -> Replay:
    carried = {key: manifest[key] for key in _CARRIED_OVER if key in manifest}
    built = dataclasses.replace(built, manifest={**built.manifest, **carried})
    offline = manifest.get(OFFLINE_KEY)
    if offline is not None:
        warnings.append("it was optimised offline by the runtime: the graph before that is compared")
    was = offline["graph"] if offline is not None else content_digest(read_model(model_path(place)))
    same = was == content_digest(built.model)
    files = _same_files(place, built) if same and offline is None else False
    return Replay(built, same, files, (*warnings, *_fact_warnings(manifest, built.manifest)))


def _check_calibration_given(place: Path, manifest: Mapping[str, Any], calibration: object) -> None:
    if manifest.get("calibration") is not None and calibration is None:
        raise ArtifactError(
            f"{place} was made with calibration data (digest {_short(manifest['calibration'])}): "
            "pass the same data (--calibration)."
        )


def _check_digests(place: Path, manifest: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for key, what, option in (
        ("source", "model", "--model"),
        ("calibration", "calibration data", "--calibration"),
    ):
        if manifest.get(key) != now.get(key):
            raise ArtifactError(
                f"this is not the {what} that {place} was made from: its digest is {_short(now.get(key))}, "
                f"the manifest names {_short(manifest.get(key))}. Pass the original {what} ({option})."
            )


def _short(digest: object) -> str:
    return "none" if digest is None else str(digest)[:12]


def _version_warnings(manifest: Mapping[str, Any]) -> list[str]:
    recorded = dict(manifest.get("versions", {}))
    return [
        f"{package} was {then}, is {installed_version(package)}"
        for package, then in recorded.items()
        if then != installed_version(package)
    ]


def _fact_warnings(manifest: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    found = []
    if manifest.get("feeds") != now.get("feeds"):
        found.append(
            "other example inputs than in the original run (pass those, --inputs): deviations differ"
        )
    if manifest.get("realised") != now.get("realised"):
        found.append("this runtime picks other kernels than the manifest records")
    return found


def _same_files(place: Path, built: Artifact) -> bool:
    """Write the rebuilt artifact to a scratch folder and compare its files with the original's."""
    with tempfile.TemporaryDirectory(prefix="splitfold-replay-") as scratch:
        if place.is_dir():
            made = built.save(Path(scratch) / "artifact")
            names = sorted(file.name for file in made.iterdir())
            return all(
                (place / name).is_file() and file_digest(place / name) == file_digest(made / name)
                for name in names
            )
        file = built.save_model(Path(scratch) / place.name)
        return file_digest(file) == file_digest(place)
