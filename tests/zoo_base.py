# SPDX-License-Identifier: Apache-2.0
"""What the entries of the model zoo are made of: the entry, its wrapper, its weights."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

Inputs = dict[str, Tensor]
Built = tuple[nn.Module, Inputs]
Draw = Callable[[int], Inputs]
DynamicShapes = dict[str, dict[int, Any]]

BATCH = 3


@dataclass(frozen=True)
class Architecture:
    """One small seeded model: `build` gives it in eval mode with example keyword inputs.

    `draw(seed)` gives more inputs of the same shapes, for calibration; `build` gives `draw(0)`.
    `dynamic_shapes` goes to `torch.export.export`; None means that every axis is static.
    """

    name: str
    family: str
    build: Callable[[], Built]
    draw: Draw
    dynamic_shapes: DynamicShapes | None = field(hash=False)


@dataclass(frozen=True)
class Recipe:
    """How to make a transformers model: its class, its configuration, the output to return.

    `part` is the path of the submodule to take, and `gains` goes to `imitate_training`.
    """

    model: str
    config: str
    settings: Mapping[str, Any]
    output: str = "last_hidden_state"
    part: str = ""
    gains: Mapping[str, float] = field(default_factory=dict)


class MainOutput(nn.Module):
    """Call `model` with the inputs given and return one tensor of its output.

    The inputs are named, rather than `**inputs`, as the exporter names those of its graph after them.
    """

    def __init__(self, model: nn.Module, output: str, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.output = output
        self.options = dict(options)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        input_values: Tensor | None = None,
        input_features: Tensor | None = None,
    ) -> Tensor:
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "decoder_input_ids": decoder_input_ids,
            "pixel_values": pixel_values,
            "input_values": input_values,
            "input_features": input_features,
        }
        given = {name: value for name, value in inputs.items() if value is not None}
        result: Tensor = getattr(self.model(**given, **self.options), self.output)
        return result


def architecture(
    name: str, family: str, recipe: Recipe, draw: Draw, dynamic_shapes: DynamicShapes | None
) -> Architecture:
    """The entry for a recipe: transformers is imported when it is built, not before."""
    return Architecture(name, family, lambda: _build(name, recipe, draw), draw, dynamic_shapes)


def _build(name: str, recipe: Recipe, draw: Draw) -> Built:
    samples = [draw(seed) for seed in range(1001, 1009)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(crc32(name.encode()))
        module = _instantiate(recipe).eval().requires_grad_(False)
        imitate_training(module, {key: torch.cat([s[key] for s in samples]) for key in samples[0]}, recipe.gains)
    return module, draw(0)


def _instantiate(recipe: Recipe) -> MainOutput:
    transformers = importlib.import_module("transformers")
    config = getattr(transformers, recipe.config)(**recipe.settings)
    model = getattr(transformers, recipe.model)(config).get_submodule(recipe.part)
    options = {"use_cache": False} if "use_cache" in recipe.settings and not recipe.part else {}
    return MainOutput(model, recipe.output, options)


def imitate_training(module: nn.Module, samples: Inputs, gains: Mapping[str, float]) -> None:
    """Replace fresh weights by ones that carry signals as trained weights do.

    Fresh weights hide quantization errors: with a spread of 0.02 attention is uniform, layer scales
    of 1e-6 switch whole blocks off, and norms and biases are constant. So, from torch's generator:

    * a linear or convolution weight gets a spread of 1/sqrt(fan_in), so that it keeps the scale of
      what it is applied to, with output channels of unequal size; its bias gets a spread of 0.1;
    * a norm's gain and bias are spread by 0.2 around what they were;
    * an embedding gets a spread of 1 after its own scaling (positions and token types 0.2), unless
      a linear layer shares its table; fixed tables, such as sinusoidal positions, stay;
    * other parameters (tokens, position biases, layer scales) get values of ordinary size;
    * a linear weight whose path contains a key of `gains` is multiplied by that gain, as for the
      queries of attention that does not divide its logits by sqrt(head size);
    * a batch norm's running statistics are those of `samples`.
    """
    shared = {id(child.weight) for child in module.modules() if _is_linear(child)}
    for path, child in module.named_modules():
        if _is_linear(child):
            _renew_linear(child, math.prod(gain for key, gain in gains.items() if key in path))
        elif "Norm" in type(child).__name__:
            _renew_norm(child)
        elif isinstance(child, nn.Embedding):
            _renew_embedding(path, child, shared)
        elif not isinstance(child, ParametrizationList):
            _renew_others(child)
    with torch.no_grad():
        _settle_batch_norms(module, samples)
