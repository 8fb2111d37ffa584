# SPDX-License-Identifier: Apache-2.0
"""Analysis: Gram matrices X^T X of layers' inputs over calibration data, streamed.

With G = X^T X the squared output error of a weight error e is e^T G e, summed over all tokens: no activations
need be kept. A Gram matrix takes K^2 numbers, so only some are held at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from splitfold.passes.activation_stream import ActivationStream
from splitfold.runtime.calibration import Calibration
from splitfold.runtime.feeds import Array
from splitfold.runtime.model_file import weight_bytes
from splitfold.runtime.target import Target

__all__ = ["Gram", "GramRequest", "gram_chunks", "gram_limit", "grams_in_chunks", "stream_grams"]

logger = logging.getLogger(__name__)

_SHARE = 4
"""The Gram matrices held at once take at most this part of the model, or one of them."""
_AT_LEAST = 64 * 2**20


@dataclass(frozen=True)
class GramRequest:
    """What to gather of one layer input.

    Attributes:
        value: name of a float value at the top level of the graph, or of a graph input; its last axis is K.
        columns: K.
        block: None for the whole [K, K] matrix, else only its diagonal blocks [blocks, block, block], the
            last one padded with zeros.
    """

    value: str
    columns: int
    block: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that its sums take."""
        return 8 * (self.columns**2 if self.block is None else -(-self.columns // self.block) * self.block**2)


@dataclass(frozen=True, eq=False)
class Gram:
    """X^T X, float64, summed over the rows (tokens) of all batches.

    Attributes:
        total: [K, K], or the diagonal blocks [blocks, block, block].
        rows: how many rows were summed, of padded batches all.
        finite: whether X, and the sums, held neither NaN nor infinity.
    """

    total: Array
    rows: int
    finite: bool


def gram_limit(model: ir.Model) -> int:
    """Return how many bytes of Gram matrices may be held at once beside `model`."""
    return max(_AT_LEAST, weight_bytes(model) // _SHARE)


def gram_chunks(needs: Sequence[Collection[GramRequest]], limit: int) -> list[list[int]]:
    """Return the positions of `needs` in chunks: the distinct requests of a chunk take at most `limit` bytes,
    or belong to one need."""
    chunks: list[list[int]] = []
    held: set[GramRequest] = set()
    for position, requests in enumerate(needs):
        joined = held | set(requests)
        fits = joined == held or sum(request.nbytes for request in joined) <= limit
        if chunks and fits:
            chunks[-1].append(position)
            held = joined
        else:
            chunks.append([position])
            held = set(requests)
    return chunks


@dataclass
class _Running:
    request: GramRequest
    total: Array | None = None
    rows: int = 0
    finite: bool = True

    def add(self, array: Array) -> None:
        rows = np.asarray(array, np.float32).reshape(-1, self.request.columns)
        self.rows += len(rows)
        if not self.finite or not len(rows):
            return
        with np.errstate(over="ignore", invalid="ignore"):
            product = _product(rows, self.request)
        if not np.isfinite(product).all():
            self.finite, self.total = False, None
        elif self.total is None:
            self.total = product.astype(np.float64)
        else:
            self.total += product

    def gram(self) -> Gram:
        if self.total is None:
            self.total = np.zeros(_shape(self.request))
        return Gram(self.total, self.rows, self.finite)


def _shape(request: GramRequest) -> tuple[int, ...]:
    if request.block is None:
        return (request.columns, request.columns)
    return (-(-request.columns // request.block), request.block, request.block)


def _product(rows: Array, request: GramRequest) -> Array:
    if request.block is None:
        return np.asarray(rows.T @ rows)
    blocks, block, _ = _shape(request)
    padded = np.zeros((len(rows), blocks * block), np.float32)
    padded[:, : request.columns] = rows
    parts = padded.reshape(len(rows), blocks, block).transpose(1, 0, 2)
    return np.asarray(parts.transpose(0, 2, 1) @ parts)


def stream_grams(stream: ActivationStream, requests: Collection[GramRequest]) -> dict[GramRequest, Gram]:
    """Return the Gram matrices of some values over all calibration data.

    Raises:
        CalibrationError: a batch does not fit, or the data is empty.
        SessionError: the part of the model that leads there cannot be run.
    """
    running: dict[str, list[_Running]] = {}
    for request in dict.fromkeys(requests):
        running.setdefault(request.value, []).append(_Running(request))

    def use(name: str, array: Array) -> None:
        for item in running[name]:
            item.add(array)

    stream.visit(list(running), use)
    logger.info("%d Gram matrices", len(requests))
    return {item.request: item.gram() for items in running.values() for item in items}


def grams_in_chunks(
    model: ir.Model, needs: Sequence[Collection[GramRequest]], calibration: Calibration, target: Target
) -> Iterator[tuple[list[int], Mapping[GramRequest, Gram]]]:
    """Yield (positions of `needs`, their Gram matrices), as many at a time as may be held.

    Args:
        model: float model; it is not changed, and must not be before the last chunk.
        needs: sets of requests that are wanted at one time, in order of execution.
        calibration: walked once, or once a chunk (see `ActivationStream`).
        target: where the model runs.

    Raises:
        CalibrationError, SessionError: see `stream_grams`.
    """
    stream = ActivationStream(model, calibration, target)
    for chunk in gram_chunks(needs, gram_limit(model)):
        wanted = dict.fromkeys(request for position in chunk for request in needs[position])
        yield chunk, stream_grams(stream, list(wanted))
