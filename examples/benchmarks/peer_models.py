# SPDX-License-Identifier: Apache-2.0
"""Models whose shapes everybody knows, with random weights: their speed is that of trained ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from splitfold.compiler.capture import capture_torch
from splitfold.examples.benchmarks.data import Feeds

__all__ = ["bert_base", "mobile_net", "resnet18", "settled", "tiny", "vit_small", "written"]

_MOBILE = ((16, 1, 1), (24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))
"""Inverted residuals of MobileNet-v2: channels, how many, stride of the first."""
_EXPANSION = 6


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    padding = size // 2
    convolution = nn.Conv2d(inputs, outputs, size, stride, padding, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs)]


class Residual(nn.Module):
    """A basic block of ResNet-18."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        first, second = _convolution(inputs, outputs, 3, stride), _convolution(outputs, outputs, 3)
        self.body = nn.Sequential(*first, nn.ReLU(), *second)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(*_convolution(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        """[n, inputs, h, w] -> [n, outputs, h / stride, w / stride]."""
        return torch.relu(self.body(x) + self.shortcut(x))


class Inverted(nn.Module):
    """An inverted residual of MobileNet-v2."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        widen = [*_convolution(inputs, hidden, 1), nn.ReLU6()] if expansion > 1 else []
        depthwise = [*_convolution(hidden, hidden, 3, stride, hidden), nn.ReLU6()]
        self.body = nn.Sequential(*widen, *depthwise, *_convolution(hidden, outputs, 1))
        self.same = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        """[n, inputs, h, w] -> [n, outputs, h / stride, w / stride]."""
        y: Tensor = self.body(x)
        return x + y if self.same else y


def resnet18() -> nn.Module:
    """ResNet-18: image [n, 3, 224, 224] -> logits [n, 1000]."""
    stem = [*_convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    widths = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
    blocks = [part for a, b, stride in widths for part in (Residual(a, b, stride), Residual(b, b, 1))]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


def mobile_net() -> nn.Module:
    """MobileNet-v2: image [n, 3, 224, 224] -> logits [n, 1000]."""
    parts: list[nn.Module] = [*_convolution(3, 32, 3, 2), nn.ReLU6()]
    inputs = 32
    for outputs, count, stride in _MOBILE:
        for at in range(count):
            parts.append(Inverted(inputs, outputs, 1 if at else stride, 1 if inputs == 32 else _EXPANSION))
            inputs = outputs
    parts += [*_convolution(inputs, 1280, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*parts, nn.Linear(1280, 1000))


def tiny() -> nn.Module:
    """Layers so small that int8 costs more than it saves: x [n, 16] -> [n, 8]."""
    return nn.Sequential(
        *(part for _ in range(6) for part in (nn.Linear(16, 16), nn.ReLU())), nn.Linear(16, 8)
    )


def vit_small() -> nn.Module:
    """ViT-S/16: pixel_values [n, 3, 224, 224] -> the states [n, 197, 384]."""
    shape = ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536)
    module: nn.Module = ViTModel(shape, add_pooling_layer=False)
    return module


def bert_base() -> nn.Module:
    """BERT-base: input_ids and attention_mask [n, t] -> the states [n, t, 768]."""
    module: nn.Module = BertModel(BertConfig(), add_pooling_layer=False)
    return module


def settled(module: nn.Module, images: Tensor) -> nn.Module:
    """Give batch norms the statistics of images, so that random weights neither vanish nor explode."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None
    with torch.no_grad():
        module.train()(images)
    return module.eval()


def written(module: nn.Module, example: Feeds, fixed: Mapping[str, tuple[int, ...]], path: Path) -> Path:
    """Write the float model as splitfold captures it, with dynamic axes but those that are `fixed`."""
    tensors = {name: torch.from_numpy(array) for name, array in example.items()}
    axes = {
        name: {at: torch.export.Dim.DYNAMIC for at in range(array.ndim) if at not in fixed.get(name, ())}
        for name, array in example.items()
    }
    ir.save(capture_torch(module.eval(), tensors, axes).model, path)
    return path
