# SPDX-License-Identifier: Apache-2.0
"""Where the class of a pass is imported from, so that another process finds it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from splitfold.passes.base import Pass
from splitfold.passes.pipeline import Pipeline
from splitfold.passes.table import PASSES
from splitfold.runtime.errors import ArtifactError

__all__ = ["PassClass", "foreign_classes", "hindrance"]

_INSTALLED = ("site-packages", "dist-packages")


@dataclass(frozen=True)
class PassClass:
    """A pass that is not splitfold's own.

    Attributes:
        module, name: where the class is; `name` is dotted for one inside another.
        folder: entry of ``sys.path`` that the module is found in; empty for an installed one.
    """

    module: str
    name: str
    folder: str

    @staticmethod
    def of(kind: type[Pass]) -> PassClass:
        """Return where `kind` is."""
        return PassClass(kind.__module__, kind.__qualname__, _search_folder(kind.__module__))

    def load(self) -> type[Pass]:
        """Import the class.

        Raises:
            ArtifactError: it is not there, or not a pass.
        """
        if self.folder and self.module not in sys.modules and self.folder not in sys.path:
            sys.path.insert(0, self.folder)
        try:
            found: object = importlib.import_module(self.module)
            for part in self.name.split("."):
                found = getattr(found, part)
        except Exception as error:
            raise ArtifactError(
                f"the pass {self.module}:{self.name} cannot be imported ({type(error).__name__}: {error}): "
                "put its module on PYTHONPATH."
            ) from error
        if not isinstance(found, type) or not issubclass(found, Pass):
            raise ArtifactError(f"{self.module}:{self.name} is not a pass.")
        return found


def foreign_classes(steps: Iterable[Pass]) -> list[type[Pass]]:
    """Return the classes of `steps` that the text form does not know by itself, each once."""
    return [kind for kind in dict.fromkeys(type(step) for step in steps) if kind not in PASSES]


def hindrance(steps: Pipeline) -> str:
    """Return why another process cannot make `steps` from their text; empty where it can."""
    kinds = foreign_classes(steps)
    for kind in kinds:
        if "<locals>" in kind.__qualname__:
            return f"the pass '{kind.name}' is defined inside a function: move its class out of it"
        if kind.__module__ == "__main__":
            return f"the pass '{kind.name}' is defined in the script that was run: move its class to a module"
        try:
            same = PassClass.of(kind).load() is kind
        except ArtifactError as error:
            return str(error)
        if not same:
            return f"{kind.__module__}:{kind.__qualname__} is another class than that of pass '{kind.name}'"
    try:
        if Pipeline.parse(str(steps), (*PASSES, *kinds)) == steps:
            return ""
    except Exception as error:
        return f"the text form '{steps}' cannot be read: {error}"
    return f"the text form '{steps}' does not say all about its passes"


def _search_folder(module: str) -> str:
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None or module.partition(".")[0] == "splitfold" or any(part in file for part in _INSTALLED):
        return ""
    path = Path(file).resolve()
    above = module.count(".") + (path.name == "__init__.py")
    return str(path.parents[above])
