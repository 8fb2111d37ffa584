# SPDX-License-Identifier: Apache-2.0
"""Training an ONNX model: plain gradient descent's numbers, repeatable, and nothing else moves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")

from seeded import parse_graph  # noqa: E402

from splitfold.compiler import compile, presets  # noqa: E402
from splitfold.compiler.finetuning import Trained, finetune  # noqa: E402
from splitfold.compiler.tolerance import Tolerance  # noqa: E402
from splitfold.passes.errors import SpecError  # noqa: E402
from splitfold.passes.provenance import mark_new  # noqa: E402
from splitfold.runtime.feeds import Array  # noqa: E402
from splitfold.runtime.session import Session  # noqa: E402
from splitfold.runtime.training import (  # noqa: E402
    Annealing,
    InLoop,
    Schedule,
    Step,
    TrainingError,
    WeightScale,
)

TEXT = """<ir_version: 10, opset_import: ["" : 20]>
net (float[b,6] x) => (float[b,3] y)
<float[6,8] W = seeded, float[8] c = seeded, float[8,3] V = seeded>
{
  [up] h = MatMul(x, W)
  [bias] a = Add(h, c)
  [act] r = Relu(a)
  [down] y = MatMul(r, V)
}
"""


def model() -> ir.Model:
    return ir.from_proto(parse_graph(TEXT))


def weights(of: ir.Model) -> dict[str, Array]:
    return {name: value.const_value.numpy() for name, value in of.graph.initializers.items()}  # type: ignore[union-attr]


def data(count: int = 7, seed: int = 0) -> list[dict[str, Array]]:
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((6, 3))
    made = []
    for _ in range(count):
        x = rng.standard_normal((16, 6)).astype(np.float32)
        made.append({"x": x, "target": np.tanh(x @ matrix).astype(np.float32)})
    return made


def loss(outputs: Mapping[str, object], batch: Mapping[str, object]) -> object:
    return (outputs["y"] - batch["target"]).square().mean()  # type: ignore[operator]


def sgd(parameters: object) -> object:
    return torch.optim.SGD(parameters, lr=0.1)


def mean_loss(of: ir.Model) -> float:
    session = Session(of)
    errors = [np.square(session.run({"x": it["x"]})["y"] - it["target"]).mean() for it in data()]
    return float(np.mean(errors))


def test_steps_are_those_of_gradient_descent() -> None:
    """Three steps of W -= rate dL/dW, gradients by hand."""
    batch = data(1)[0]
    x, target = batch["x"].astype(np.float64), batch["target"].astype(np.float64)
    start = weights(model())
    w, c, v = (start[name].astype(np.float64) for name in ("W", "c", "V"))
    for step in range(3):
        share = Schedule(warmup=0, floor=1)(step, 3)
        a = x @ w + c
        r = np.maximum(a, 0)
        upstream = 2 * (r @ v - target) / target.size
        inner = (upstream @ v.T) * (a > 0)
        moved = 0.1 * share
        w, c, v = w - moved * x.T @ inner, c - moved * inner.sum(0), v - moved * r.T @ upstream
    found = weights(
        finetune(model(), [batch], loss, 3, optimizer=sgd, schedule=Schedule(warmup=0, floor=1), clip_norm=0)
    )
    for name, expected in (("W", w), ("c", c), ("V", v)):
        np.testing.assert_allclose(found[name], expected, atol=1e-6)


def test_the_schedule_by_hand() -> None:
    rates = [Schedule(warmup=0.25, floor=0.1)(step, 8) for step in range(8)]
    cosine = [0.1 + 0.9 * (0.5 + 0.5 * np.cos(np.pi * done / 6)) for done in range(6)]
    np.testing.assert_allclose(rates, [1 / 3, 2 / 3, *cosine])


def test_the_original_is_left_alone_and_the_loss_falls() -> None:
    given = model()
    before = weights(given)
    steps: list[Step] = []
    made = finetune(given, data(), loss, 60, rate=1e-2, observer=steps.append)
    assert all(np.array_equal(before[name], array) for name, array in weights(given).items())
    assert [step.number for step in steps] == list(range(1, 61))
    assert mean_loss(made) < 0.5 * mean_loss(given)
    assert [node.op_type for node in made.graph] == [node.op_type for node in given.graph]


@pytest.mark.parametrize("in_loop", [None, InLoop(4, 8)])
def test_a_run_that_was_stopped_ends_with_the_same_numbers(tmp_path: Path, in_loop: InLoop | None) -> None:
    def stop(step: Step) -> None:
        if step.number == 13:
            raise KeyboardInterrupt

    file = tmp_path / "runs" / "run.pt"
    options = {"rate": 1e-2, "checkpoint_every": 5, "in_loop": in_loop}
    whole = weights(finetune(model(), data(), loss, 20, **options))  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        finetune(model(), data(), loss, 20, checkpoint=file, observer=stop, **options)  # type: ignore[arg-type]
    taken: list[Step] = []
    again = finetune(model(), data(), loss, 20, checkpoint=file, observer=taken.append, **options)  # type: ignore[arg-type]
    assert taken[0].number == 11
    assert all(np.array_equal(whole[name], array) for name, array in weights(again).items())
    assert [it.name for it in file.parent.iterdir()] == ["run.pt"]


def test_a_seed_gives_the_same_weights_and_another_one_others() -> None:
    first, same, other = (
        weights(finetune(model(), data(), loss, 5, rate=1e-2, seed=seed)) for seed in (0, 0, 1)
    )
    assert np.array_equal(first["W"], same["W"])
    assert not np.array_equal(first["W"], other["W"])


def test_a_function_gives_the_batches_in_its_order() -> None:
    order = []

    def batches() -> Iterator[dict[str, Array]]:
        for number, batch in enumerate(data(3)):
            order.append(number)
            yield batch

    finetune(model(), batches, loss, 7)
    assert order == [0, 1, 2, 0, 1, 2, 0]


# What is trained


def test_only_the_layers_asked_for_move() -> None:
    before, after = weights(model()), weights(finetune(model(), data(), loss, 3, only=["dow*"], rate=0.1))
    assert np.array_equal(before["W"], after["W"])
    assert np.array_equal(before["c"], after["c"])
    assert not np.array_equal(before["V"], after["V"])


def test_only_what_a_pass_added_moves() -> None:
    given = model()
    mark_new(given.graph.node(1).outputs[0])
    before, after = weights(given), weights(finetune(given, data(), loss, 3, train=Trained.ADDED, rate=0.1))
    assert [name for name in before if not np.array_equal(before[name], after[name])] == ["c"]


# Quantization in the loop


def test_annealing_moves_only_what_is_near_a_threshold() -> None:
    """With annealing over all steps and a low barrier, weights in the middle of their step stay, bit for
    bit."""
    before = weights(model())["W"]
    in_loop = InLoop(4, None, annealing=Annealing(1, barrier=0.2))
    after = weights(finetune(model(), data(), loss, 1, optimizer=sgd, in_loop=in_loop, clip_norm=0))["W"]
    steps = before / (np.abs(before).max(0) / 7)
    near = np.abs(np.abs(steps - np.floor(steps)) - 0.5) <= 0.2
    assert 0.2 < near.mean() < 0.6
    assert np.array_equal(before[~near], after[~near])
    assert (before[near] != after[near]).mean() > 0.5


def test_the_loss_in_the_loop_is_that_of_the_quantized_model() -> None:
    """Weights on a symmetric 4-bit grid a column, and what the layers read on the 8-bit grid of the batch."""
    batch, steps = data(1)[0], list[Step]()
    finetune(model(), [batch], loss, 1, in_loop=InLoop(4, 8), observer=steps.append)
    held = weights(model())

    def rounded(w: Array) -> Array:
        step = np.abs(w).max(0) / 7
        return np.round(w / step) * step

    def read(x: Array) -> Array:
        low, high = min(0.0, x.min()), max(0.0, x.max())
        step = (high - low) / 255
        zero = np.round(-low / step)
        return (np.clip(np.round(x / step) + zero, 0, 255) - zero) * step

    r = np.maximum(read(batch["x"]) @ rounded(held["W"]) + held["c"], 0)
    expected = np.square(read(r) @ rounded(held["V"]) - batch["target"]).mean()
    assert steps[0].loss == pytest.approx(expected, rel=1e-4)


def test_weights_of_a_statistics_grid_are_kept_by_the_pipeline() -> None:
    """3 bits of StatsQ are the odd multiples -7 to 7 of a step, which a symmetric 4-bit grid holds."""
    in_loop = InLoop(3, None, scale=WeightScale.STATISTICS)
    trained = finetune(model(), data(), loss, 30, rate=1e-2, in_loop=in_loop)
    array = weights(trained)["W"]
    step = 2 * np.abs(array).max(0) / 7 / 2
    codes = array / step
    np.testing.assert_allclose(codes, np.round(codes), atol=1e-4)
    assert set(np.round(codes).astype(int).reshape(-1)) <= {-7, -5, -3, -1, 1, 3, 5, 7}


def test_the_result_goes_on_through_the_pipeline() -> None:
    made = finetune(model(), data(), loss, 5, in_loop=InLoop())
    calibration = [{"x": batch["x"]} for batch in data()]
    artifact = compile(
        made, pipeline=presets.int8(), calibration=calibration, tolerance=Tolerance(cosine=0.9)
    )
    assert artifact.model.graph


# Bad input


def test_bad_input_is_told() -> None:
    def check(message: str, run_data: object = None, run_loss: object = loss, **options: object) -> None:
        with pytest.raises((TrainingError, SpecError, ValueError), match=message):
            finetune(model(), data() if run_data is None else run_data, run_loss, 3, **options)  # type: ignore[arg-type]

    check(r"no layer matches 'dwn'\. Did you mean 'down'", only=["dwn"])
    check("the loss is nan", run_loss=lambda outputs, batch: outputs["y"].mean() * float("nan"))
    check("the loss is a scalar tensor", run_loss=lambda outputs, batch: outputs["y"])
    check("the loss is a scalar tensor, but the function gave float", run_loss=lambda outputs, batch: 1.0)
    check("does not depend on anything", run_loss=lambda outputs, batch: batch["x"].mean())
    check("lacks the input 'x'", run_data=[{"z": np.zeros(3, np.float32)}])
    wrong = [*data(), {**data()[0], "x": np.zeros((2, 3), np.float32)}]
    told = rf"batch {len(wrong)}: 'x' has shape \[2, 3\], the model expects"
    check(told, run_data=wrong)
    check(r"batch 1: 'x' has shape", run_data=lambda: iter(wrong[-1:]))
    check("gives no batch", run_data=[])
    used = iter(data(2))
    check("a second time", run_data=lambda: used)
    check("not generator", run_data=(batch for batch in data()))
    check("batch 1 of epoch 0 is ndarray", run_data=[np.zeros(3)])
    check("no weight is to be trained", train=Trained.ADDED)
    check("at least 1", checkpoint_every=0)


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.pt"
    finetune(model(), data(), loss, 2, checkpoint=file)
    with pytest.raises(TrainingError, match="of another model or of other settings"):
        finetune(model(), data(), loss, 3, checkpoint=file)
    file.write_text("no checkpoint")
    with pytest.raises(TrainingError, match="is no checkpoint"):
        finetune(model(), data(), loss, 2, checkpoint=file)


@pytest.mark.parametrize(
    "make",
    [
        lambda: InLoop(9, 8),
        lambda: InLoop(None, None),
        lambda: InLoop(None, 8, annealing=Annealing(3)),
        lambda: Annealing(0),
        lambda: Annealing(1, 0.7),
        lambda: Schedule(warmup=1),
    ],
)
def test_settings_that_do_not_fit(make: object) -> None:
    with pytest.raises(ValueError, match=r"may be|there is nothing|at least"):
        make()  # type: ignore[operator]
