# SPDX-License-Identifier: Apache-2.0
"""Example models that come with splitfold."""
