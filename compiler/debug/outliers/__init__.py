# SPDX-License-Identifier: Apache-2.0
"""Outliers of a model's activations: where they are, how large, and what its attention does with them."""
