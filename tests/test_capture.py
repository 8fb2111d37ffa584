# SPDX-License-Identifier: Apache-2.0
"""Capture of PyTorch: forms of model and of example inputs, dynamic axes, names, what cannot be traced."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="capture needs the extra 'torch'")

from splitfold.compiler import Artifact, compile  # noqa: E402
from splitfold.compiler.errors import CaptureError  # noqa: E402
from splitfold.passes.identity import layers_of  # noqa: E402


class Tower(torch.nn.Module):
    """Two named linear layers; a keyword input; the sequence axis is free."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(6, 8)
        self.block = torch.nn.ModuleDict({"second": torch.nn.Linear(8, 4)})

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        hidden = torch.relu(self.first(x))
        if mask is not None:
            hidden = hidden * mask
        return self.block["second"](hidden)


@pytest.fixture
def tower() -> torch.nn.Module:
    torch.manual_seed(0)
    return Tower().eval()


X = torch.linspace(-1, 1, 2 * 3 * 6).reshape(2, 3, 6)
MASK = (torch.arange(2 * 3).reshape(2, 3, 1) % 2).float()


def _outputs(artifact: Artifact, **feeds: torch.Tensor) -> np.ndarray:
    (output,) = artifact.session().run({name: value.numpy() for name, value in feeds.items()}).values()
    return output


@pytest.mark.parametrize(
    "inputs",
    [(X, MASK), [X, MASK], {"x": X, "mask": MASK}, ((X,), {"mask": MASK}), (X, {"mask": MASK})],
    ids=["tuple", "list", "dict", "tuple and dict", "trailing dict"],
)
def test_forms_of_example_inputs(tower: torch.nn.Module, inputs: object) -> None:
    artifact = compile(tower, inputs, pipeline="canonicalize")
    np.testing.assert_allclose(
        _outputs(artifact, x=X, mask=MASK), tower(X, MASK).detach().numpy(), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    "form",
    [
        lambda module: module,
        lambda module: torch.fx.symbolic_trace(module, concrete_args={"mask": None}),
        lambda module: torch.export.export(module, (X,)),
    ],
    ids=["nn.Module", "fx.GraphModule", "ExportedProgram"],
)
def test_forms_of_model(tower: torch.nn.Module, form: Callable[[torch.nn.Module], object]) -> None:
    artifact = compile(form(tower), (X,), pipeline="canonicalize")
    (name,) = artifact.session().inputs
    np.testing.assert_allclose(
        _outputs(artifact, **{name: X}), tower(X).detach().numpy(), rtol=1e-5, atol=1e-6
    )


def test_an_exported_program_brings_its_own_inputs(tower: torch.nn.Module) -> None:
    artifact = compile(torch.export.export(tower, (X,)), pipeline="canonicalize")
    np.testing.assert_allclose(_outputs(artifact, x=X), tower(X).detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "pipeline", ["canonicalize", "quantize-dynamic", "quantize-weights{block=16}", "quantize-activations"]
)
def test_dynamic_axes_stay_dynamic(tower: torch.nn.Module, pipeline: str) -> None:
    dynamic = torch.export.Dim.DYNAMIC
    seen = np.random.default_rng(0).uniform(-1, 1, (64, 3, 6)).astype(np.float32)
    artifact = compile(
        tower,
        (X,),
        pipeline=pipeline,
        dynamic_shapes={"x": {0: dynamic, 1: dynamic}},
        calibration=[{"x": seen}],
    )
    for batch, length in ((1, 1), (5, 2), (2, 7)):
        x = torch.linspace(-1, 1, batch * length * 6).reshape(batch, length, 6)
        expected = tower(x).detach().numpy()
        actual = _outputs(artifact, x=x)
        assert actual.shape == expected.shape
        assert np.linalg.norm(actual - expected) < 0.2 * np.linalg.norm(expected)


def test_layers_have_the_users_module_paths(tower: torch.nn.Module) -> None:
    artifact = compile(tower, (X,), pipeline="quantize-dynamic")
    (record,) = [record for record in artifact.records if record.text == "quantize-dynamic"]
    assert [layer for layer, _ in record.applied] == ["first", "block.second"]
    assert all(layers_of(node) for node in artifact.model.graph)


def test_the_exported_file_holds_no_source_text(tower: torch.nn.Module) -> None:
    artifact = compile(tower, (X,), pipeline="canonicalize")
    keys = {key for node in artifact.model.graph for key in node.metadata_props}
    assert keys == {"pkg.torch.onnx.name_scopes", "splitfold.layers"}


class Inner(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


def test_an_untraceable_module_is_named() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Sequential(torch.nn.ReLU(), Inner())).eval()
    with pytest.raises(CaptureError, match=r"cannot trace module '1\.1'.*data-dependent"):
        compile(model, (X,), pipeline="canonicalize")


def test_training_mode_and_missing_inputs_are_refused(tower: torch.nn.Module) -> None:
    with pytest.raises(CaptureError, match="example_inputs"):
        compile(tower, pipeline="canonicalize")
    with pytest.raises(CaptureError, match=r"training mode: call \.eval\(\)"):
        compile(tower.train(), (X,), pipeline="canonicalize")
    with pytest.raises(CaptureError, match=r"cannot trace module 'first'"):
        compile(tower.eval(), (torch.zeros(2, 5),), pipeline="canonicalize")
