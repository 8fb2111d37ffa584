# SPDX-License-Identifier: Apache-2.0
"""onnxruntime-genai's model builder and generator, in an environment of their own."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitfold.examples.benchmarks.decoding_models import Files
from splitfold.examples.benchmarks.weight_peers import Environment, PeerError

__all__ = ["GENAI", "Genai"]

GENAI = "onnxruntime-genai's builder, int4"
REQUIREMENTS = (
    "onnxruntime-genai==0.18.0", "onnxruntime==1.31.1", "onnx-ir==1.1.0", "onnx==1.23.2", "torch==2.13.0",
    "transformers==5.23.0",
)  # fmt: skip
WORKER = Path(__file__).with_name("genai_worker.py")
LIMIT = 1800
"""Seconds after which a call is given up."""


@dataclass(frozen=True)
class Genai:
    """The environment, made by pip in a folder where it is not there yet."""

    environment: Environment

    @staticmethod
    def installed(folder: Path) -> Genai:
        """Return it.

        Raises:
            PeerError: pip fails.
        """
        environment = Environment(folder.resolve(), REQUIREMENTS, WORKER)
        environment.install()
        return Genai(environment)

    def build(self, module: Any, folder: Path) -> Files:
        """Return what the builder makes of a transformers model.

        Raises:
            PeerError: it fails.
        """
        checkpoint, result = folder / "checkpoint", folder / "genai"
        module.save_pretrained(checkpoint)
        self._call("build", str(checkpoint), str(result))
        return Files.of(result / "model.onnx")

    def generate(self, files: Files, prompt: int, tokens: int) -> dict[str, float]:
        """Return the milliseconds of a prompt and of a token by genai's own generator.

        Raises:
            PeerError: it fails.
        """
        lines = self._call("generate", str(files.step.parent), str(prompt), str(tokens)).splitlines()
        found: dict[str, float] = json.loads(lines[-1])
        return found

    def _call(self, *words: str) -> str:
        command = [str(self.environment.python), str(WORKER), *words]
        offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=offline)
        except subprocess.TimeoutExpired:
            raise PeerError(f"gave no result within {LIMIT} s") from None
        if done.returncode:
            raise PeerError(f"exit code {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1]}")
        return done.stdout
