# SPDX-License-Identifier: Apache-2.0
"""Layer-wise relevance propagation on lifted models: rules, targets, and the walk that applies them.

Nothing here imports torch by itself: a lifted model brings it along.
"""
