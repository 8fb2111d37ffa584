# SPDX-License-Identifier: Apache-2.0
"""A small vision transformer for 8x8 handwritten digits, with its data and its training script."""
