# SPDX-License-Identifier: Apache-2.0
"""The pages of the passes: documentation, golden tests and numerical tests at once."""
