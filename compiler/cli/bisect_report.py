# SPDX-License-Identifier: Apache-2.0
"""What ``splitfold bisect`` prints."""

from __future__ import annotations

from splitfold.compiler.cli.output import say, table
from splitfold.compiler.debug.bisect.bisection import Bisection, Culprit
from splitfold.compiler.debug.bisect.judge import Verdict

__all__ = ["print_bisection"]


def print_bisection(found: Bisection, limit: int) -> None:
    """Print stages, culprits, the number of evaluations, and the pipeline that works."""
    say("original", found.reference.text)
    rows = [(text, *_cells(verdict)) for text, verdict in found.stages]
    table(("after the pass", "result", ""), rows)
    for culprit in found.culprits:
        _print_culprit(culprit)
    again = f" ({found.cached} more were of models met before)" if found.cached else ""
    say("evaluations", f"{found.evaluations} of at most {limit}{again}")
    _print_result(found, limit)


def _cells(verdict: Verdict | None) -> tuple[str, str]:
    return ("-", "") if verdict is None else (verdict.text, "ok" if verdict.ok else "broken")


def _print_culprit(culprit: Culprit) -> None:
    say("culprit", culprit.step)
    if culprit.after is None:
        say("", f"it fails: {culprit.error}")
    else:
        say("", f"{culprit.before} before it, {culprit.after} after it")
    if culprit.layers:
        rows = [(item.layer, *map(_text, (item.alone, item.taken))) for item in culprit.layers]
        table(("culprit layer", "it alone excluded", "it alone of these not excluded"), rows)
        return
    say("", f"not narrowed down to layers: {culprit.reason}")
    if culprit.applied:
        say("", f"it was applied to {_listed(culprit.applied)}")
    if culprit.suspects:
        say("", f"most of the error arises in {', '.join(culprit.suspects)}")


def _text(verdict: Verdict | None) -> str:
    return "-" if verdict is None else str(verdict)


def _listed(layers: tuple[str, ...]) -> str:
    more = f" and {len(layers) - 5} more" if len(layers) > 5 else ""
    return ", ".join(layers[:5]) + more


def _print_result(found: Bisection, limit: int) -> None:
    if found.exhausted:
        say("limit", f"the limit of {limit} evaluations ended the search: raise --limit.")
    if found.pipeline is None or found.verdict is None:
        say("works", "no pipeline was found that meets the limit")
        return
    if found.exhausted:
        say("", "this is the best known: fewer layers or passes left out may be enough")
    for step in found.left_out:
        say("left out", step)
    say("works", found.pipeline)
    say("", found.verdict.text)
