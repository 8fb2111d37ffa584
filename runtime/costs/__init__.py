# SPDX-License-Identifier: Apache-2.0
"""What the kernels of a target take: measured, kept in a file, interpolated between shapes."""

from __future__ import annotations

from splitfold.runtime.costs.kernel import Form, Kernel, Operation
from splitfold.runtime.costs.table import Estimate, KernelCosts, Sample

__all__ = ["Estimate", "Form", "Kernel", "KernelCosts", "Operation", "Sample"]
