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

    `part` is the path of the submodule to take; `gains` and `lift` are for `imitate_training`.
    """

    model: str
    config: str
    settings: Mapping[str, Any]
    output: str = "last_hidden_state"
    part: str = ""
    gains: Mapping[str, float] = field(default_factory=dict)
    lift: float = 0.0


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
    """No parameter asks for gradients: `torch.onnx.export` fails where an attention bias does (T5, Swin)."""
    draws = [draw(seed) for seed in range(1001, 1009)]
    samples = {key: torch.cat([inputs[key] for inputs in draws]) for key in draws[0]}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(crc32(name.encode()))
        module = _instantiate(recipe).eval()
        imitate_training(module, samples, recipe.gains, recipe.lift)
    return module.requires_grad_(False), draw(0)


def _instantiate(recipe: Recipe) -> MainOutput:
    transformers = importlib.import_module("transformers")
    config = getattr(transformers, recipe.config)(**recipe.settings)
    model = getattr(transformers, recipe.model)(config).get_submodule(recipe.part)
    options = {"use_cache": False} if "use_cache" in recipe.settings and not recipe.part else {}
    return MainOutput(model, recipe.output, options)


def imitate_training(module: nn.Module, samples: Inputs, gains: Mapping[str, float], lift: float) -> None:
    """Replace fresh weights by ones that carry signals as trained weights do.

    Fresh weights hide quantization errors: with a spread of 0.02 attention is uniform, layer scales
    of 1e-6 switch whole blocks off, and norms and biases are constant. So, from torch's generator:

    * a linear or convolution weight gets a spread of 1/sqrt(fan_in), so that it keeps the scale of
      what it is applied to, with output channels of unequal size; its bias gets a spread of 0.1;
    * a norm's gain and bias are spread by 0.2 around what they were;
    * an embedding gets a spread of 1 after its own scaling (positions and token types 0.1), unless
      a linear layer shares its table; fixed tables, such as sinusoidal positions, stay;
    * other parameters (tokens, position biases, layer scales) get values of ordinary size;
    * a linear weight whose path contains a key of `gains` is multiplied by that gain, as for the
      queries of attention that does not divide its logits by sqrt(head size);
    * a batch norm's running statistics are those of `samples`, after `lift` is added to its bias: a
      deep stack of random convolutions, batch norms and ReLU is chaotic, and less so if ReLU cuts less.
    """
    shared = {id(child.weight) for child in module.modules() if _is_linear(child)}
    for path, child in module.named_modules():
        if _is_linear(child):
            _renew_linear(child, math.prod(gain for key, gain in gains.items() if key in path))
        elif "Norm" in type(child).__name__:
            _renew_norm(child)
        elif isinstance(child, nn.Embedding):
            if id(child.weight) not in shared:
                _renew_embedding(child, path)
        elif not isinstance(child, ParametrizationList):
            _renew_others(child)
    _settle_batch_norms(module, samples, lift)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) or type(module).__name__ == "Conv1D"


def _renew_linear(module: Any, gain: float) -> None:
    """Transformers' Conv1D is a linear layer that keeps its weight as (inputs, outputs)."""
    transposed = type(module).__name__ == "Conv1D"
    shape = tuple(reversed(module.weight.shape)) if transposed else module.weight.shape
    outputs = torch.exp(0.3 * torch.randn(shape[0], *[1] * (len(shape) - 1)))
    weight = torch.randn(shape) * outputs * (gain / math.sqrt(math.prod(shape[1:])))
    _set_weight(module, weight.T if transposed else weight)
    if module.bias is not None:
        module.bias.copy_(0.1 * torch.randn_like(module.bias))


def _set_weight(module: Any, weight: Tensor) -> None:
    """A weight under a parametrization (weight norm) is set by assignment, through its inverse."""
    if is_parametrized(module, "weight"):
        module.weight = weight
    else:
        module.weight.copy_(weight)


def _renew_norm(module: nn.Module) -> None:
    for value in module.parameters(recurse=False):
        value.add_(0.2 * torch.randn_like(value))


def _renew_embedding(module: nn.Embedding, path: str) -> None:
    if module.weight.requires_grad and "Sinusoidal" not in type(module).__name__:
        spread = 0.1 if any(key in path for key in ("position", "wpe", "type")) else 1.0
        scale = float(getattr(module, "embed_scale", 1.0))
        module.weight.copy_(torch.randn_like(module.weight) * (spread / scale))


def _renew_others(module: nn.Module) -> None:
    """A parameter filled with one nonzero number is a scale, the others are offsets."""
    for value in module.parameters(recurse=False):
        level, noise = float(value.sum()) / max(value.numel(), 1), torch.randn_like(value)
        if level != 0.0 and bool(torch.all(value == value.flatten()[0])):
            value.copy_(max(abs(level), 0.3) * (1.0 + 0.2 * noise))
        else:
            value.copy_((0.1 if value.dim() == 1 else 0.5) * noise)


def _settle_batch_norms(module: nn.Module, samples: Inputs, lift: float) -> None:
    norms = [child for child in module.modules() if isinstance(child, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.bias.add_(lift)
        norm.momentum = 1.0
        norm.train()
    if norms:
        module(**samples)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
