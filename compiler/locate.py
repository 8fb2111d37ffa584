# SPDX-License-Identifier: Apache-2.0
"""What a text names: a model file, an artifact folder, or ``package.module:function``."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

from splitfold.compiler.errors import CaptureError
from splitfold.runtime.errors import did_you_mean

__all__ = ["Located", "locate_attribute", "locate_data", "locate_model"]


@dataclass(frozen=True)
class Located:
    """A model as `splitfold.compiler.compile` takes it.

    Attributes:
        model: a path, or what the user's function returned.
        example_inputs, dynamic_shapes: what the function returned beside it, or None.
    """

    model: object
    example_inputs: object = None
    dynamic_shapes: object = None


def locate_model(text: str) -> Located:
    """Return the model that `text` names; a function is called, with the current folder on ``sys.path``.

    Raises:
        CaptureError: the module or function does not exist, raises, or returns something else than
            ``(module, example_inputs)`` or ``(module, example_inputs, dynamic_shapes)``.
    """
    if not _names_attribute(text):
        return Located(Path(text))
    function = locate_attribute(text)
    if not callable(function):
        raise CaptureError(
            f"{text} is a {type(function).__name__}: name a function that returns (module, example_inputs)."
        )
    try:
        found = function()
    except Exception as error:
        raise CaptureError(f"{text}() raised {type(error).__name__}: {error}") from error
    if not isinstance(found, tuple) or len(found) not in (2, 3):
        raise CaptureError(
            f"{text}() returned a {type(found).__name__}: it must return (module, example_inputs) or "
            "(module, example_inputs, dynamic_shapes)."
        )
    return Located(*found)


def locate_data(text: str) -> object:
    """Return calibration data as `compile` takes it: a path, or what ``module:name`` names.

    Raises:
        CaptureError: the module or name does not exist.
    """
    return locate_attribute(text) if _names_attribute(text) else Path(text)


def _names_attribute(text: str) -> bool:
    path = Path(text)
    return ":" in text and not path.exists() and path.suffix not in (".onnx", ".npz") and "/" not in text


def locate_attribute(text: str) -> object:
    """Return the object that ``package.module:name`` names; the current folder is on ``sys.path``.

    Raises:
        CaptureError: the module cannot be imported, or has no such name.
    """
    module_name, _, name = text.rpartition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        reason = f"there is no module '{error.name}' in {here} or among the installed packages"
        raise CaptureError(f"cannot import '{module_name}' of '{text}': {reason}.") from error
    except Exception as error:
        raise CaptureError(f"importing '{module_name}' raised {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        known = [word for word in vars(module) if not word.startswith("_")]
        raise CaptureError(f"module '{module_name}' has no '{name}'.{did_you_mean(name, known)}")
    return getattr(module, name)
