# SPDX-License-Identifier: Apache-2.0
"""Options of the commands that take a model to compile, or run models for their time."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["BatchOption", "ModelArgument", "RunsOption", "ThreadsOption"]

ModelArgument = Annotated[
    str, typer.Argument(help="An .onnx file, an artifact folder, or package.module:function.")
]
BatchOption = Annotated[
    int,
    typer.Option("--batch", min=1, help="Samples a run, where --data is one .npz and the batch is free."),
]
ThreadsOption = Annotated[
    int, typer.Option("--threads", min=0, help="Threads of the runtime; 0 is its own choice.")
]
RunsOption = Annotated[int, typer.Option("--runs", min=1, help="Timed runs of each model.")]
