# SPDX-License-Identifier: Apache-2.0
"""Convolutions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from splitfold.runtime.lift.carried import integers
from splitfold.runtime.lift.row import Row, Rows
from splitfold.runtime.lift.rows.moving import pad_sides

__all__ = ["ROWS", "Ints", "conv", "same_pads"]

Ints = tuple[int, ...]

_CONV: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Any] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def same_pads(
    auto_pad: str, sizes: Sequence[int], kernel: Ints, strides: Ints, dilations: Ints, pads: Ints | None
) -> list[tuple[int, int]]:
    """Return (begin, end) of the padding of each spatial axis, as `auto_pad` or `pads` want it."""
    rank = len(kernel)
    if auto_pad in ("NOTSET", ""):
        given = pads or (0,) * (2 * rank)
        return list(zip(given[:rank], given[rank:], strict=True))
    if auto_pad == "VALID":
        return [(0, 0)] * rank
    found = []
    for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        missing = max((-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0)
        less, more = missing // 2, missing - missing // 2
        found.append((less, more) if auto_pad == "SAME_UPPER" else (more, less))
    return found


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Ints | None = None,
    group: int = 1,
    kernel_shape: Ints | None = None,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    """Conv, over one to three spatial axes."""
    kernel = tuple(weight.shape[2:])
    ones = (1,) * len(kernel)
    strides, dilations = strides or ones, dilations or ones
    sides = same_pads(auto_pad, x.shape[2:], kernel, strides, dilations, pads)
    padding: Sequence[int] = [begin for begin, _ in sides]
    if any(begin != end for begin, end in sides):
        x, padding = pad_sides(x, sides), [0] * len(kernel)
    found: Tensor = _CONV[len(kernel)](x, weight, bias, strides, padding, dilations, group)
    return found


def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Ints | None = None,
    group: int = 1,
    kernel_shape: Ints | None = None,
    output_padding: Ints | None = None,
    output_shape: Ints | None = None,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    """ConvTranspose: the full product, then cut (or filled up) to the wanted size."""
    rank = x.ndim - 2
    ones = (1,) * rank
    strides, dilations, extra = strides or ones, dilations or ones, output_padding or (0,) * rank
    full: Tensor = _TRANSPOSED[rank](x, weight, None, strides, 0, 0, group, dilations)
    if output_shape is None and auto_pad.startswith("SAME"):
        output_shape = tuple(size * stride for size, stride in zip(x.shape[2:], strides, strict=True))
    if output_shape is None:
        given = pads or (0,) * (2 * rank)
        cuts = list(zip(given[:rank], given[rank:], strict=True))
    else:
        grown = [size + more for size, more in zip(full.shape[2:], extra, strict=True)]
        surplus = [size - wanted for size, wanted in zip(grown, output_shape[-rank:], strict=True)]
        halves = [(cut // 2, cut - cut // 2) for cut in surplus]
        cuts = halves if auto_pad == "SAME_UPPER" else [(more, less) for less, more in halves]
    found = pad_sides(full, [(-begin, more - end) for (begin, end), more in zip(cuts, extra, strict=True)])
    return found if bias is None else found + bias.reshape(-1, *ones)


def col2im(
    x: Tensor,
    image_shape: Any,
    block_shape: Any,
    *,
    dilations: Ints | None = None,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    """Col2Im: sums of blocks at their places in an image; x is [batch, channels * block, places]."""
    image, block = integers(image_shape), integers(block_shape)
    rank, ones = len(image), (1,) * len(image)
    strides, dilations, given = strides or ones, dilations or ones, pads or (0,) * (2 * rank)
    padded = [size + given[i] + given[i + rank] for i, size in enumerate(image)]
    places = torch.zeros(1, 1, dtype=torch.int64, device=x.device)
    for size, k, stride, dilation in zip(padded, block, strides, dilations, strict=True):
        steps = torch.arange(0, size - (k - 1) * dilation, stride, device=x.device)
        along = torch.arange(k, device=x.device).unsqueeze(1) * dilation + steps
        places = places[:, None, :, None] * size + along[None, :, None, :]
        places = places.reshape(places.shape[0] * k, -1)
    batch, channels = x.shape[0], x.shape[1] // math.prod(block)
    spread = places.reshape(1, 1, -1).expand(batch, channels, -1)
    total = x.new_zeros(batch, channels, math.prod(padded))
    summed = total.scatter_add(2, spread, x.reshape(batch, channels, -1)).reshape(batch, channels, *padded)
    return pad_sides(summed, [(-given[i], -given[i + rank]) for i in range(rank)])


def deform_conv(
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    dilations: Ints | None = None,
    group: int = 1,
    kernel_shape: Ints | None = None,
    offset_group: int = 1,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    """DeformConv in two dimensions (arXiv:1811.11168): each tap reads the image at its own moved place."""
    (high, wide), ones = weight.shape[2:], (1, 1)
    strides, dilations, given = strides or ones, dilations or ones, pads or (0, 0, 0, 0)
    batch, channels, (rows, columns) = x.shape[0], x.shape[1], offset.shape[2:]
    moves = offset.reshape(batch, offset_group, high * wide, 2, rows, columns)
    images = x.reshape(batch * offset_group, channels // offset_group, *x.shape[2:])
    base_y = torch.arange(rows, device=x.device).unsqueeze(1) * strides[0] - given[0]
    base_x = torch.arange(columns, device=x.device) * strides[1] - given[1]
    taps = []
    for index, (i, j) in enumerate(itertools.product(range(high), range(wide))):
        place_y = (base_y + i * dilations[0] + moves[:, :, index, 0]).reshape(-1, rows, columns)
        place_x = (base_x + j * dilations[1] + moves[:, :, index, 1]).reshape(-1, rows, columns)
        read = _read(images, place_y, place_x).reshape(batch, offset_group, -1, rows, columns)
        if mask is not None:
            read = read * mask.reshape(batch, offset_group, high * wide, 1, rows, columns)[:, :, index]
        taps.append(read.reshape(batch, channels, rows * columns))
    columns_of = torch.stack(taps, 2).reshape(batch, group, -1, rows * columns)
    kernels = weight.reshape(group, weight.shape[0] // group, -1)
    found = (kernels @ columns_of).reshape(batch, -1, rows, columns)
    return found if bias is None else found + bias.reshape(-1, 1, 1)


def _read(images: Tensor, place_y: Tensor, place_x: Tensor) -> Tensor:
    """Return `images` [n, channels, height, width] read bilinearly at places [n, ...], zero outside."""
    height, width = images.shape[2:]
    flat = images.flatten(2)
    top, left = place_y.floor(), place_x.floor()
    total = torch.zeros((), dtype=images.dtype, device=images.device)
    for row, column in itertools.product((top, top + 1), (left, left + 1)):
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        share = (1 - (place_y - row).abs()) * (1 - (place_x - column).abs()) * inside
        place = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).long().flatten(1)
        read = flat.gather(2, place.unsqueeze(1).expand(-1, flat.shape[1], -1))
        total = total + read.reshape(*images.shape[:2], *row.shape[1:]) * share.unsqueeze(1)
    return total


ROWS: Rows = {
    "Col2Im": Row(col2im, host=(1, 2)),
    "Conv": Row(conv),
    "ConvTranspose": Row(conv_transpose),
    "DeformConv": Row(deform_conv),
}
