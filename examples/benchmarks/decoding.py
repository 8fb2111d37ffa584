# SPDX-License-Identifier: Apache-2.0
"""A random Llama with a cache: one token after a past, and a prompt, beside onnxruntime's own tools.

    python -m splitfold.examples.benchmarks.decoding [--size 100m] [--past 128] [--prompt 128] [--rounds 15]
        [--few] [--keep folder] [--genai folder]

All models take turns on the same inputs, in bare onnxruntime; ratios are taken turn by turn, their median
stands in the table. onnxruntime-genai's builder runs in an environment that pip makes in the folder named;
without one it is left out. The size 1b needs 30 GB of disk and 16 GB of memory.
"""

from __future__ import annotations

import contextlib
import resource
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from splitfold.compiler.decoder import capture_decoder
from splitfold.examples.benchmarks.decoding_models import (
    BUNDLE,
    DEFAULT,
    FLOAT,
    PRESET,
    SIZES,
    WORDS,
    Files,
    Size,
    made,
)
from splitfold.examples.benchmarks.genai_builder import GENAI, Genai
from splitfold.examples.benchmarks.report import Report, arguments, kernels, open_bare, say, sqnr
from splitfold.examples.benchmarks.weight_peers import PeerError
from splitfold.runtime.feeds import Array
from splitfold.runtime.generation import Generator
from splitfold.runtime.model_file import write_model
from splitfold.runtime.race import Race, race_of

FASTER = 3.0
RUNS = 5
"""Tokens in a turn."""
TEXT = 64
"""Tokens that the generators write."""


def written(size: Size, genai: Genai | None, folder: Path, *, large: bool) -> tuple[Path, dict[str, Files]]:
    """The captured model, and the files of all tools."""
    captured, files = folder / "captured.onnx", {}
    if genai is not None and not (folder / "genai").is_dir():
        try:
            genai.build(size.build(), folder)
        except PeerError as error:
            say(f"{GENAI}: {error}")
    if (folder / "genai").is_dir():
        files[GENAI] = Files.of(folder / "genai" / "model.onnx")
    if not captured.is_file():
        write_model(capture_decoder(size.build()), folder, captured.name)
    return captured, dict(made(captured, folder, large=large)) | files


def feeds(session: Any, size: Size, past: int, new: int) -> dict[str, Array]:
    """Random tokens after a random past, the same for every model."""
    rng = np.random.default_rng(0)
    given = {
        "input_ids": rng.integers(3, WORDS, (1, new)),
        "attention_mask": np.ones((1, past + new), np.int64),
    }
    caches = [value.name for value in session.get_inputs() if value.name not in given]
    shape = (1, size.key_heads, past, size.head)
    order = sorted(caches, key=lambda name: (int(name.split(".")[1]), name))
    return given | {name: rng.standard_normal(shape).astype(np.float32) for name in order}


def timed(
    sessions: Mapping[str, Any], given: Mapping[str, dict[str, Array]], rounds: int, runs: int
) -> dict[str, Race]:
    """The first session against each; in each round each takes a turn of `runs` runs, in an order drawn by a
    seed, after one that is not timed where there are several: a second token finds weights and threads where
    the first left them."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    order, turns = list(sessions), np.random.default_rng(0)
    for turn in range(-1, rounds):
        turns.shuffle(order)
        for name in order:
            if runs > 1:
                sessions[name].run(None, given[name])
            found = [_milliseconds(sessions[name], given[name]) for _ in range(runs)]
            if turn >= 0:
                times[name].append(statistics.median(found))
    first = times[next(iter(times))]
    return {name: race_of(first, found) for name, found in times.items()}


def _milliseconds(session: Any, given: dict[str, Array]) -> float:
    begin = time.perf_counter()
    session.run(None, given)
    return (time.perf_counter() - begin) * 1e3


def regime(
    files: Mapping[str, Path], size: Size, past: int, new: int, rounds: int
) -> tuple[dict[str, Race], dict[str, Array]]:
    """The times of one regime, and what each model's logits of the last token are."""
    sessions = {name: open_bare(path) for name, path in files.items()}
    given = {name: feeds(session, size, past, new) for name, session in sessions.items()}
    found = timed(sessions, given, rounds, RUNS if new == 1 else 1)
    logits = {name: session.run(["logits"], given[name])[0][:, -1] for name, session in sessions.items()}
    return found, logits


