# SPDX-License-Identifier: Apache-2.0
"""Signals: what tells which layers keep more bits."""
