# SPDX-License-Identifier: Apache-2.0
"""Options of a session that a model was measured with: they travel in its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from splitfold.runtime.errors import ArtifactError

__all__ = ["ACCURACY_LEVEL", "TAKING_TURNS", "SessionOptions"]

ACCURACY_LEVEL = "session.qdq_matmulnbits_accuracy_level"
"""Entry that says at which level MatMulNBits made of blocked DequantizeLinear compute: 4 is int8."""

_KINDS = {"threads": int, "spinning": bool, "arena": bool, "disabled_optimizers": list, "entries": dict}


@dataclass(frozen=True)
class SessionOptions:
    """What a session is opened with beyond the runtime's defaults; with none a bare session does the same.

    Args:
        threads: intra-operator threads; 0 is the runtime's choice.
        spinning: idle threads wait in a loop. It shortens a run, and takes the cores from others.
        arena: memory is kept between runs.
        disabled_optimizers: names of the runtime's graph optimizers that are left out.
        entries: (key, value) of further configuration entries, such as `ACCURACY_LEVEL`.
    """

    threads: int = 0
    spinning: bool = True
    arena: bool = True
    disabled_optimizers: tuple[str, ...] = ()
    entries: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise ValueError(f"threads is {self.threads}; 0 is the runtime's choice.")

    def __bool__(self) -> bool:
        """Whether anything differs from the runtime's defaults."""
        return self != SessionOptions()

    def joined(self, other: SessionOptions) -> SessionOptions:
        """Return these options and what `other` asks for; where both ask, these count."""
        optimizers = dict.fromkeys((*self.disabled_optimizers, *other.disabled_optimizers))
        return SessionOptions(
            self.threads or other.threads,
            self.spinning and other.spinning,
            self.arena and other.arena,
            tuple(optimizers),
            tuple({**dict(other.entries), **dict(self.entries)}.items()),
        )

    def config_entries(self) -> dict[str, str]:
        """Return all configuration entries of the runtime's session options."""
        spinning = {} if self.spinning else {"session.intra_op.allow_spinning": "0"}
        return {**spinning, **dict(self.entries)}

    def values(self) -> dict[str, Any]:
        """Return what differs from the runtime's defaults, as plain JSON values."""
        plain = SessionOptions()
        found = {item.name: getattr(self, item.name) for item in fields(self)}
        changed = {name: value for name, value in found.items() if value != getattr(plain, name)}
        if "entries" in changed:
            changed["entries"] = dict(self.entries)
        if "disabled_optimizers" in changed:
            changed["disabled_optimizers"] = list(self.disabled_optimizers)
        return changed

    @staticmethod
    def of(values: object) -> SessionOptions:
        """Return the options that `values` of a manifest hold.

        Raises:
            ArtifactError: they hold something else.
        """
        if not isinstance(values, Mapping):
            raise ArtifactError(f"the manifest's session options are {values!r}, not a table.")
        for name, value in values.items():
            if name not in _KINDS or type(value) is not _KINDS[name]:
                raise ArtifactError(f"the manifest's session option {name} = {value!r} is not known here.")
        entries = {str(key): str(value) for key, value in dict(values.get("entries", {})).items()}
        return SessionOptions(
            int(values.get("threads", 0)),
            bool(values.get("spinning", True)),
            bool(values.get("arena", True)),
            tuple(map(str, values.get("disabled_optimizers", ()))),
            tuple(entries.items()),
        )

    def code(self, path: str = "model.onnx") -> str:
        """Return Python text that opens a bare session of the runtime with these options."""
        any_set = self.threads or self.config_entries() or not self.arena
        lines = ["options = onnxruntime.SessionOptions()"] if any_set else []
        lines += [f"options.intra_op_num_threads = {self.threads}"] if self.threads else []
        lines += ["options.enable_cpu_mem_arena = False"] if not self.arena else []
        lines += [f"options.add_session_config_entry({k!r}, {v!r})" for k, v in self.config_entries().items()]
        given = [repr(path)] + (["options"] if lines else [])
        if self.disabled_optimizers:
            given.append(f"disabled_optimizers={list(self.disabled_optimizers)!r}")
        return "\n".join([*lines, f"session = onnxruntime.InferenceSession({', '.join(given)})"])


TAKING_TURNS = SessionOptions(entries=(("session.force_spinning_stop", "1"),))
"""For sessions that are timed in turns: threads wait in a loop while a run lasts, and no longer: those of one
session would take the cores from the next."""
