# SPDX-License-Identifier: Apache-2.0
"""A BERT-Tiny-sized encoder (2 layers, hidden 128) that classifies emotions or spam messages.

    python -m splitfold.examples.training.small_bert --task emotion -o small_bert.onnx

It reads `shared/data/text` (or SPLITFOLD_SHARED), trains from scratch for one to two minutes on the CPU, and
writes the model as ONNX: ids int64 [batch, sequence up to 64], padded with 0 -> logits float32 [batch,
classes]. The steps are counted, not timed, so a seed gives the same model on the same machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from splitfold.compiler import compile
from splitfold.examples.benchmarks.data import Labels
from splitfold.examples.training.loop import Batch, train_steps
from splitfold.examples.training.texts import LENGTH, TASKS, Task, Vocabulary

HIDDEN, LAYERS, HEADS, INNER = 128, 2, 2, 512
DROPOUT = 0.1
WORD_DROPOUT = 0.1
BATCH = 64
GROUP = 16
"""Batches that are drawn together and sorted by length, as padding takes time too."""
EPOCHS = {"emotion": 5, "sms_spam": 5}
RATE = 1e-3
FAR = -1e4


class Attention(nn.Module):
    """Self-attention of a post-norm block."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
        self.output = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor, far: Tensor) -> Tensor:
        """[batch, sequence, hidden], 0 or FAR for each token [batch, 1, 1, sequence] -> the shape of `x`."""
        shape = (x.shape[0], x.shape[1], HEADS, HIDDEN // HEADS)
        q, k, v = (part(x).view(shape).transpose(1, 2) for part in (self.query, self.key, self.value))
        shares = (q @ k.transpose(-1, -2) / (HIDDEN // HEADS) ** 0.5 + far).softmax(-1)
        out: Tensor = self.output((shares @ v).transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """A post-norm block, as in BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm_attention = Attention(), nn.LayerNorm(HIDDEN)
        self.intermediate, self.output = nn.Linear(HIDDEN, INNER), nn.Linear(INNER, HIDDEN)
        self.norm_output = nn.LayerNorm(HIDDEN)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor, far: Tensor) -> Tensor:
        """[batch, sequence, hidden] and the mask of `Attention` -> the same shape."""
        x = self.norm_attention(x + self.dropout(self.attention(x, far)))
        inner = functional.gelu(self.intermediate(x))
        out: Tensor = self.norm_output(x + self.dropout(self.output(inner)))
        return out


class SmallBert(nn.Module):
    """The classifier: the mean over tokens goes to the head."""

    def __init__(self, words: int, classes: int) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(words, HIDDEN), nn.Embedding(LENGTH, HIDDEN)
        self.norm, self.dropout = nn.LayerNorm(HIDDEN), nn.Dropout(DROPOUT)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(HIDDEN, classes)
        for name, parameter in self.named_parameters():  # as in BERT
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [batch, sequence] -> logits float32 [batch, classes]."""
        known = (ids != 0).to(torch.float32)
        far = (1 - known)[:, None, None, :] * FAR
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.dropout(self.norm(self.words(ids) + self.positions(places)))
        for block in self.blocks:
            x = block(x, far)
        mean = (x * known[..., None]).sum(1) / known.sum(1, keepdim=True).clamp(min=1)
        out: Tensor = self.head(self.dropout(mean))
        return out


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained encoder, with what turns texts into ids."""

    task: Task
    vocabulary: Vocabulary
    model: SmallBert

    def save(self, path: Path) -> Path:
        """Write the model as ONNX, dynamic in batch and sequence."""
        example = torch.from_numpy(self.vocabulary.encode(self.task.texts[:4]))
        shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=LENGTH)},)
        compile(self.model, (example,), pipeline="canonicalize", dynamic_shapes=shapes).save_model(path)
        return path


def shuffled(task: Task, vocabulary: Vocabulary, seed: int) -> Iterator[Batch]:
    """Seeded epochs without end; a batch holds texts of similar length, a tenth of their words dropped."""
    rng = np.random.default_rng(seed)
    ids = vocabulary.encode(task.texts)
    lengths = (ids != 0).sum(1)
    while True:
        order = rng.permutation(len(ids))
        groups = [order[at : at + GROUP * BATCH] for at in range(0, len(order), GROUP * BATCH)]
        order = np.concatenate([group[np.argsort(lengths[group], kind="stable")] for group in groups])
        batches = [order[at : at + BATCH] for at in range(0, len(order), BATCH)]
        for number in rng.permutation(len(batches)):
            picks = batches[number]
            cut = ids[picks, : max(1, lengths[picks].max())]
            cut[rng.random(cut.shape) < WORD_DROPOUT] = 0
            yield torch.from_numpy(cut), torch.from_numpy(task.labels[picks])


def class_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy."""
    return functional.cross_entropy(model(batch[0]).float(), batch[1])


def trained(task: Task, seed: int, epochs: int = 0) -> Trained:
    """Train on `task`; 0 epochs are the task's usual number."""
    torch.manual_seed(seed)
    vocabulary = Vocabulary(task.texts)
    model = SmallBert(len(vocabulary), len(task.names))
    steps = (epochs or EPOCHS[task.name]) * -(-len(task.texts) // BATCH)
    train_steps(model, shuffled(task, vocabulary, seed), class_loss, steps=steps, rate=RATE)
    return Trained(task, vocabulary, model.eval())


def predicted(model: SmallBert, ids: Labels) -> Labels:
    """The class of each row of `ids`."""
    with torch.no_grad():
        parts = [model(torch.from_numpy(ids[at : at + 250])).argmax(1) for at in range(0, len(ids), 250)]
    return torch.cat(parts).numpy()


def main() -> int:
    """Train and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("small_bert.onnx"))
    parser.add_argument("--task", choices=list(TASKS), default="emotion")
    parser.add_argument("--epochs", type=int, default=0, help="0: the task's usual number")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    task = TASKS[given.task]()
    print(f"{task.name}: {len(task.texts)} texts to train on, {len(task.held_out_texts)} held out")
    result = trained(task, given.seed, given.epochs)
    print(f"{sum(p.numel() for p in result.model.parameters()) / 1e6:.2f} million parameters")
    found = predicted(result.model, result.vocabulary.encode(task.held_out_texts))
    hits = found == task.held_out_labels
    each = [
        f"{name} {100 * hits[task.held_out_labels == at].mean():.1f}" for at, name in enumerate(task.names)
    ]
    print(f"held-out accuracy {100 * hits.mean():.2f} % ({', '.join(each)})")
    print(f"written {result.save(given.output)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
