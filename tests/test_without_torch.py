# SPDX-License-Identifier: Apache-2.0
"""ONNX in, ONNX out needs no torch; what needs it says which extra to install."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_BLOCKED = "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None\n"


def _run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _BLOCKED + code], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("preset", ["exact", "int8-dynamic", "int4"])
def test_onnx_models_compile(preset: str, tmp_path: Path) -> None:
    code = f"""
import numpy as np, onnx_ir as ir
from splitfold.compiler import compile, presets
text = '<ir_version: 8, opset_import: ["": 17]> m (float[n, 32] x) => (float[n, 32] y) {{ y = MatMul(x, w) }}'
weight = ir.tensor(np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32), name='w')
compile(ir.from_onnx_text(text, initializers=[weight]), pipeline=presets.preset('{preset}')).save('out')
assert sys.modules['torch'] is None
"""
    result = _run(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "model.onnx").is_file()


def test_a_torch_module_names_the_extra(tmp_path: Path) -> None:
    code = """
from splitfold.compiler import compile
class Module: __module__ = 'torch.nn.modules.module'
compile(Module(), (1,))
"""
    result = _run(code, tmp_path)
    assert result.returncode == 1
    assert "compiling a PyTorch model needs torch: pip install 'splitfold[torch]'" in result.stderr
