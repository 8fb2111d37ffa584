# SPDX-License-Identifier: Apache-2.0
"""A language model is captured with its cache, compiled to 4-bit weights, and writes a text.

    python -m splitfold.examples.generate --prompt "Once upon a time" --tokens 100
    python -m splitfold.examples.generate --checkpoint folder-of-a-transformers-model --prompt "Hello"
    python -m splitfold.examples.generate --artifact saved --tokens 50
    python -m splitfold.examples.generate --preset decoder --prefill widen-blocks --save both

Without --checkpoint it is stories260K, a small Llama, from the folder that SPLITFOLD_SHARED names. --save
keeps the compiled model, which --artifact then opens without torch. --prefill makes a second graph of the
same weights, which takes the prompt.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from splitfold.compiler import Artifact, Pipeline, compile, presets
from splitfold.compiler.decoder import capture_decoder
from splitfold.examples.benchmarks import data
from splitfold.examples.benchmarks.stories import BYTES_FROM, Tokenizer
from splitfold.runtime.bundle import DECODE, PREFILL, Bundle
from splitfold.runtime.generation import Generator
from splitfold.runtime.sampling import Sampling

STARTS = "Once upon a time"
FUSED = Pipeline.parse("fuse-cached-attention")
STORIES_STOP = 1
"""stories260K puts its start token between stories."""


@dataclass(frozen=True)
class Language:
    """How text becomes tokens and tokens become text."""

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    stop: tuple[int, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the text, and how fast it came."""
    options = _options(arguments)
    if options.artifact:
        generator, language = Generator.open(options.artifact), _stories_language()
    else:
        module, language = _checkpoint(options.checkpoint) if options.checkpoint else _stories()
        compiled = _compiled(module, options)
        if options.save:
            print(f"saved: {compiled.save(options.save, overwrite=True)}")
        generator = Generator.open(compiled)
    sampling = Sampling(options.temperature, options.top_k, options.seed)
    prompt = language.encode(options.prompt)
    found = generator.generate(prompt, limit=options.tokens, stop=language.stop, sampling=sampling)
    print(language.decode([*prompt, *found.tokens]))
    print(f"\nended by {found.end.value}")
    print(f"prefill: {found.prefill}\ndecode:  {found.decode}")
    return 0


def _compiled(module: Any, options: argparse.Namespace) -> Artifact | Bundle:
    steps = presets.preset(options.preset) + FUSED
    decode = compile(capture_decoder(module), pipeline=steps, speed=None)
    if not options.prefill:
        return decode
    return Bundle({DECODE: decode, PREFILL: compile(decode.model, pipeline=options.prefill, speed=None)})


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--checkpoint", help="folder or name of a causal language model of transformers")
    source.add_argument("--artifact", help="folder of a stories260K that --save wrote")
    parser.add_argument("--preset", default="int4", choices=[*presets.PRESETS], help="how it is compiled")
    parser.add_argument("--prefill", help="passes that make the prompt's graph of it, such as widen-blocks")
    parser.add_argument("--save", help="folder for the compiled model")
    parser.add_argument("--prompt", default=STARTS)
    parser.add_argument("--tokens", type=int, default=100, help="most new tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is the most likely token")
    parser.add_argument("--top-k", type=int, default=0, help="draw from so many tokens; 0 is all")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def _stories() -> tuple[Any, Language]:
    from splitfold.examples.benchmarks.stories_llama import stories_llama

    return stories_llama(data.model("stories260K.onnx")), _stories_language()


def _stories_language() -> Language:
    tokenizer = Tokenizer.read(data.model("stories260K_tok512.bin"))

    def text(tokens: Sequence[int]) -> str:
        pieces = [tokenizer.pieces[token] for token in tokens if token >= BYTES_FROM]
        return b"".join(_byte(piece) for piece in pieces).decode(errors="replace").strip()

    return Language(tokenizer.encode, text, (STORIES_STOP,))


def _byte(piece: bytes) -> bytes:
    """Return the byte that a piece like ``<0x0A>`` stands for, and other pieces as they are."""
    return bytes([int(piece[3:5], 16)]) if piece.startswith(b"<0x") and len(piece) == 6 else piece


def _checkpoint(name: str) -> tuple[Any, Language]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    module: Any = AutoModelForCausalLM.from_pretrained(name, dtype="float32")
    stop = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)

    def text(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=True))

    return module.eval(), Language(lambda text: list(tokenizer(text)["input_ids"]), text, stop)


if __name__ == "__main__":
    sys.exit(main())
