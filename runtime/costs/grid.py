# SPDX-License-Identifier: Apache-2.0
"""The shapes that are measured where no model is given: those of common encoders, decoders and small
convolutional networks, far enough apart to interpolate between."""

from __future__ import annotations

from collections.abc import Iterator

from splitfold.runtime.costs.kernel import Case, Operation, Shape, work
from splitfold.runtime.costs.models import FORMS

__all__ = ["common_cases"]

_ROWS = (1, 16, 128, 1024)
_WEIGHTS = ((64, 64), (384, 384), (384, 1536), (1536, 384), (768, 3072), (3072, 768), (2048, 2048))
_MOST_WORK = 7e8
"""Multiply-adds beyond which a case takes too long to be worth it: larger ones follow from the work."""
_SHAPES: dict[Operation, tuple[Shape, ...]] = {
    Operation.MATMUL: tuple((rows, *weight) for weight in _WEIGHTS for rows in _ROWS),
    Operation.CONV: (
        (1, 3, 32, 112, 112, 3, 2, 1),
        (1, 16, 16, 32, 32, 3, 1, 1),
        (1, 32, 64, 32, 32, 3, 2, 1),
        (1, 64, 64, 56, 56, 3, 1, 1),
        (1, 256, 256, 14, 14, 3, 1, 1),
        (8, 64, 64, 16, 16, 3, 1, 1),
        (1, 32, 192, 28, 28, 1, 1, 1),
        (1, 192, 32, 28, 28, 1, 1, 1),
        (1, 128, 256, 14, 14, 1, 1, 1),
        (1, 96, 96, 56, 56, 3, 2, 96),
        (1, 192, 192, 28, 28, 3, 1, 192),
        (1, 384, 384, 14, 14, 5, 1, 384),
    ),
    Operation.SOFTMAX: ((64, 64), (384, 32), (1536, 128), (12288, 128), (1536, 512)),
    Operation.NORM: ((1, 384), (32, 384), (128, 768), (1024, 384), (1024, 2048)),
    Operation.GELU: ((1, 1536), (32, 1536), (128, 3072), (1024, 1536)),
    Operation.ATTENTION: ((1, 12, 32, 32), (1, 12, 128, 32), (8, 12, 128, 32), (1, 12, 384, 64)),
    Operation.QUANTIZE: ((4096,), (65536,), (1048576,)),
    Operation.DEQUANTIZE: ((4096,), (65536,), (1048576,)),
    Operation.CAST: ((4096,), (65536,), (1048576,)),
}


def common_cases() -> Iterator[Case]:
    """Yield every kernel at every common shape of its operation."""
    for operation, shapes in _SHAPES.items():
        for shape in shapes:
            if work(operation, shape) <= _MOST_WORK:
                for kernel in FORMS[operation]:
                    yield Case(kernel, shape)
