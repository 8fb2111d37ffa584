# SPDX-License-Identifier: Apache-2.0
"""The command line: ``splitfold``, also ``python -m splitfold.compiler``."""

from __future__ import annotations

from splitfold.compiler.cli.app import app

__all__ = ["main"]


def main() -> None:
    """Run the command line on ``sys.argv`` and exit with 0, 1 (the work failed) or 2 (a usage error)."""
    app(prog_name="splitfold")


if __name__ == "__main__":
    main()
