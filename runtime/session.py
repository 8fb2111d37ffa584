# SPDX-License-Identifier: Apache-2.0
"""Running models with ONNX Runtime; the only file that imports it."""

from __future__ import annotations

import enum
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from splitfold.runtime.errors import SessionError
from splitfold.runtime.feeds import Array, Feeds
from splitfold.runtime.model_file import read_model, self_contained, weight_bytes, write_model
from splitfold.runtime.target import Target

__all__ = ["Optimization", "Session", "optimized_graph", "runtime_version"]

_IN_MEMORY_BELOW = 1_500_000_000


class Optimization(enum.Enum):
    """How far the runtime may rewrite the graph."""

    OFF = "off"
    """Nodes run as written: for comparing numbers."""
    ALL = "all"
    """The runtime's default: for deployment and timing."""


def runtime_version() -> str:
    """Return the version of ONNX Runtime."""
    return str(ort.__version__)


class Session:
    """A model, opened in ONNX Runtime.

    Args:
        model: a model in memory, or the path of an ``.onnx`` file.
        target: where it runs.
        threads: intra-operator threads; 0 is the runtime's choice.
        optimization: how far the runtime may rewrite the graph.
        taps: names of internal values that `run` will be asked for; naming them here saves opening the model
            again.
        profile: folder into which the runtime's own profiler writes; see `end_profiling`.

    Raises:
        SessionError: the runtime refuses the model.
    """

    def __init__(
        self,
        model: ir.Model | str | Path,
        target: Target | None = None,
        *,
        threads: int = 0,
        optimization: Optimization = Optimization.ALL,
        taps: Sequence[str] = (),
        profile: Path | None = None,
    ) -> None:
        self._target = target or Target.cpu()
        self._options = _options(threads, optimization)
        if profile is not None:
            self._options.enable_profiling = True
            self._options.profile_file_prefix = str(profile / "events")
            self._optimized = _keep_optimized(self._options, profile)
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._model = model
        self._session = self._open(_with_taps(model, taps) if taps else model)
        self.inputs: tuple[str, ...] = tuple(value.name for value in self._session.get_inputs())
        names = tuple(value.name for value in self._session.get_outputs())
        self.outputs: tuple[str, ...] = names[: len(names) - _added(model, taps)]
        """Names of the model's own outputs, in order."""
        self._known = set(names)

    def _open(self, model: ir.Model | str | Path) -> ort.InferenceSession:
        try:
            return ort.InferenceSession(self._source(model), self._options, providers=[self._target.provider])
        except Exception as error:
            raise SessionError(
                f"ONNX Runtime {ort.__version__} cannot open the model: {_first_line(error)}"
            ) from error

    def _source(self, model: ir.Model | str | Path) -> str | bytes:
        if isinstance(model, str | Path):
            return str(model)
        if weight_bytes(model) < _IN_MEMORY_BELOW:
            return bytes(ir.to_proto(self_contained(model)).SerializeToString())
        self._scratch = tempfile.TemporaryDirectory(prefix="splitfold-session-")
        return str(write_model(model.clone(), Path(self._scratch.name))[0])

    def run(self, feeds: Feeds, taps: Sequence[str] = ()) -> dict[str, Array]:
        """Run the model once and return its outputs, and the values named in `taps`, by name.

        Raises:
            SessionError: the feeds do not fit, a kernel fails, or a tap names no value of the graph.
        """
        names = [*self.outputs, *(tap for tap in taps if tap not in self.outputs)]
        if unknown := set(taps) - self._known:
            self._session = self._open(
                _with_taps(self._model, [*self._known - set(self.outputs), *sorted(unknown)])
            )
            self._known |= unknown
        try:
            results = self._session.run(names, {name: np.asarray(feeds[name]) for name in feeds})
        except Exception as error:
            raise SessionError(f"ONNX Runtime {ort.__version__} failed: {_first_line(error)}") from error
        return dict(zip(names, results, strict=True))

    def end_profiling(self) -> tuple[Path, ir.Model]:
        """Stop the profiler of a session that was opened with one; return the JSON file of its events, and
        the graph that was executed, without its weights' bytes: names that the runtime makes up differ from
        session to session."""
        return Path(self._session.end_profiling()), ir.load(self._optimized)


def _options(threads: int, optimization: Optimization) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if optimization is Optimization.OFF:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def _keep_optimized(options: ort.SessionOptions, folder: Path) -> Path:
    """Let the session write the graph that it executes into `folder`, and return its path."""
    written = folder / "optimized.onnx"
    options.optimized_model_filepath = str(written)
    prefix = "session.optimized_model_external_initializers"
    options.add_session_config_entry(f"{prefix}_file_name", "weights.bin")
    options.add_session_config_entry(f"{prefix}_min_size_in_bytes", "1024")
    return written


def _added(model: ir.Model | str | Path, taps: Sequence[str]) -> int:
    """Return how many of `taps` are not outputs already, so that tapping adds them."""
    if not taps:
        return 0
    outputs = model.graph.outputs if isinstance(model, ir.Model) else read_model(Path(model)).graph.outputs
    return len(set(taps) - {value.name for value in outputs})


def _with_taps(model: ir.Model | str | Path, taps: Sequence[str]) -> ir.Model:
    tapped = model.clone() if isinstance(model, ir.Model) else read_model(Path(model))
    present = {value.name for value in tapped.graph.outputs}
    values = {value.name: value for node in tapped.graph for value in node.outputs}
    values |= {value.name: value for value in tapped.graph.inputs}
    if missing := [tap for tap in taps if tap not in values]:
        raise SessionError(f"no value named '{missing[0]}' at the top level of the graph to tap.")
    tapped.graph.outputs.extend(values[tap] for tap in dict.fromkeys(taps) if tap not in present)
    return tapped


def optimized_graph(model: ir.Model | Path, target: Target) -> ir.Model:
    """Open `model` as deployed and return the graph that the runtime really executes, without its weights'
    bytes.

    Raises:
        SessionError: the runtime refuses the model.
    """
    with tempfile.TemporaryDirectory(prefix="splitfold-optimized-") as folder:
        options = _options(0, Optimization.ALL)
        written = _keep_optimized(options, Path(folder))
        source = model
        if isinstance(model, ir.Model):
            source = write_model(model.clone(), Path(folder), "source.onnx")[0]
        try:
            ort.InferenceSession(str(source), options, providers=[target.provider])
        except Exception as error:
            raise SessionError(
                f"ONNX Runtime {ort.__version__} cannot open the model: {_first_line(error)}"
            ) from error
        return ir.load(written)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:600] if str(error).strip() else type(error).__name__
