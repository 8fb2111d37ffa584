# SPDX-License-Identifier: Apache-2.0
"""Train the digits vision transformer and write its ONNX file, held-out images and calibration images.

Run `python examples/digits/train.py`; the same seed on the same machine gives the same bytes.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional

from splitfold.examples.digits.model import IMAGE_SIZE, DigitsViT

HELD_OUT = 360
CALIBRATION = 64
MAX_VALUE = 16.0
BATCH = 64
PEAK_RATE = 3e-3
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1
STRETCH = 0.1
SHIFT = 0.5
REPORT_EVERY = 20
KEPT_METADATA = "pkg.torch.onnx.name_scopes"

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Data:
    """The two parts of the data set: images uint8 [n, 8, 8] in 0..16, labels int64 [n]."""

    train_x: Pixels
    train_y: Labels
    held_x: Pixels
    held_y: Labels


def load_data(seed: int) -> Data:
    """The 1797 digits, split by class into 1437 for training and 360 held out."""
    digits = load_digits()
    x, y = digits.images.astype(np.uint8), digits.target.astype(np.int64)
    train_x, held_x, train_y, held_y = train_test_split(
        x, y, test_size=HELD_OUT, stratify=y, random_state=seed
    )
    return Data(train_x, train_y, held_x, held_y)


def to_input(x: Pixels) -> Floats:
    """uint8 [n, 8, 8] in 0..16 -> float32 [n, 1, 8, 8] in 0..1."""
    return (x[:, None] / np.float32(MAX_VALUE)).astype(np.float32)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to half a pixel, and slightly stretch and shear; float32 [n, 1, 8, 8] both ways."""
    noise = torch.rand(len(images), 2, 3, generator=generator) * 2 - 1
    spread = torch.tensor([STRETCH, STRETCH, SHIFT * 2 / IMAGE_SIZE])
    theta = torch.eye(2, 3) + noise * spread
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


class Training:
    """A model under training, with AdamW, a short warm-up and a cosine decay."""

    def __init__(self, x: Tensor, y: Tensor, epochs: int, seed: int) -> None:
        """x: float32 [n, 1, 8, 8] in 0..1, y: int64 [n]; the seed sets the weights and the shuffling."""
        torch.manual_seed(seed)
        self.x, self.y, self.generator = x, y, torch.Generator().manual_seed(seed)
        self.model = DigitsViT()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=PEAK_RATE, weight_decay=WEIGHT_DECAY)
        steps = epochs * math.ceil(len(x) / BATCH)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=PEAK_RATE, total_steps=steps, pct_start=0.1, cycle_momentum=False
        )

    def step(self, batch: Tensor) -> float:
        """One update on the images with these indices (int64 [b]); returns the mean loss over them."""
        logits = self.model(augment(self.x[batch], self.generator))
        loss = functional.cross_entropy(logits, self.y[batch], label_smoothing=LABEL_SMOOTHING)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.schedule.step()
        return loss.item()

    def epoch(self) -> float:
        """One shuffled pass over the training images; returns the mean loss."""
        order = torch.randperm(len(self.x), generator=self.generator)
        return sum(self.step(batch) * len(batch) for batch in torch.split(order, BATCH)) / len(self.x)


def train(data: Data, epochs: int, seed: int) -> DigitsViT:
    """Train for so many epochs, printing the loss now and then; returns the model in eval mode."""
    x, y = torch.from_numpy(to_input(data.train_x)), torch.from_numpy(data.train_y)
    training = Training(x, y, epochs, seed)
    for epoch in range(1, epochs + 1):
        loss = training.epoch()
        if epoch % REPORT_EVERY == 0 or epoch == epochs:
            print(f"epoch {epoch:4d}/{epochs}  training loss {loss:.4f}")
    return training.model.eval()


def strip_metadata(model: onnx.ModelProto) -> None:
    """Keep only the nodes' name scopes: the exporter's other notes hold local paths or only add size."""
    graph = model.graph
    holders = (model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer)
    for holder in holders:
        kept = [prop for prop in holder.metadata_props if prop.key == KEPT_METADATA]
        del holder.metadata_props[:]
        holder.metadata_props.extend(kept)
        holder.doc_string = ""


def export(model: DigitsViT, path: Path) -> None:
    """Write the model as ONNX: `image` float32 [batch, 1, 8, 8] -> `logits` float32 [batch, 10]."""
    program = torch.onnx.export(
        model,
        (torch.zeros(2, 1, IMAGE_SIZE, IMAGE_SIZE),),
        dynamo=True,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes={"image": {0: "batch"}},
        verbose=False,
    )
    assert program is not None
    proto = program.model_proto
    strip_metadata(proto)
    onnx.checker.check_model(proto, full_check=True)
    path.write_bytes(proto.SerializeToString(deterministic=True))


def write_arrays(data: Data, folder: Path, seed: int) -> None:
    """Write held_out.npz (uint8 `x`, int64 `y`) and calibration.npz (float32 `image` [64, 1, 8, 8])."""
    chosen, _ = train_test_split(
        data.train_x, train_size=CALIBRATION, stratify=data.train_y, random_state=seed
    )
    np.savez_compressed(folder / "held_out.npz", x=data.held_x, y=data.held_y)
    np.savez_compressed(folder / "calibration.npz", image=to_input(chosen))


def torch_logits(model: DigitsViT, image: Floats) -> Floats:
    """float32 [n, 1, 8, 8] -> float32 logits [n, 10], run by torch."""
    with torch.no_grad():
        logits: Floats = model(torch.from_numpy(image)).numpy()
    return logits


def onnx_logits(path: Path, image: Floats) -> Floats:
    """float32 [n, 1, 8, 8] -> float32 logits [n, 10], run by ONNX Runtime on the CPU."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["logits"], {"image": image})[0], dtype=np.float32)


def report(model: DigitsViT, data: Data, path: Path) -> None:
    """Print the held-out accuracy, and how far ONNX Runtime is from torch."""
    image = to_input(data.held_x)
    expected, actual = torch_logits(model, image), onnx_logits(path, image)
    right = int((actual.argmax(axis=1) == data.held_y).sum())
    print(f"held-out accuracy {right / len(image):.2%} ({right} of {len(image)})")
    print(f"largest difference to torch {np.abs(actual - expected).max():.1e}; {path.stat().st_size} bytes")


def parse_arguments() -> argparse.Namespace:
    """The command line: --epochs, --seed, --output."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=200, help="passes over the training images")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split and the training")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent, help="output folder")
    return parser.parse_args()


def main() -> None:
    """Train, write the three files, and report."""
    arguments = parse_arguments()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    data = load_data(arguments.seed)
    model = train(data, arguments.epochs, arguments.seed)
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "digits_vit.onnx"
    export(model, path)
    write_arrays(data, arguments.output, arguments.seed)
    report(model, data, path)


if __name__ == "__main__":
    main()
