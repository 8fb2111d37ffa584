# SPDX-License-Identifier: Apache-2.0
"""A trained model with a cache: logits of the file without one, and a story told by the example."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="capturing needs the extra 'torch'")
pytest.importorskip("transformers", reason="the model needs transformers (extra 'minilm')")

from test_conformance import SHARED, _needs_shared

from splitfold.examples import generate
from splitfold.examples.benchmarks.stories import Tokenizer
from splitfold.runtime.generation import Generator
from splitfold.runtime.session import Session


@pytest.mark.slow
def test_stories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    models = _needs_shared("models")
    monkeypatch.setenv("SPLITFOLD_SHARED", str(SHARED))
    saved = str(tmp_path / "saved")
    assert generate.main(["--preset", "exact", "--tokens", "40", "--save", saved]) == 0
    told = capsys.readouterr().out
    assert "Once upon a time, there was a little girl named" in told
    assert "prefill: 5 tokens in" in told
    assert "decode:  39 tokens in" in told
    assert generate.main(["--artifact", saved, "--tokens", "40"]) == 0
    assert capsys.readouterr().out.split("ended")[0] in told

    ids = Tokenizer.read(models / "stories260K_tok512.bin").encode("Tim went to the park. He was very happy.")
    whole = Session(models / "stories260K.onnx").run({"ids": np.array([ids])})["logits"][0]
    decoding = Generator.open(saved).decoding()
    at = 3
    for tokens in (ids[:4], *([token] for token in ids[4:])):
        np.testing.assert_allclose(decoding.add(tokens), whole[at], atol=1e-3)
        at += 1
