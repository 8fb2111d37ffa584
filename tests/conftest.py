# SPDX-License-Identifier: Apache-2.0
"""Options of the test run, and the command line as a fixture."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import Run
from small import mlp, npz, samples, saved
from stopwatches import Even
from typer.testing import CliRunner, Result

from splitfold.compiler import SpeedCheck, compile
from splitfold.compiler.cli.app import app


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accept", action="store_true", help="rewrite the after sides of the pass pages")


@pytest.fixture(autouse=True)
def reproducers(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return where failing compilations write their reproducers: nothing is left in the folder for all."""
    folder = tmp_path_factory.getbasetemp() / "reproducers"
    monkeypatch.setattr("splitfold.compiler.debug.reproduce.reproducer.REPRODUCERS", folder)
    monkeypatch.setitem(compile.__kwdefaults__, "reproducers", folder)
    return folder


@pytest.fixture(autouse=True, scope="session")
def no_clock() -> Iterator[None]:
    """Let every compilation find its result as fast as the model: no time decides what a test sees."""
    check = SpeedCheck(stopwatch=Even())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("splitfold.compiler.driver.SPEED_CHECK", check)
        patch.setitem(compile.__kwdefaults__, "speed", check)
        yield


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Return a function that runs the command line in a folder that holds model.onnx and data.npz."""
    monkeypatch.chdir(tmp_path)
    saved(mlp(), Path("model.onnx"))
    npz(Path("data.npz"), x=samples(40))
    runner = CliRunner()

    def invoke(*arguments: object, code: int = 0) -> Result:
        result = runner.invoke(app, [str(argument) for argument in arguments], prog_name="splitfold")
        assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
        return result

    yield invoke
    logger = logging.getLogger("splitfold")  # -v has set it up for the whole process
    logger.handlers = []
    logger.setLevel(logging.NOTSET)
