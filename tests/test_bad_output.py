# SPDX-License-Identifier: Apache-2.0
"""Bad output places: not empty, not writable, a full disk; nothing half-written remains."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
import pytest
from small import mlp, saved

from splitfold.compiler import compile
from splitfold.runtime.artifact import Artifact
from splitfold.runtime.errors import ArtifactError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return saved(mlp(), tmp_path / "model.onnx")


@pytest.fixture
def artifact() -> Artifact:
    return compile(mlp(), pipeline="canonicalize")


def test_output_folder_not_empty(tmp_path: Path, artifact: Artifact) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(ArtifactError, match=r"out is not empty: choose another one, or pass overwrite=True"):
        artifact.save(tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "thesis.tex").read_text() == "precious"


def test_output_is_a_file(tmp_path: Path, artifact: Artifact) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(ArtifactError, match=r"out is a file, not a folder"):
        artifact.save(tmp_path / "out", overwrite=True)


def test_output_folder_below_a_file(tmp_path: Path, artifact: Artifact) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ArtifactError, match=r"cannot write to .*file"):
        artifact.save(tmp_path / "file" / "out")
    with pytest.raises(ArtifactError, match=r"cannot write .*file"):
        artifact.save_model(tmp_path / "file" / "out.onnx")


@contextlib.contextmanager
def _locked() -> Iterator[Path]:
    """Yield a folder that may be read and not written; root, who may do all, becomes nobody meanwhile."""
    folder = Path(tempfile.mkdtemp(prefix="splitfold-locked-"))
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_output_folder_not_writable(artifact: Artifact) -> None:
    with _locked() as folder:
        with pytest.raises(ArtifactError, match=r"cannot write to .*locked-\w+: Permission denied"):
            artifact.save(folder / "out")
        with pytest.raises(ArtifactError, match=r"cannot write to .*locked-\w+: Permission denied"):
            artifact.save_model(folder / "out.onnx")


def test_files_that_may_not_be_looked_at(tmp_path: Path, model: Path, artifact: Artifact) -> None:
    with _locked() as folder:
        if os.access(tmp_path, os.X_OK, effective_ids=True) or not folder.is_dir():
            pytest.skip("everyone may look into the folder of this test")
        with pytest.raises(ArtifactError, match=r"cannot write to .*out: Permission denied"):
            artifact.save(tmp_path / "out")
        with pytest.raises(ArtifactError, match=r"cannot read .*model\.onnx: Permission denied"):
            compile(model, pipeline="canonicalize")


def _failing_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the writer put some bytes on the disk and then find it full."""

    def save(model: ir.Model, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"half a model")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ir, "save", save)


@contextlib.contextmanager
def small_disk() -> Iterator[None]:
    """Let every file end at 4 kB, as a real write that fails halfway does; also the test run's own output."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_full_disk_leaves_nothing(
    tmp_path: Path, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    _failing_save(monkeypatch)
    with pytest.raises(ArtifactError, match=r"no space left on the device; nothing half-written remains"):
        artifact.save(tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"no space left on the device"):
        artifact.save_model(tmp_path / "out.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_the_old(
    tmp_path: Path, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact.save(tmp_path / "out")
    artifact.save_model(tmp_path / "out.onnx")
    before = _tree(tmp_path)
    _failing_save(monkeypatch)
    with pytest.raises(ArtifactError):
        artifact.save(tmp_path / "out", overwrite=True)
    with pytest.raises(ArtifactError):
        artifact.save_model(tmp_path / "out.onnx")
    assert _tree(tmp_path) == before
    Artifact.load(tmp_path / "out")


def test_a_write_that_really_ends_halfway(tmp_path: Path, artifact: Artifact) -> None:
    with small_disk(), pytest.raises(ArtifactError, match=r"cannot write .*out"):
        artifact.save(tmp_path / "out")
    with small_disk(), pytest.raises(ArtifactError, match=r"cannot write .*out\.onnx"):
        artifact.save_model(tmp_path / "out.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_that_does_not_fit(
    tmp_path: Path, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_text(self: Path, *_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", write_text)
    with pytest.raises(ArtifactError, match="no space left"):
        artifact.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
