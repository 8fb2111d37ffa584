# SPDX-License-Identifier: Apache-2.0
"""Whether a result is slower than the model that it was made from, and what then."""

from __future__ import annotations

from splitfold.compiler.speed.options import IfSlower, SpeedCheck
from splitfold.compiler.speed.outcome import Speed

__all__ = ["IfSlower", "Speed", "SpeedCheck"]
