# SPDX-License-Identifier: Apache-2.0
"""The accuracy-aware mode: a signal proposes plans of precisions, the user's metric disposes."""
