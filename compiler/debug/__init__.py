# SPDX-License-Identifier: Apache-2.0
"""Pass-level debugging: see, measure, blame, reproduce, explain."""
