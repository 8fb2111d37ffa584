# SPDX-License-Identifier: Apache-2.0
"""ONNX models as `torch.fx` modules: gradients, training and relevance on any model, written back afterwards.

The only part of the runtime that needs torch; `splitfold.runtime` does not import it.
"""

from __future__ import annotations

try:
    import torch as _torch
except ImportError as error:
    raise ImportError("lifting a model needs torch: pip install 'splitfold[torch]'") from error

from splitfold.runtime.lift.lifted import ORIGIN, VALUE, Lifted, Origin
from splitfold.runtime.lift.lifting import lift
from splitfold.runtime.lift.lowering import lower_weights

__all__ = ["ORIGIN", "VALUE", "Lifted", "Origin", "lift", "lower_weights"]

del _torch
