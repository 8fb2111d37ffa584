# SPDX-License-Identifier: Apache-2.0
"""Memory that was freed goes back to the system."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["release_memory"]


def release_memory() -> None:
    """Hand freed memory back where the C library keeps it for later: the GNU one does, by the gigabyte, when
    the runtime has folded large constants. Elsewhere nothing happens."""
    if not sys.platform.startswith("linux"):
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
    if trim is not None:
        trim(0)
