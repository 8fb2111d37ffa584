# SPDX-License-Identifier: Apache-2.0
"""onnxruntime's own quantizers, called as well as they can be called; each returns the written file."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from splitfold.examples.benchmarks.data import Feeds


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Hands out feeds one by one."""

    def __init__(self, feeds: Sequence[Feeds]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> Feeds | None:
        """The next feeds, or None."""
        return next(self._feeds, None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def ort_dynamic(model: Path, result: Path) -> Path:
    """`quantize_dynamic`, int8 weights per channel."""
    with _quiet():
        quantize_dynamic(str(model), str(result), weight_type=QuantType.QInt8, per_channel=True)
    return result


def ort_static(
    model: Path, result: Path, feeds: Sequence[Feeds], operators: Sequence[str] | None = None
) -> Path:
    """`quantize_static` after `quant_pre_process`: QDQ, uint8 activations, int8 weights per channel, min-max.

    `operators` are the types to quantize; None is their default, all that they know.
    """
    prepared = result.with_suffix(".prepared.onnx")
    with _quiet():
        quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(result),
            Reader(feeds),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            calibrate_method=CalibrationMethod.MinMax,
            op_types_to_quantize=list(operators) if operators else None,
        )
    prepared.unlink()
    return result


def ort_static_default(model: Path, result: Path, feeds: Sequence[Feeds]) -> Path:
    """`quantize_static` as it comes: no option, no `quant_pre_process`."""
    with _quiet():
        quantize_static(str(model), str(result), Reader(feeds))
    return result
