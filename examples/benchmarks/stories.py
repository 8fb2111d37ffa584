# SPDX-License-Identifier: Apache-2.0
"""stories260K, a small Llama, on the openings of 60 TinyStories: perplexity with weights of 8 and fewer bits.

Run `python examples/benchmarks/stories.py`.
"""

from __future__ import annotations

import math
import struct
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from splitfold.compiler import Pipeline, compile, presets
from splitfold.examples.benchmarks import data
from splitfold.examples.benchmarks.data import Feeds
from splitfold.examples.benchmarks.report import (
    Report,
    arguments,
    explain,
    interleaved,
    kernels,
    low_bit,
    megabytes,
    open_bare,
    say,
)

STORIES = 60
TOKENS = 200
BOS = 1
BYTES_FROM = 3
RISE = 0.5
PIPELINES = {
    "8-bit weights": "quantize-weights{bits=8,block=32},quantize-embeddings{min-bytes=0}",
    "int8-dynamic": str(presets.int8_dynamic()),
    "int4": str(presets.int4()),
}


@dataclass(frozen=True)
class Tokenizer:
    """Pieces with their scores, as llama2.c keeps them: adjacent pieces are merged, best score first."""

    pieces: tuple[bytes, ...]
    scores: tuple[float, ...]

    @staticmethod
    def read(path: Path) -> Tokenizer:
        """Read int32 longest piece; then for each piece a float32 score, an int32 length and its bytes."""
        raw, at = path.read_bytes(), 4
        pieces, scores = [], []
        while at < len(raw):
            score, length = struct.unpack_from("<fi", raw, at)
            at += 8
            pieces.append(raw[at : at + length])
            scores.append(score)
            at += length
        return Tokenizer(tuple(pieces), tuple(scores))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` after the start token, with the leading space that sentencepiece adds."""
        index = {piece: token for token, piece in reversed(list(enumerate(self.pieces)))}
        tokens: list[int] = []
        for character in f" {text}":
            piece = character.encode()
            tokens += [index[piece]] if piece in index else [byte + BYTES_FROM for byte in piece]
        while True:
            pairs = [
                (index.get(self.pieces[a] + self.pieces[b]), at) for at, (a, b) in enumerate(pairwise(tokens))
            ]
            known = [(self.scores[token], -at, token) for token, at in pairs if token is not None]
            if not known:
                return [BOS, *tokens]
            _, at, token = max(known)
            tokens[-at : -at + 2] = [token]


def log_loss(session: Any, ids: npt.NDArray[np.int64]) -> tuple[float, int]:
    """Summed negative log likelihood of all tokens after the first, and their number."""
    logits = np.asarray(session.run(None, {"ids": ids[None]})[0], np.float64)[0, :-1]
    shifted = logits - logits.max(-1, keepdims=True)
    chosen = shifted[np.arange(len(shifted)), ids[1:]] - np.log(np.exp(shifted).sum(-1))
    return -float(chosen.sum()), len(chosen)


def perplexity(session: Any, openings: list[npt.NDArray[np.int64]]) -> float:
    """Perplexity over all tokens of all openings."""
    found = [log_loss(session, ids) for ids in openings]
    return math.exp(sum(loss for loss, _ in found) / sum(count for _, count in found))


def main() -> int:
    """Print the table."""
    arguments(__doc__)
    model = data.model("stories260K.onnx")
    tokenizer = Tokenizer.read(data.model("stories260K_tok512.bin"))
    openings = [np.array(tokenizer.encode(story)[:TOKENS], np.int64) for story in data.stories(STORIES)]
    report = Report(f"stories260K, {STORIES} openings of up to {TOKENS} tokens")
    base = perplexity(open_bare(model), openings)
    report.note("fp32: perplexity, file", f"{base:.4f}, {megabytes(model):.2f} MB")
    feed: Feeds = {"ids": openings[0][None]}
    with tempfile.TemporaryDirectory() as folder:
        files = {"fp32": model}
        for name, text in PIPELINES.items():
            artifact = compile(model, feed, pipeline=Pipeline.parse(text))
            say(f"{name}: {text}")
            explain(artifact)
            path = artifact.save(Path(folder) / name) / "model.onnx"
            files[name] = path
            found = perplexity(open_bare(path), openings)
            rise = 100 * (found / base - 1)
            if name == "8-bit weights":
                report.check(f"{name}: perplexity rise, %", rise, RISE, most=True, form=".3f")
            else:
                report.note(f"{name}: perplexity rise, %", f"{rise:.3f}")
            layers = f"{low_bit(artifact)} layers low-bit; {kernels(path)}"
            report.note(
                f"  {name}: perplexity, file, kernels", f"{found:.4f}, {megabytes(path):.2f} MB, {layers}"
            )
        sessions = {name: open_bare(path) for name, path in files.items()}
        for length in (1, TOKENS):
            runs = {
                name: lambda s=session, n=length: s.run(None, {"ids": feed["ids"][:, :n]})
                for name, session in sessions.items()
            }
            for name, timing in interleaved(runs, 30).items():
                report.note(f"{name}, {length} tokens", str(timing))
    return int(report.finish() > 0)


if __name__ == "__main__":
    raise SystemExit(main())
