# SPDX-License-Identifier: Apache-2.0
"""Running models with ONNX Runtime; beside the provider's own file the only one that imports it."""

from __future__ import annotations

import enum
import functools
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from splitfold.runtime.errors import ProviderError, SessionError
from splitfold.runtime.feeds import Array, Feeds
from splitfold.runtime.model_file import read_model, self_contained, weight_bytes, write_model
from splitfold.runtime.openvino import add_openvino, why_no_openvino
from splitfold.runtime.options import SessionOptions
from splitfold.runtime.placement import PlacedNode, Placement
from splitfold.runtime.target import OPENVINO_PROVIDER, Target
from splitfold.runtime.weightless import lendable, serialized

__all__ = [
    "Held",
    "Optimization",
    "Session",
    "optimized_graph",
    "runtime_version",
    "usable",
    "write_optimized",
]

logger = logging.getLogger(__name__)

_RECORD_PLACEMENT = "session.record_ep_graph_assignment_info"
_IN_MEMORY_BELOW = 1_500_000_000


class Optimization(enum.Enum):
    """How far the runtime may rewrite the graph."""

    OFF = "off"
    """Nodes run as written, on the CPU provider where the target's own compiles: for comparing numbers."""
    ALL = "all"
    """The runtime's default: for deployment and timing."""


def runtime_version() -> str:
    """Return the version of ONNX Runtime."""
    return str(ort.__version__)


class Held:
    """An array that stays with the runtime: it goes from one run to the next without a copy."""

    def __init__(self, value: ort.OrtValue) -> None:
        self._value = value

    @staticmethod
    def of(array: Array) -> Held:
        """Return the array as the runtime sees it; it must not be changed while it is in use."""
        return Held(ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)))

    def array(self) -> Array:
        """Return a copy."""
        return np.array(self._value.numpy())


class Session:
    """A model, opened in ONNX Runtime.

    Args:
        model: a model in memory, or the path of an ``.onnx`` file.
        target: where it runs.
        threads: intra-operator threads; 0 is the target's choice, and where it has none the runtime's.
        optimization: how far the runtime may rewrite the graph.
        taps: names of internal values that `run` will be asked for; naming them here saves opening the model
            again.
        profile: folder into which the runtime's own profiler writes; see `end_profiling`.

    Raises:
        SessionError: the runtime refuses the model.
        ProviderError: the target's provider cannot be used here.
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
        self._asked = (target or Target.cpu()).options
        self._threads = threads or self._asked.threads
        self._target = _as_run(target or Target.cpu(), optimization)
        self._optimization = optimization
        if profile is not None and self._target.compiles:
            raise SessionError(
                f"target {self._target.name} compiles the graph: no kernel can be timed; profile on cpu."
            )
        self._profile = profile
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._lent: list[ort.OrtValue] = []
        self._model = model
        self._session = self._open(taps)
        self.inputs: tuple[str, ...] = tuple(value.name for value in self._session.get_inputs())
        names = tuple(value.name for value in self._session.get_outputs())
        self.outputs: tuple[str, ...] = names[: len(names) - _added(model, taps)]
        """Names of the model's own outputs, in order."""
        self._known = set(names)

    def _open(self, taps: Sequence[str]) -> ort.InferenceSession:
        options = _options(self._asked, self._threads, self._optimization)
        providers = _providers(options, self._target, self._threads)
        if self._profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(self._profile / "events")
            self._optimized = _keep_optimized(options, self._profile)
        disabled = list(self._asked.disabled_optimizers) or None
        try:
            return ort.InferenceSession(
                self._source(taps, options), options, providers=providers, disabled_optimizers=disabled
            )
        except SessionError:
            raise
        except Exception as error:
            raise _refused(error) from error

    def _source(self, taps: Sequence[str], options: ort.SessionOptions) -> str | bytes:
        """Return what the runtime opens; weights that it is lent go into `options`, and live as long as this
        session."""
        if isinstance(self._model, str | Path) and not taps:
            return str(self._model)
        model = self._model if isinstance(self._model, ir.Model) else read_model(Path(self._model))
        made = _serialized(model, taps, options, lends=not self._target.compiles)
        if made is None:
            return self._written(model.clone(), taps)
        self._lent = made[1]
        return made[0]

    def _written(self, copy: ir.Model, taps: Sequence[str]) -> str:
        copy.graph.outputs[:] = _tapped(copy, taps)
        self._scratch = tempfile.TemporaryDirectory(prefix="splitfold-session-")
        return str(write_model(copy, Path(self._scratch.name))[0])

    def run(self, feeds: Feeds, taps: Sequence[str] = ()) -> dict[str, Array]:
        """Run the model once and return its outputs, and the values named in `taps`, by name.

        Raises:
            SessionError: the feeds do not fit, a kernel fails, or a tap names no value of the graph.
        """
        names = [*self.outputs, *(tap for tap in taps if tap not in self.outputs)]
        if unknown := set(taps) - self._known:
            self._session = self._open([*self._known - set(self.outputs), *sorted(unknown)])
            self._known |= unknown
        try:
            results = self._session.run(names, {name: np.asarray(feeds[name]) for name in feeds})
        except Exception as error:
            raise SessionError(f"ONNX Runtime {ort.__version__} failed: {_first_line(error)}") from error
        return dict(zip(names, results, strict=True))

    def run_held(self, feeds: Mapping[str, Array | Held]) -> dict[str, Held]:
        """Run the model once; what it returns can be fed again without a copy.

        Raises:
            SessionError: the feeds do not fit, or a kernel fails.
        """
        names = list(self.outputs)
        try:
            values = {
                name: (it if isinstance(it, Held) else Held.of(it))._value for name, it in feeds.items()
            }
            results = self._session.run_with_ort_values(names, values)
        except Exception as error:
            raise SessionError(f"ONNX Runtime {ort.__version__} failed: {_first_line(error)}") from error
        return {name: Held(value) for name, value in zip(names, results, strict=True)}

    @property
    def placement(self) -> Placement | None:
        """Which provider runs what; None on the CPU provider, and where the runtime does not tell (before
        1.24)."""
        if not self._target.compiles or not hasattr(self._session, "get_provider_graph_assignment_info"):
            return None
        nodes: dict[str, list[PlacedNode]] = {}
        parts = self._session.get_provider_graph_assignment_info()
        for part in parts:
            nodes.setdefault(part.ep_name, []).extend(map(_placed, part.get_nodes()))
        provider = self._target.provider
        held = {name: tuple(found) for name, found in nodes.items()}
        return Placement(provider, held, sum(part.ep_name == provider for part in parts))

    def end_profiling(self) -> tuple[Path, ir.Model]:
        """Stop the profiler of a session that was opened with one; return the JSON file of its events, and
        the graph that was executed, without its weights' bytes: names that the runtime makes up differ from
        session to session."""
        return Path(self._session.end_profiling()), ir.load(self._optimized)


