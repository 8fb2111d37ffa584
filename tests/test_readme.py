# SPDX-License-Identifier: Apache-2.0
"""The README's Python runs as it stands, and what it says of presets and passes is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from splitfold.compiler.presets import PRESETS
from splitfold.passes.pipeline import Pipeline
from splitfold.passes.table import PASSES

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="the example compiles a PyTorch module (extra 'torch')")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "out" / "model.onnx").is_file()


def test_presets_are_what_the_table_says() -> None:
    rows = dict(re.findall(r"^\| `([a-z0-9-]+)` \| `([^`]+)` \|", README, re.MULTILINE))
    assert set(rows) == set(PRESETS)
    for name, text in rows.items():
        assert Pipeline.parse(text) == PRESETS[name]()


def test_every_pass_is_in_the_table_with_its_contract() -> None:
    rows = dict(re.findall(r"^\| `([a-z-]+)` \| (exact|lossy|semantic) \|", README, re.MULTILINE))
    assert rows == {kind.name: kind.contract.value for kind in PASSES}
