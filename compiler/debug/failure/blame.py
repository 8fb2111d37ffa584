# SPDX-License-Identifier: Apache-2.0
"""Which layer a failure comes from: found afterwards, so that work that succeeds pays nothing for it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

import onnx_ir as ir

from splitfold.compiler.build import Job
from splitfold.compiler.checkpoint import Checkpoint
from splitfold.compiler.debug.failure.changes import Changes, find_changes
from splitfold.compiler.debug.failure.first_difference import first_difference, first_non_finite
from splitfold.compiler.debug.failure.mentions import mentioned_node, node_of_exception
from splitfold.passes.errors import Failure, FailureError
from splitfold.passes.identity import display_layer, layers_of, name_layers
from splitfold.passes.submodel import node_model
from splitfold.runtime.errors import SessionError
from splitfold.runtime.feeds import Feeds
from splitfold.runtime.model_file import weight_bytes
from splitfold.runtime.session import Optimization, Session
from splitfold.runtime.target import Target

__all__ = ["first_failing_node", "name_layer"]

logger = logging.getLogger(__name__)

_DRIFT_BELOW = 1_000_000_000
"""Bytes of weights above which the errors of all layers take too long."""


def name_layer(error: FailureError, job: Job, checkpoint: Checkpoint) -> None:
    """Write into `error` the layer that it comes from, and how that was found, where it can be found.

    Args:
        error: what `build` raised.
        job: what it was asked to do.
        checkpoint: the model before and after the pass that failed.
    """
    if error.layer:
        return
    find = _FINDERS.get(error.kind)
    if find is None:
        return
    try:
        found = find(error, job, checkpoint)
    except Exception as failure:  # naming must not hide what is to be named
        logger.debug("no layer can be named: %s: %s", type(failure).__name__, failure)
        return
    if found is not None:
        error.layer, error.found = found


_Found = tuple[str, str] | None
"""A layer, and a sentence on how it was found."""


def _moved(error: FailureError, job: Job, checkpoint: Checkpoint) -> _Found:
    before, after = _both(checkpoint)
    if (node := _other_output(before, after)) is not None:
        return display_layer(node), ""
    changes = find_changes(before, after)
    difference = first_difference(before, after, job.source.feeds, job.target)
    if difference is None:
        return _first_changed(changes)
    node = difference.culprit(changes)
    layer = _layer_before(node, before)
    return layer, f"The first value that differs is '{difference.value}' ({node.op_type})."


def _other_output(before: ir.Model, after: ir.Model) -> ir.Node | None:
    """Return the node of the first output that only one of the two models has, where their counts differ."""
    was, now = ({value.name: value for value in model.graph.outputs} for model in (before, after))
    values = [value for name, value in {**was, **now}.items() if (name in was) != (name in now)]
    nodes = [node for value in values if (node := value.producer()) is not None]
    return nodes[0] if nodes and len(was) != len(now) else None


def _untrue(error: FailureError, job: Job, checkpoint: Checkpoint) -> _Found:
    before, after = _both(checkpoint)
    changes = find_changes(before, after)
    layers = list(dict.fromkeys(_layer_before(node, before) for node in changes.all))
    if not layers:
        return None
    more = f", and {len(layers) - 3} more" if len(layers) > 3 else ""
    return layers[0], f"Changed: {', '.join(layers[:3])}{more}."


def _stopped(error: FailureError, job: Job, checkpoint: Checkpoint) -> _Found:
    before, after = _both(checkpoint)
    failing = mentioned_node(after, error.message)
    if failing is None:
        failing = first_failing_node(after, job.source.feeds, job.target)
    if failing is None:
        return _first_changed(find_changes(before, after))
    node = _nearest_changed(failing, find_changes(before, after))
    where = f"The node that fails is {failing.name or failing.op_type} ({failing.op_type})"
    return _layer_before(node, before), f"{where} of layer {_layer_before(failing, before)}."


def _invalid(error: FailureError, job: Job, checkpoint: Checkpoint) -> _Found:
    before, after = _both(checkpoint)
    changes = find_changes(before, after)
    node = mentioned_node(after, error.message)
    if node is None:
        return _first_changed(changes)
    return _layer_before(_nearest_changed(node, changes), before), ""


def _raised(error: FailureError, job: Job, checkpoint: Checkpoint) -> _Found:
    model = checkpoint.after
    node = None if model is None else mentioned_node(model, error.message)
    if node is None and error.__cause__ is not None:
        node = node_of_exception(error.__cause__)
    return (display_layer(node), "") if node is not None and layers_of(node) else None


def _non_finite(error: FailureError, job: Job, checkpoint: Checkpoint) -> _Found:
    at_end = checkpoint.step is None or error.culprit != str(checkpoint.step)
    before = None if at_end else checkpoint.before
    if checkpoint.after is None:
        return None
    found = first_non_finite(before, checkpoint.after, job.source.feeds, job.target)
    if found is None:
        return None
    name, node = found
    layer = display_layer(node)
    return layer, f"The first value that does is '{name}' of layer {layer} ({node.op_type})."


def _original(error: FailureError, job: Job, checkpoint: Checkpoint) -> _Found:
    model = job.source.model.clone()
    name_layers(model)
    node = mentioned_node(model, error.message) or first_failing_node(model, job.source.feeds, job.target)
    return (display_layer(node), "") if node is not None else None


def _out_of_tolerance(error: FailureError, job: Job, checkpoint: Checkpoint) -> _Found:
    from splitfold.compiler.debug.drift.measurement import drift  # needs the front end, which needs this

    if checkpoint.after is None or weight_bytes(job.source.model) > _DRIFT_BELOW:
        return None
    found = drift(job.source.model, checkpoint.after, [job.source.feeds], target=job.target)
    sources = found.sources()
    if not sources or sources[0].local is None:
        return None
    worst = sources[0]
    return worst.layer, f"The layer that adds the most error is {worst.layer} (alone: {worst.local})."


_FINDERS: dict[Failure, Callable[[FailureError, Job, Checkpoint], _Found]] = {
    Failure.MOVED: _moved,
    Failure.UNTRUE: _untrue,
    Failure.STOPPED: _stopped,
    Failure.NOT_DEPLOYED: _stopped,
    Failure.INVALID: _invalid,
    Failure.RAISED: _raised,
    Failure.NON_FINITE: _non_finite,
    Failure.ORIGINAL: _original,
    Failure.TOLERANCE: _out_of_tolerance,
}


def _both(checkpoint: Checkpoint) -> tuple[ir.Model, ir.Model]:
    if checkpoint.before is None or checkpoint.after is None:
        raise ValueError("no pass has run")
    return checkpoint.before, checkpoint.after


def _layer_before(node: ir.Node, before: ir.Model) -> str:
    """Return the layer that the node of this name had before the pass, which may have lost it, else that of
    `node`."""
    known = (old for old in before.graph.all_nodes() if node.name and old.name == node.name)
    return display_layer(next((old for old in known if layers_of(old)), node))


def _first_changed(changes: Changes) -> _Found:
    return (display_layer(changes.all[0]), "") if changes.all else None


def _nearest_changed(node: ir.Node, changes: Changes) -> ir.Node:
    """Return the changed node nearest to `node`, itself included, against the flow of data; else `node`.

    A node that is merely rewired leads to the one that was dropped before it.
    """
    made, rewired = set(changes.made), set(changes.rewired)
    pending, seen = deque([node]), {node}
    while pending:
        here = pending.popleft()
        if here in made:
            return here
        if here in rewired:
            return changes.lost_before(here) or here
        new = [other for other in here.predecessors() if other not in seen]
        seen.update(new)
        pending.extend(new)
    return node


def first_failing_node(model: ir.Model, feeds: Feeds, target: Target) -> ir.Node | None:
    """Return the first node of the main graph, in order, with which `model` does not run; None where it runs.

    A binary search over the beginnings of the model.
    """
    nodes = list(model.graph)
    if not nodes or _runs(model, nodes, feeds, target):
        return None
    good, bad = 0, len(nodes)
    while bad - good > 1:
        middle = (good + bad) // 2
        if _runs(model, nodes[:middle], feeds, target):
            good = middle
        else:
            bad = middle
    return nodes[bad - 1]


def _runs(model: ir.Model, nodes: list[ir.Node], feeds: Feeds, target: Target) -> bool:
    part = node_model(model, nodes)
    names = {value.name for value in part.graph.inputs}
    try:
        session = Session(part, target, optimization=Optimization.OFF)
        session.run({name: array for name, array in feeds.items() if name in names})
    except SessionError:
        return False
    return True
