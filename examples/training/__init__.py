# SPDX-License-Identifier: Apache-2.0
"""Seeded training scripts of the models that benchmarks measure and that nobody ships."""
