# SPDX-License-Identifier: Apache-2.0
"""The models that whole int8 models of other tools are compared on: their data, and what is held to what."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from splitfold.examples.benchmarks import data, peer_models
from splitfold.examples.benchmarks.data import Feeds, Floats
from splitfold.examples.benchmarks.minilm import Encoder, capture, embed
from splitfold.examples.benchmarks.report import open_bare, run_all, sqnr

__all__ = ["SUBJECTS", "Subject"]

SENTENCES = 128
CALIBRATION_BATCH = 16
IMAGES = 32
HELD_OUT = 64
SIDE = 224
IMAGENET = (np.array([123.675, 116.28, 103.53], np.float32), np.array([58.395, 57.12, 57.375], np.float32))
LENGTHS = ((1, 32), (1, 128), (8, 128))


@dataclass(frozen=True)
class Subject:
    """One model.

    Attributes:
        name: what tables call it.
        model: the float file.
        batches: calibration data.
        fidelity: opened session -> how near it is to the float model; larger is nearer.
        measure: what `fidelity` is: "cosine" or "dB".
        shapes: feeds that are timed, by name.
        transformer: whether it is one.
        trained: whether its weights are; the fidelity of others says little.
    """

    name: str
    model: Path
    batches: Sequence[Feeds]
    fidelity: Callable[[Any], float]
    measure: str
    shapes: Mapping[str, Feeds]
    transformer: bool
    trained: bool

    def calibration(self, seed: int) -> Sequence[Feeds]:
        """The calibration data; the same for all."""
        return self.batches


def minilm(folder: Path) -> Subject:
    """all-MiniLM-L6-v2: the cosine of embeddings of STS-Benchmark dev."""
    encoder = Encoder()
    model = capture(encoder, folder / "minilm.onnx")
    sentences = data.stsb("dev").sentences
    held_out = encoder.batches(sentences[::3], 32)
    reference = embed(open_bare(model), held_out)
    shapes = {}
    for batch, length in LENGTHS:
        feeds = encoder.full_batch(sentences, batch, length)
        shapes[f"{batch} x {length}, {feeds['attention_mask'].mean():.0%} of it tokens"] = feeds
        full = {name: array.copy() for name, array in feeds.items()}
        full["attention_mask"][:] = 1
        shapes[f"{batch} x {length}, no padding"] = full
    texts = data.stsb("train").first[:SENTENCES]
    return Subject(
        "MiniLM",
        model,
        encoder.batches(texts, CALIBRATION_BATCH),
        lambda session: float((embed(session, held_out) * reference).sum(1).mean()),
        "cosine",
        shapes,
        transformer=True,
        trained=True,
    )


def _images(name: str, model: Path, held: str, x: Floats, held_out: Floats, *, trained: bool) -> Subject:
    test = data.batches(held, held_out, 16)
    reference = run_all(open_bare(model), test)
    return Subject(
        name,
        model,
        data.batches(held, x, CALIBRATION_BATCH),
        lambda session: sqnr(reference, run_all(session, test)),
        "dB",
        {f"batch {size}": {held: held_out[:size]} for size in (1, 8)},
        transformer=False,
        trained=trained,
    )


def resnet20(folder: Path) -> Subject:
    """ResNet-20 on CIFAR-10."""
    x, held_out = data.cifar10("train_20k")[0][:128], data.cifar10("test_5k")[0][:512]
    return _images("ResNet-20", data.model("resnet20_cifar10.onnx"), "input", x, held_out, trained=True)


def mcunet(folder: Path) -> Subject:
    """MCUNet on photos."""
    x = (data.photos(176, 176) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    x = x[np.random.default_rng(0).permutation(len(x))]
    model = data.model("mcunet_imagenet.onnx")
    return _images("MCUNet", model, "input", x[:IMAGES], x[IMAGES : IMAGES + HELD_OUT], trained=True)


def _photos() -> Floats:
    mean, deviation = (part[:, None, None] for part in IMAGENET)
    x = (data.photos(SIDE, SIDE, IMAGES + HELD_OUT) - mean) / deviation
    return np.ascontiguousarray(x[np.random.default_rng(0).permutation(len(x))])


def _convolutional(name: str, make: Callable[[], torch.nn.Module], folder: Path) -> Subject:
    torch.manual_seed(0)
    x = _photos()
    module = peer_models.settled(make(), torch.from_numpy(x[:IMAGES]))
    fixed = {"input": (1, 2, 3)}
    model = peer_models.written(module, {"input": x[:2]}, fixed, folder / f"{name}.onnx")
    return _images(name, model, "input", x[:IMAGES], x[IMAGES:], trained=False)


def resnet18(folder: Path) -> Subject:
    """ResNet-18's shape."""
    return _convolutional("ResNet-18 (random weights)", peer_models.resnet18, folder)


def mobile_net(folder: Path) -> Subject:
    """MobileNet-v2's shape."""
    return _convolutional("MobileNet-v2 (random weights)", peer_models.mobile_net, folder)


def vit_small(folder: Path) -> Subject:
    """ViT-S/16's shape."""
    torch.manual_seed(0)
    x, name = _photos(), "pixel_values"
    model = peer_models.written(
        peer_models.vit_small(), {name: x[:2]}, {name: (1, 2, 3)}, folder / "vit.onnx"
    )
    made = _images("ViT-S (random weights)", model, name, x[:IMAGES], x[IMAGES : IMAGES + 16], trained=False)
    return Subject(**{**vars(made), "transformer": True})


def bert_base(folder: Path) -> Subject:
    """BERT-base's shape."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)

    def feeds(batch: int, length: int) -> Feeds:
        ids = rng.integers(1000, 30000, (batch, length))
        return {"input_ids": ids, "attention_mask": np.ones_like(ids)}

    model = peer_models.written(peer_models.bert_base(), feeds(2, 16), {}, folder / "bert.onnx")
    test = [feeds(4, 64) for _ in range(4)]
    reference = run_all(open_bare(model), test)
    return Subject(
        "BERT-base (random weights)",
        model,
        [feeds(4, 64) for _ in range(8)],
        lambda session: sqnr(reference, run_all(session, test)),
        "dB",
        {f"{batch} x {length}": feeds(batch, length) for batch, length in ((1, 32), (1, 128))},
        transformer=True,
        trained=False,
    )


def tiny(folder: Path) -> Subject:
    """Layers of 16 channels, which no int8 kernel makes faster."""
    torch.manual_seed(0)
    x = np.random.default_rng(0).standard_normal((512, 16)).astype(np.float32)
    model = peer_models.written(peer_models.tiny(), {"input": x[:2]}, {"input": (1,)}, folder / "tiny.onnx")
    return _images("seven layers of 16 channels", model, "input", x[:256], x[256:], trained=False)


SUBJECTS: Mapping[str, Callable[[Path], Subject]] = {
    "minilm": minilm,
    "resnet20": resnet20,
    "mcunet": mcunet,
    "resnet18": resnet18,
    "mobilenet": mobile_net,
    "vit-s": vit_small,
    "bert-base": bert_base,
    "tiny": tiny,
}
"""By name, made in a folder."""
