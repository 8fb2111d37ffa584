# SPDX-License-Identifier: Apache-2.0
"""Progress bars, benchmarks and comparison over batches."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from rich.console import Console
from small import mlp, npz, samples

from splitfold.compiler import compile
from splitfold.compiler.progress import Progress
from splitfold.runtime import bench as bench_module
from splitfold.runtime.bench import bench
from splitfold.runtime.compare import deviation
from splitfold.runtime.errors import CalibrationError, SessionError
from splitfold.runtime.session import Session
from splitfold.runtime.side_by_side import compare_sessions


def _compiled(console: Console, source: object) -> None:
    with Progress(console) as progress:
        compile(
            mlp(), pipeline="quantize-activations", calibration=progress.watch(source), observers=[progress]
        )


@pytest.mark.parametrize(
    "source", [[{"x": samples(4)}] * 3, [samples(4)] * 3, lambda: iter([(samples(4),)] * 3)]
)
def test_bars_on_a_terminal(source: object) -> None:
    drawn = io.StringIO()
    _compiled(Console(file=drawn, force_terminal=True, width=100), source)
    text = drawn.getvalue()
    assert "quantize-activations" in text
    assert "calibration batches" in text
    assert "\x1b[?25h" in text.split("\x1b[?25l")[-1]  # the cursor is back


def test_silence_where_there_is_none(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    drawn = io.StringIO()
    _compiled(Console(file=drawn, force_terminal=False), npz(tmp_path / "data.npz", x=samples(20)))
    assert drawn.getvalue() == ""
    assert capfd.readouterr() == ("", "")


def test_without_a_with_block_the_bars_go_after_the_last_pass() -> None:
    drawn = io.StringIO()
    progress = Progress(Console(file=drawn, force_terminal=True, width=100))
    compile(mlp(), pipeline="canonicalize", observers=[progress])
    assert drawn.getvalue().count("\x1b[?25l") == drawn.getvalue().count("\x1b[?25h") == 1


def test_watching_changes_neither_data_nor_digest(tmp_path: Path) -> None:
    data = npz(tmp_path / "data.npz", x=samples(20))
    console = Console(file=io.StringIO())
    plain = compile(mlp(), pipeline="quantize-activations", calibration=data)
    with Progress(console) as progress:
        watched = compile(
            mlp(), pipeline="quantize-activations", calibration=progress.watch(data), observers=[progress]
        )
    assert len(progress._bars.tasks) == 1  # the bars of finished walks are gone
    assert watched.manifest == plain.manifest


def test_watching_a_one_shot_iterator_is_refused_as_ever() -> None:
    with Progress(Console(file=io.StringIO())) as progress, pytest.raises(CalibrationError, match="one-shot"):
        compile(mlp(), pipeline="quantize-activations", calibration=progress.watch(iter([{"x": samples(4)}])))


def test_passes_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="splitfold"):
        compile(mlp(), pipeline="quantize-weights")
    assert any(record.message.startswith("quantize-weights: 2 applied") for record in caplog.records)


# --- bench ---


class _Slow:
    """A session whose runs take as many clock ticks as its model says."""

    order: list[str] = []  # noqa: RUF012
    now = 0.0

    def __init__(self, model: str, *_: object, **__: object) -> None:
        self.model = model

    def run(self, _: object) -> None:
        _Slow.order.append(self.model)
        _Slow.now += len(self.model) / 1000


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> type[_Slow]:
    _Slow.order = []
    monkeypatch.setattr(bench_module, "Session", _Slow)
    monkeypatch.setattr(bench_module.time, "perf_counter", lambda: _Slow.now)
    return _Slow


def test_medians_and_ratios(slow: type[_Slow]) -> None:
    first, second = bench(["aaaa", "bb"], {}, runs=12, warm_up=2)
    assert first.median_ms == pytest.approx(4)
    assert second.median_ms == pytest.approx(2)
    assert (first.ratio, second.ratio) == (pytest.approx(1), pytest.approx(2))
    assert (first.runs, second.runs) == (12, 12)


def test_models_take_turns(slow: type[_Slow]) -> None:
    bench(["aaaa", "bb"], {}, runs=10, warm_up=2)
    text = "".join(name[0] for name in slow.order)
    assert text == "aabb" + "a" * 6 + "b" * 12 + "a" * 6  # warm-up, then turns of 1 + 5 whose order rotates


def test_bench_of_real_models() -> None:
    timings = bench([ir.from_proto(mlp()), ir.from_proto(mlp(seed=2))], {"x": samples(2)}, runs=3, threads=1)
    assert all(0 < t.low_ms <= t.median_ms <= t.high_ms for t in timings)
    with pytest.raises(SessionError):
        bench([ir.from_proto(mlp())], {"z": samples(2)})
    with pytest.raises(ValueError, match="runs is 0"):
        bench([ir.from_proto(mlp())], {"x": samples(2)}, runs=0)


# --- side by side ---


def test_sums_over_batches_equal_the_whole() -> None:
    first, second = Session(ir.from_proto(mlp())), Session(ir.from_proto(mlp(seed=1)))
    batches = [{"x": samples(count, seed=count)} for count in (3, 5, 8)]
    found, count = compare_sessions(first, second, iter(batches))
    whole = {"x": np.concatenate([feeds["x"] for feeds in batches])}
    expected = deviation([first.run(whole)["y"]], [second.run(whole)["y"]])
    assert count == 3
    assert found["y"].cosine == pytest.approx(expected.cosine, rel=1e-5)
    assert found["y"].sqnr_db == pytest.approx(expected.sqnr_db, rel=1e-4)
    assert found["y"].max_abs == pytest.approx(expected.max_abs, rel=1e-4)
    assert found["y"].top1 == pytest.approx(expected.top1)


def test_a_nan_is_never_lost() -> None:
    found = deviation([np.ones(3, np.float32)], [np.array([1, np.nan, 1], np.float32)])
    assert np.isnan(found.max_abs)
    assert np.isnan(found.cosine)


def test_other_outputs_are_refused() -> None:
    model = ir.from_proto(mlp())
    more = ir.from_proto(mlp())
    more.graph.outputs.append(
        next(value for node in more.graph for value in node.outputs if value.name == "r")
    )
    with pytest.raises(SessionError, match="the models have 1 and 2 outputs: y / y, r"):
        compare_sessions(Session(model), Session(more), [])