def _options(asked: SessionOptions, threads: int, optimization: Optimization) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = asked.arena
    for key, value in asked.config_entries().items():
        options.add_session_config_entry(key, value)
    options.log_severity_level = 4
    if optimization is Optimization.OFF:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def usable(target: Target) -> Target:
    """Return `target`; the CPU, with a warning, where `target` cannot be used here and may fall back.

    Raises:
        ProviderError: it cannot be used here; the message names the cure.
    """
    if target.provider != OPENVINO_PROVIDER or not (reason := why_no_openvino()):
        return target
    if not target.or_cpu:
        raise ProviderError(reason)
    _warn_once(f"target {target.name} falls back to the CPU provider: {reason}")
    return Target.cpu().with_options(target.options)


def _as_run(target: Target, optimization: Optimization) -> Target:
    if target.compiles and optimization is Optimization.OFF:
        return Target.cpu()
    return usable(target)


def _providers(options: ort.SessionOptions, target: Target, threads: int) -> list[Any] | None:
    """Prepare `options` for the target's provider, and return what a session names as `providers`."""
    if target.provider != OPENVINO_PROVIDER:
        return [target.provider]
    options.add_session_config_entry(_RECORD_PLACEMENT, "1")
    return add_openvino(options, target.arithmetic, threads)


@functools.cache
def _warn_once(text: str) -> None:
    logger.warning(text)


def _placed(node: Any) -> PlacedNode:
    return PlacedNode(node.name, f"{node.domain}::{node.op_type}" if node.domain else node.op_type)


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


def _serialized(
    model: ir.Model, taps: Sequence[str], options: ort.SessionOptions, *, lends: bool = True
) -> tuple[bytes, list[ort.OrtValue]] | None:
    """Return a model as bytes, and the weights that `options` lend it, which must outlive the session; None
    where it is too large for that.

    Not `lends` is for providers that compile: they look for the weights in the model.
    """
    lent = lendable(model) if lends else {}
    if weight_bytes(model) - sum(array.nbytes for array in lent.values()) >= _IN_MEMORY_BELOW:
        return None
    whole = self_contained(model)
    made = serialized(whole, _tapped(whole, taps), lent)
    values = [ort.OrtValue.ortvalue_from_numpy(array) for array in lent.values()]
    options.add_external_initializers(list(lent), values)
    return made, values


def _tapped(model: ir.Model, taps: Sequence[str]) -> list[ir.Value]:
    """Return the model's outputs, and the values named in `taps` that are none."""
    outputs = list(model.graph.outputs)
    if not taps:
        return outputs
    present = {value.name for value in outputs}
    values = {value.name: value for node in model.graph for value in node.outputs}
    values |= {value.name: value for value in model.graph.inputs}
    if missing := [tap for tap in taps if tap not in values]:
        raise SessionError(f"no value named '{missing[0]}' at the top level of the graph to tap.")
    return [*outputs, *(values[tap] for tap in dict.fromkeys(taps) if tap not in present)]


def optimized_graph(model: ir.Model | Path, target: Target) -> ir.Model:
    """Open `model` as deployed and return the graph that the runtime really executes, without its weights'
    bytes.

    Raises:
        SessionError: the runtime refuses the model, or a provider compiles it.
    """
    with tempfile.TemporaryDirectory(prefix="splitfold-optimized-") as folder:
        return ir.load(write_optimized(model, target, Path(folder)))


def write_optimized(model: ir.Model | Path, target: Target, folder: Path) -> Path:
    """Open `model` as deployed, let the runtime write the graph that it really executes into `folder`, with
    its weights beside it, and return its path.

    Raises:
        SessionError: the runtime refuses the model, or a provider compiles it.
    """
    if target.compiles:
        raise SessionError(f"target {target.name} compiles the graph, so that its kernels cannot be listed.")
    options = _options(target.options, target.options.threads, Optimization.ALL)
    written = _keep_optimized(options, folder)
    made = _serialized(model, (), options) if isinstance(model, ir.Model) else None
    source = model if isinstance(model, Path) else folder / "source.onnx"
    if made is None and isinstance(model, ir.Model):
        write_model(model.clone(), folder, source.name)
    disabled = list(target.options.disabled_optimizers) or None
    try:
        ort.InferenceSession(
            str(source) if made is None else made[0],
            options,
            providers=[target.provider],
            disabled_optimizers=disabled,
        )
    except Exception as error:
        raise _refused(error) from error
    return written


def _refused(error: Exception) -> SessionError:
    return SessionError(f"ONNX Runtime {ort.__version__} cannot open the model: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:600] if str(error).strip() else type(error).__name__
