# SPDX-License-Identifier: Apache-2.0
"""Fourier transforms and windows; complex numbers are a last axis of two."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from splitfold.runtime.lift.carried import integers
from splitfold.runtime.lift.dtypes import torch_dtype
from splitfold.runtime.lift.row import Extra, Row, Rows, since

__all__ = ["ROWS"]


def dft(x: Tensor, length: Any = None, axis: Any = None, *, inverse: int = 0, onesided: int = 0) -> Tensor:
    """DFT, opset 20."""
    at = integers(axis)[0] if axis is not None else -2
    return _dft(x, length, at % x.ndim, inverse, onesided)


def dft_by_attribute(
    x: Tensor, length: Any = None, *, axis: int = 1, inverse: int = 0, onesided: int = 0
) -> Tensor:
    """DFT, opset 17."""
    return _dft(x, length, axis % x.ndim, inverse, onesided)


def _dft(x: Tensor, length: Any, axis: int, inverse: int, onesided: int) -> Tensor:
    count = None if length is None else integers(length)[0]
    if inverse and onesided:  # real numbers from the first half of their spectrum
        real: Tensor = torch.fft.irfft(torch.view_as_complex(x.contiguous()), count, axis)
        return real.unsqueeze(-1)
    values = x.squeeze(-1) if x.shape[-1] == 1 else torch.view_as_complex(x.contiguous())
    if inverse:
        return torch.view_as_real(torch.fft.ifft(values, count, axis))
    found = torch.fft.fft(values, count, axis)
    if onesided:
        found = found.narrow(axis, 0, found.shape[axis] // 2 + 1)
    return torch.view_as_real(found)


def stft(
    signal: Tensor, step: Any, window: Tensor | None = None, length: Any = None, *, onesided: int = 1
) -> Tensor:
    """STFT: [batch, frames, bins, 2]."""
    size = integers(length)[0] if length is not None else len(window if window is not None else signal)
    values = signal.squeeze(-1) if signal.shape[-1] == 1 else torch.view_as_complex(signal.contiguous())
    frames = values.unfold(1, size, integers(step)[0])
    found = torch.fft.fft(frames if window is None else frames * window, dim=-1)
    return torch.view_as_real(found[..., : size // 2 + 1] if onesided else found)


def hann_window(size: Any, *, output_datatype: int = 1, periodic: int = 1, anchor: Tensor) -> Tensor:
    """HannWindow."""
    return _window(size, (0.5, 0.5), output_datatype, periodic, anchor)


def hamming_window(size: Any, *, output_datatype: int = 1, periodic: int = 1, anchor: Tensor) -> Tensor:
    """HammingWindow."""
    return _window(size, (25 / 46, 21 / 46), output_datatype, periodic, anchor)


def blackman_window(size: Any, *, output_datatype: int = 1, periodic: int = 1, anchor: Tensor) -> Tensor:
    """BlackmanWindow."""
    return _window(size, (0.42, 0.5, 0.08), output_datatype, periodic, anchor)


def _window(size: Any, weights: tuple[float, ...], kind: int, periodic: int, anchor: Tensor) -> Tensor:
    """Return a sum of cosines with alternating signs."""
    count = integers(size)[0]
    turn = 2 * math.pi * np.arange(count) / (count if periodic else count - 1)
    values = sum((-1) ** k * weight * np.cos(k * turn) for k, weight in enumerate(weights))
    return torch.from_numpy(np.asarray(values)).to(anchor.device, torch_dtype(kind))


_MADE = (Extra.ANCHOR,)

ROWS: Rows = {
    "BlackmanWindow": Row(blackman_window, host=(0,), extras=_MADE),
    "DFT": since(20, Row(dft, host=(1, 2)), Row(dft_by_attribute, host=(1,))),
    "HammingWindow": Row(hamming_window, host=(0,), extras=_MADE),
    "HannWindow": Row(hann_window, host=(0,), extras=_MADE),
    "STFT": Row(stft, host=(1, 3)),
}
