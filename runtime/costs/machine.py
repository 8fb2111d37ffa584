# SPDX-License-Identifier: Apache-2.0
"""Where times were taken: they say little of another processor, runtime or number of threads."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, fields
from pathlib import Path

from splitfold.runtime.session import runtime_version

__all__ = ["Machine", "processor_name"]

_CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Machine:
    """What times depend on.

    Attributes:
        processor: its name as the system gives it.
        cores: logical cores that this process may use.
        threads: intra-operator threads of the sessions; 0 is the runtime's choice.
        runtime: version of ONNX Runtime.
    """

    processor: str
    cores: int
    threads: int
    runtime: str

    @staticmethod
    def here(threads: int = 0) -> Machine:
        """Return this machine."""
        affinity = getattr(os, "sched_getaffinity", None)
        cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
        return Machine(processor_name(), cores, threads, runtime_version())

    def differences(self, other: Machine) -> tuple[str, ...]:
        """Return what is otherwise in `other`, such as ``runtime 1.31.1, here 1.32.0``."""
        return tuple(
            f"{field.name} {getattr(self, field.name)}, here {getattr(other, field.name)}"
            for field in fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        )


def processor_name() -> str:
    """Return the name of the processor with its family and model where the system tells."""
    try:
        text = _CPU_INFO.read_text(encoding="utf-8")
    except OSError:
        text = ""
    facts: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    name = facts.get("model name") or platform.processor() or platform.machine() or "unknown processor"
    numbers = [
        f"{word} {facts[key]}" for key, word in (("cpu family", "family"), ("model", "model")) if key in facts
    ]
    return f"{name} ({', '.join(numbers)})" if numbers else name
