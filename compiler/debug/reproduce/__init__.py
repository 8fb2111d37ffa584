# SPDX-License-Identifier: Apache-2.0
"""Failures as small folders that show them."""
