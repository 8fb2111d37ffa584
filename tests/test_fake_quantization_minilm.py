# SPDX-License-Identifier: Apache-2.0
"""Quantizers in a lifted model beside ONNX Runtime's integers, on a real encoder."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from real_minilm import minilm, sentences  # noqa: E402

from splitfold.compiler import compile, presets  # noqa: E402
from splitfold.runtime.feeds import Array  # noqa: E402
from splitfold.runtime.lift import Lifted, lift  # noqa: E402
from splitfold.runtime.session import Session  # noqa: E402


class Beside(torch.fx.Interpreter):  # type: ignore[misc]
    """Runs a lifted model with the runtime's codes put in the place of its own, and keeps the difference."""

    def __init__(self, lifted: Lifted, codes: dict[str, Array]) -> None:
        super().__init__(lifted.module)
        self.codes = {lifted.values[name]: (name, array) for name, array in codes.items()}
        self.apart: dict[str, Array] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        if n.name not in self.codes:
            return result
        name, codes = self.codes[n.name]
        self.apart[name] = np.abs(result.detach().numpy() - codes.astype(np.float32))
        return torch.tensor(codes).to(result.dtype)


@pytest.mark.slow
def test_every_layer_of_int8_has_the_runtimes_codes() -> None:
    """Each layer reads the same codes in both; float sums of another order flip a code at an edge, no more.

    Left to themselves such flips add up from layer to layer, in any two implementations.
    """
    model, data = minilm(), sentences()
    artifact = compile(model, pipeline=presets.int8(), calibration=data)
    quantizers = [node for node in artifact.model.graph if node.op_type == "QuantizeLinear"]
    names = [node.outputs[0].name or "" for node in quantizers]
    assert len(names) >= 20  # six blocks of four: what query, key and value read, and three more layers
    feeds = data[0]
    found = Session(artifact.model, taps=names).run(feeds, names)
    beside = Beside(lift(artifact.model), {name: found[name] for name in names})
    beside.run(*(torch.tensor(feeds[name]) for name in (value.name for value in model.graph.inputs)))
    assert set(beside.apart) == set(names)
    for name, apart in beside.apart.items():
        assert apart.max() <= 1, name
        assert (apart > 0).mean() < 1e-3, name
