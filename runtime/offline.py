# SPDX-License-Identifier: Apache-2.0
"""A model after the runtime's own optimisation: sessions of it open faster, on machines like this one."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from splitfold.runtime.costs.machine import processor_name
from splitfold.runtime.digest import content_digest
from splitfold.runtime.errors import ArtifactError, UnsupportedError
from splitfold.runtime.feeds import Feeds, synthetic_feeds
from splitfold.runtime.model_file import read_model
from splitfold.runtime.session import Session, runtime_version, write_optimized
from splitfold.runtime.target import Target

__all__ = ["OFFLINE_KEY", "offline", "offline_differences", "offline_facts"]

OFFLINE_KEY = "offline_optimized"
"""Key of the manifest under which it stands what the graph was optimised for."""


@contextlib.contextmanager
def offline(model: ir.Model, target: Target, feeds: Feeds | None) -> Iterator[ir.Model]:
    """Yield the graph that the runtime really executes, weights included, which stand in files that go with
    the context.

    Args:
        model: it is not changed.
        target: where it runs.
        feeds: inputs on which both must give the same outputs, bit for bit; default synthetic ones.

    Raises:
        SessionError: the runtime refuses the model, or a provider compiles it.
        ArtifactError: the outputs differ.
    """
    with tempfile.TemporaryDirectory(prefix="splitfold-offline-") as folder:
        written = write_optimized(model, target, Path(folder))
        _check_same(model, written, target, _inputs(model) if feeds is None else feeds)
        yield read_model(written)


def _inputs(model: ir.Model) -> Feeds | None:
    """Return synthetic feeds, or None where they cannot be made up."""
    try:
        return synthetic_feeds(model)
    except UnsupportedError:
        return None


def _check_same(model: ir.Model, written: Path, target: Target, feeds: Feeds | None) -> None:
    after = Session(written, target)  # it must open in any case
    if feeds is None:
        return
    before = Session(model, target).run(feeds)
    for name, array in after.run(feeds).items():
        if not np.array_equal(array, before[name], equal_nan=array.dtype.kind in "fc"):
            raise ArtifactError(
                f"the graph that the runtime optimised gives another '{name}' than the model: save it as it "
                "is, without offline optimisation."
            )


def offline_facts(model: ir.Model) -> dict[str, str]:
    """Return what the manifest says of a graph that was optimised here, made of `model`."""
    return {
        "graph": content_digest(model),
        "processor": processor_name(),
        "runtime": runtime_version(),
        "caveat": "The graph was optimised by ONNX Runtime for this processor: elsewhere compile again.",
    }


def offline_differences(manifest: Mapping[str, Any]) -> list[str]:
    """Return what is otherwise here than where the graph of a manifest was optimised; empty where it was
    not."""
    recorded = manifest.get(OFFLINE_KEY)
    if not isinstance(recorded, Mapping):
        return []
    here = {"processor": processor_name(), "runtime": runtime_version()}
    return [
        f"{name} {recorded.get(name)}, here {now}" for name, now in here.items() if recorded.get(name) != now
    ]
