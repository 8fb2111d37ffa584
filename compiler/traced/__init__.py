# SPDX-License-Identifier: Apache-2.0
"""Torch modules as graphs that passes rewrite and that train on: needs torch."""
