# SPDX-License-Identifier: Apache-2.0
"""Generating text with a causal language model that has a key and value cache: prefill, then one token a
run."""

from __future__ import annotations

import enum
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from splitfold.runtime.artifact import PARTS_KEY, Artifact, read_manifest
from splitfold.runtime.bundle import DECODE, PREFILL, Bundle
from splitfold.runtime.cache import POSITIONS_KEY, CacheShape
from splitfold.runtime.errors import GenerationError
from splitfold.runtime.feeds import Array, model_inputs
from splitfold.runtime.memory import release_memory
from splitfold.runtime.model_file import model_path, read_model
from splitfold.runtime.sampling import Sampler, Sampling
from splitfold.runtime.session import Held, Session
from splitfold.runtime.target import Target

__all__ = ["Decoding", "End", "Generation", "Generator", "Phase"]

Single = Artifact | ir.Model | str | Path
Openable = Single | Bundle
_IDS, _MASK, _POSITIONS = "input_ids", "attention_mask", "position_ids"


class End(enum.Enum):
    """Why a generation ended."""

    STOP = "a stop token"
    LIMIT = "as many tokens as were asked for"
    POSITIONS = "the model knows no further position"


@dataclass(frozen=True)
class Phase:
    """How many tokens went through the model, and in how many seconds."""

    tokens: int
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        return f"{self.tokens} tokens in {self.seconds:.3f} s, {self.rate:.1f} tokens/s"


@dataclass(frozen=True)
class Generation:
    """What was generated.

    Attributes:
        tokens: the new ones, a stop token not included.
        end: why no more came.
        prefill: the prompt, in one run.
        decode: the runs of one token; sampling is not counted.
    """

    tokens: tuple[int, ...]
    end: End
    prefill: Phase
    decode: Phase


class Generator:
    """A causal language model, ready to generate.

    Args:
        model: the graph, for what its cache looks like.
        session: the same model, opened.
        prefill: the same model compiled for many rows, opened, which takes the prompt: int8 is the faster
            carrier there, and 4-bit weights at one row. None is for one session for both.

    Raises:
        GenerationError: it has no cache, no ``input_ids`` or ``logits``, or an input that generation cannot
            feed; `prefill` has other inputs or outputs.
    """

    def __init__(self, model: ir.Model, session: Session, *, prefill: Session | None = None) -> None:
        self.session, self.prefill = session, prefill or session
        self.cache = CacheShape.of(model)
        self.positions = int(model.metadata_props.get(POSITIONS_KEY, 0))
        """How many positions the model knows, those of the prompt included; 0 is unknown."""
        known = {_IDS, _MASK, _POSITIONS, *self.cache.layout.past}
        names = [value.name or "" for value in model_inputs(model)]
        if strange := [name for name in names if name not in known]:
            raise GenerationError(f"nobody knows what to feed to input '{strange[0]}' in generation.")
        for needed, present in ((_IDS, names), ("logits", [value.name for value in model.graph.outputs])):
            if needed not in present:
                raise GenerationError(f"the model has no '{needed}': {', '.join(map(str, present))}.")
        self._fed = frozenset(names)
        for mine, its in ((session.inputs, self.prefill.inputs), (session.outputs, self.prefill.outputs)):
            if differing := sorted(set(mine) ^ set(its)):
                raise GenerationError(f"'{differing[0]}' is known to one of model and prefill only.")

    @staticmethod
    def open(
        model: Openable, target: Target | None = None, *, prefill: Single | None = None, threads: int = 0
    ) -> Generator:
        """Open an artifact, its folder, a model in memory or an ``.onnx`` file; of a bundle, or its folder,
        the parts ``decode`` and ``prefill``.

        Raises:
            GenerationError: see the class; a bundle has no part ``decode``.
            ArtifactError, SessionError: it cannot be read or opened.
        """
        if isinstance(model, str | Path) and Path(model).is_dir():
            model = _loaded(Path(model))
        if isinstance(model, Bundle):
            if DECODE not in model.parts:
                raise GenerationError(f"the bundle has no part '{DECODE}': {', '.join(model.parts)}.")
            prefill = model.parts.get(PREFILL) if prefill is None else prefill
            model = model.parts[DECODE]
        graph, session = _open(model, target, threads)
        other = None
        if prefill is not None:
            other = _open(prefill, target, threads)[1]
            release_memory()
        return Generator(graph, session, prefill=other)

    def decoding(self) -> Decoding:
        """Return an empty cache, to which tokens can be added."""
        return Decoding(self.session, self.prefill, self._fed, self.cache)

    def generate(
        self,
        prompt: Sequence[int],
        *,
        limit: int,
        stop: Collection[int] = (),
        sampling: Sampling | None = None,
    ) -> Generation:
        """Return up to `limit` tokens that follow `prompt`.

        Args:
            prompt: token ids, with the start token where the model wants one.
            limit: most new tokens.
            stop: tokens that end the text.
            sampling: how tokens are chosen; default the most likely one.

        Raises:
            GenerationError: the prompt is empty or longer than the model's positions.
            ValueError: limit is negative.
        """
        run = _Run(self, prompt, limit, stop, sampling or Sampling())
        tokens = tuple(run)
        return Generation(tokens, run.end, run.prefill, run.decode)

    def stream(
        self,
        prompt: Sequence[int],
        *,
        limit: int,
        stop: Collection[int] = (),
        sampling: Sampling | None = None,
    ) -> Iterator[int]:
        """Yield the tokens of `generate`, each as soon as it is known."""
        return iter(_Run(self, prompt, limit, stop, sampling or Sampling()))


