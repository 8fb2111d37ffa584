# SPDX-License-Identifier: Apache-2.0
"""Where a model's time goes, by user layer."""

from __future__ import annotations

from splitfold.compiler.debug.profile.times import Profile, ProfileRow, profile

__all__ = ["Profile", "ProfileRow", "profile"]
