# SPDX-License-Identifier: Apache-2.0
"""Scales from magnitudes alone: SmoothQuant's, and DGQ's percentile clipping.

SmoothQuant (Xiao et al., 2023, equation 4): s_j = max|x_j|^alpha / max|W_j|^(1 - alpha), j running over the
input channels. DGQ (Zhang et al., 2023, section 3.3): only the channels above a percentile are brought down
to it.
"""

from __future__ import annotations

import numpy as np

from splitfold.runtime.feeds import Array

__all__ = ["clipping_scales", "smoothing_scales"]

_FLOOR = 1e-5


def smoothing_scales(activation_peaks: Array, weight_peaks: Array, alpha: float) -> Array:
    """Return s of SmoothQuant's equation 4, float32 [channels], normalised to geometric mean 1.

    Args:
        activation_peaks: largest magnitude of each input channel.
        weight_peaks: largest magnitude of each row of W.
        alpha: migration strength.
    """
    dead = (activation_peaks < _FLOOR) | (weight_peaks < _FLOOR)
    x, w = np.maximum(activation_peaks, _FLOOR), np.maximum(weight_peaks, _FLOOR)
    logs = np.where(dead, 0.0, alpha * np.log(x) - (1 - alpha) * np.log(w))
    alive = ~dead
    logs = np.where(alive, logs - (logs[alive].mean() if alive.any() else 0.0), 0.0)
    return np.exp(logs).astype(np.float32)


def clipping_scales(activation_peaks: Array, share: float) -> Array:
    """Return s = a / t for the channels whose peak a exceeds t, the k-th largest peak, else 1: float32
    [channels].

    k = int(share x channels + 1.5), as in the released code of DGQ: the loudest `share` of the channels are
    brought down to t. At least one channel defines t, and a dead t changes nothing.
    """
    peaks = np.asarray(activation_peaks, np.float64)
    k = min(int(share * peaks.size + 1.5), peaks.size)
    threshold = np.sort(peaks)[::-1][k - 1] if peaks.size else 0.0
    if threshold < _FLOOR:
        return np.ones(peaks.shape, np.float32)
    return np.maximum(peaks / threshold, 1.0).astype(np.float32)
