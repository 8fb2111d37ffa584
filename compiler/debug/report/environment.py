# SPDX-License-Identifier: Apache-2.0
"""Where a report was made: packages, processor, runtime."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from splitfold.compiler.manifest import installed_version
from splitfold.runtime.target import Target

__all__ = ["digest_rows", "environment_rows"]

_CPU_INFO = Path("/proc/cpuinfo")


def environment_rows(manifest: Mapping[str, Any], target: Target) -> tuple[tuple[str, str], ...]:
    """Return (what, value): the machine of the report, and the versions that the model was compiled with."""
    versions = dict(manifest.get("versions", {}))
    return (
        ("processor", f"{_processor()}, {os.cpu_count()} logical cores"),
        ("system", f"{platform.system()} {platform.release()}, {platform.machine()}"),
        ("Python", platform.python_version()),
        ("target", f"{target.name} ({target.provider})"),
        ("opset", str(manifest.get("opset", "unknown"))),
        *((name, _version(name, str(version))) for name, version in sorted(versions.items())),
    )


def _version(package: str, recorded: str) -> str:
    now = installed_version(package)
    return recorded if now == recorded else f"{recorded} when compiled, {now} for this report"


def _processor() -> str:
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown processor"


def digest_rows(manifest: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return (what, SHA-256) of everything that the manifest names by content."""
    files = dict(manifest.get("files", {}))
    named = (
        ("original model", manifest.get("source")),
        ("calibration data", manifest.get("calibration")),
        ("example inputs", manifest.get("feeds")),
        *files.items(),
    )
    return tuple((name, str(digest)) for name, digest in named if digest)