def reference(captured: Path, size: Size, new: int) -> Array:
    """The logits of the last token of the prompt, in float."""
    session = open_bare(captured)
    return np.asarray(session.run(["logits"], feeds(session, size, 0, new))[0][:, -1])


def generators(report: Report, genai: Genai | None, files: Mapping[str, Files], prompt: int) -> None:
    """Whole texts by genai's own generator and by ours."""
    if genai is not None and GENAI in files:
        found = genai.generate(files[GENAI], prompt, TEXT)
        report.note(
            "genai's own generator", f"prompt {found['prompt']:.1f} ms, token {found['token']:.2f} ms"
        )
    ours = Generator.open(files[BUNDLE].step.parent)
    for _ in range(2):
        text = ours.generate([3 + number % 1000 for number in range(prompt)], limit=TEXT + 1)
    each = text.decode.seconds / max(text.decode.tokens, 1) * 1e3
    report.note(
        "our Generator, two graphs", f"prompt {text.prefill.seconds * 1e3:.1f} ms, token {each:.2f} ms"
    )


def main() -> int:
    """Print the table."""
    options = arguments(
        __doc__,
        ("--size", {"choices": list(SIZES), "default": "100m"}),
        ("--past", {"type": int, "default": 128}),
        ("--prompt", {"type": int, "default": 128}),
        ("--rounds", {"type": int, "default": 15}),
        ("--few", {"action": "store_true", "help": "fewer pipelines of ours, as always with 1b"}),
        ("--keep", {"type": Path, "help": "where files are written, and used again in another run"}),
        ("--genai", {"type": Path, "help": "where genai's environment is made, or was"}),
    )
    report = Report(
        f"Llama of {options.size}: one token after {options.past}, and a prompt of {options.prompt}"
    )
    size = SIZES[options.size]
    genai = _genai(options.genai, report)
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        captured, files = written(size, genai, folder, large=options.few or options.size == "1b")
        say("timed from here on")
        exact = reference(captured, size, options.prompt)
        steps, prompts = (
            {key: getattr(it, what) for key, it in files.items()} for what in ("step", "prompt")
        )
        decode, _ = regime(steps, size, options.past, 1, options.rounds)
        prefill, logits = regime(prompts, size, 0, options.prompt, options.rounds)
        for key, it in files.items():
            noise = "exact" if key == FLOAT else f"{sqnr([exact], [logits[key]]):.1f} dB"
            report.note(key, f"{it.megabytes:.1f} MB, {kernels(it.prompt)}; logits {noise}")
            report.note("  one token", _told(decode[key], 1))
            report.note("  prompt", _told(prefill[key], options.prompt))
        generators(report, genai, files, options.prompt)
        report.check(f"{PRESET}: one token, over {DEFAULT}", decode[PRESET].ratio, FASTER, form=".2f")
        report.check(f"{BUNDLE}: prompt, over {DEFAULT}", prefill[BUNDLE].ratio, 1.0, form=".2f")
    report.note("peak memory", f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
    return int(report.finish() > 0)


def _genai(folder: Path | None, report: Report) -> Genai | None:
    if folder is None:
        return None
    try:
        return Genai.installed(folder)
    except PeerError as error:
        report.note(GENAI, str(error)[:200])
        return None


def _told(found: Race, tokens: int) -> str:
    rate, spread = tokens / found.after_ms * 1e3, f"{found.low:.2f} to {found.high:.2f}"
    return f"{found.after_ms:.2f} ms, {rate:.1f} tokens/s, {found.ratio:.2f}x ({spread})"


if __name__ == "__main__":
    raise SystemExit(main())
