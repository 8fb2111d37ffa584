# SPDX-License-Identifier: Apache-2.0
"""Which layer a failure comes from."""