def _loaded(folder: Path) -> Artifact | Bundle:
    return Bundle.load(folder) if PARTS_KEY in read_manifest(folder) else Artifact.load(folder)


def _open(model: Single, target: Target | None, threads: int) -> tuple[ir.Model, Session]:
    if isinstance(model, str | Path) and Path(model).is_dir():
        model = Artifact.load(model)
    if isinstance(model, Artifact):
        return model.model, model.session(threads=threads)
    if isinstance(model, ir.Model):
        return model, Session(model, target, threads=threads)
    file = model_path(model)
    return read_model(file), Session(file, target, threads=threads)


class Decoding:
    """A sequence that grows: its keys and values stay with the runtime.

    Args:
        step: takes one token.
        prefill: takes several.
        fed: names of the inputs.
        cache: what an empty one is.
    """

    def __init__(self, step: Session, prefill: Session, fed: frozenset[str], cache: CacheShape) -> None:
        self._step, self._prefill, self._fed, self._layout = step, prefill, fed, cache.layout
        self._past: dict[str, Array | Held] = dict(cache.empty())
        self.length = 0
        """Positions in the cache."""

    def add(self, tokens: Sequence[int]) -> Array:
        """Run the model on further tokens and return the logits [vocabulary] after the last one.

        Raises:
            SessionError: the runtime failed, as at a token or position that the model does not know.
        """
        ids = np.asarray(tokens, np.int64)[None]
        end = self.length + ids.shape[1]
        feeds = {
            _IDS: ids,
            _MASK: np.ones((1, end), np.int64),
            _POSITIONS: np.arange(self.length, end, dtype=np.int64)[None],
        }
        session = self._step if ids.shape[1] == 1 else self._prefill
        found = session.run_held({key: feeds[key] for key in feeds if key in self._fed} | self._past)
        names = zip(self._layout.past, self._layout.present, strict=True)
        self._past = {past: found[present] for past, present in names}
        self.length = end
        return np.asarray(found["logits"].array()[0, -1])


class _Run:
    """One generation, token by token, and what it took so far."""

    def __init__(
        self,
        generator: Generator,
        prompt: Sequence[int],
        limit: int,
        stop: Collection[int],
        sampling: Sampling,
    ) -> None:
        if not len(prompt):
            raise GenerationError("the prompt is empty: begin with the model's start token.")
        if generator.positions and len(prompt) > generator.positions:
            raise GenerationError(
                f"the prompt has {len(prompt)} tokens, the model knows {generator.positions} positions."
            )
        if limit < 0:
            raise ValueError(f"limit is {limit}; it is at least 0.")
        self._decoding, self._prompt = generator.decoding(), prompt
        self._limit, self._stop, self._sampler = limit, frozenset(stop), Sampler(sampling)
        self._positions = generator.positions
        self.end = End.LIMIT
        self.prefill = self.decode = Phase(0, 0.0)

    def __iter__(self) -> Iterator[int]:
        begin = time.perf_counter()
        logits = self._decoding.add(self._prompt)
        self.prefill = Phase(len(self._prompt), time.perf_counter() - begin)
        for made in range(1, self._limit + 1):
            token = self._sampler.choose(logits)
            if token in self._stop:
                self.end = End.STOP
                return
            yield token
            if made == self._limit:
                return
            if self._positions and self._decoding.length >= self._positions:
                self.end = End.POSITIONS
                return
            begin = time.perf_counter()
            logits = self._decoding.add([token])
            spent = time.perf_counter() - begin
            self.decode = Phase(self.decode.tokens + 1, self.decode.seconds + spent)
