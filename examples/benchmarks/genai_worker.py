# SPDX-License-Identifier: Apache-2.0
"""Builds a model with onnxruntime-genai, in an environment of its own: `genai_builder.py` runs this file.

    python genai_worker.py build checkpoint result
    python genai_worker.py generate result prompt-length tokens

`checkpoint` is a folder of a transformers model, to which a tokenizer of numbered words is
added, as the builder wants one. `generate` prints one line of JSON: milliseconds of the prompt, its first
token included, and of each further token, by genai's own generator.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def build(checkpoint: Path, result: Path) -> None:
    """Call the builder: int4 for the CPU, logits of the last token alone, otherwise its defaults."""
    words = int(json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["vocab_size"])
    tokenizers: Any = importlib.import_module("tokenizers")
    transformers: Any = importlib.import_module("transformers")
    vocabulary = {f"w{number}": number for number in range(words)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="w0", bos_token="w1", eos_token="w2"
    )
    tokenizer.save_pretrained(checkpoint)
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    command += ["-i", str(checkpoint), "-o", str(result), "-p", "int4", "-e", "cpu"]
    command += ["-c", str(result / "cache"), "--extra_options", "prune_lm_head=true"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def generate(folder: Path, prompt: int, tokens: int) -> None:
    """Time genai's generator, after one text that is not timed."""
    genai: Any = importlib.import_module("onnxruntime_genai")
    model = genai.Model(str(folder))
    found = {}
    for _ in range(2):
        settings = genai.GeneratorParams(model)
        settings.set_search_options(max_length=prompt + tokens + 1, min_length=prompt + tokens + 1)
        generator = genai.Generator(model, settings)
        start = time.perf_counter()
        generator.append_tokens([3 + number % 1000 for number in range(prompt)])
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(tokens):
            generator.generate_next_token()
        found = {"prompt": first - start, "token": (time.perf_counter() - first) / tokens}
    print(json.dumps({name: seconds * 1e3 for name, seconds in found.items()}))


if __name__ == "__main__":
    if sys.argv[1] == "build":
        build(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        generate(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
