# SPDX-License-Identifier: Apache-2.0
"""Which kernels of one or two models belong together: the finest groups that all of them tell apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir
from onnx_ir.passes import common

from splitfold.compiler.debug.profile.kernels import Kernel, match_kernels
from splitfold.passes.base import Findings
from splitfold.passes.canonicalize import name_all
from splitfold.passes.provenance import stands_for
from splitfold.passes.submodel import read_values
from splitfold.runtime.profile import Trace

__all__ = ["KernelGroup", "ProfiledModel", "group_kernels"]


class ProfiledModel:
    """A model with unique names, and the kernels that the runtime made of it.

    Attributes:
        model: what is run.
        kernels: of the runtime's optimised graph, once `add_times` was called.
        times: microseconds by kernel, in order of execution.
    """

    def __init__(self, model: ir.Model) -> None:
        self._named = model.clone()
        name_all(self._named, Findings())
        if model.functions:
            self.model = self._named  # the names inside a function would be the runtime's own
        else:
            self.model = model.clone()
            common.NameFixPass()(self.model)
        self.kernels: list[Kernel] = []
        self.times: dict[Kernel, float] = {}

    def add_times(self, found: Trace) -> None:
        """Match the kernels that ran with the model, and take their times; one that the graph does not show
        is kept, without layers."""
        self.kernels = match_kernels(self._named, found.graph)
        by_name = {kernel.node.name: kernel for kernel in self.kernels}
        for item in found.kernels:
            kernel = by_name.get(item.node) or Kernel(ir.node(item.operator, [], name=item.node))
            self.times[kernel] = item.microseconds

    def makers(self) -> dict[str, ir.Node]:
        """Return, by name of the original value, the node that computes it."""
        values = (value for graph in self._named.graphs() for node in graph for value in node.outputs)
        return {name: node for value in values if (name := stands_for(value)) and (node := value.producer())}


@dataclass
class KernelGroup:
    """Kernels that one row shows, by the position of their model."""

    kernels: dict[int, list[Kernel]] = field(default_factory=dict)

    def layers(self) -> tuple[str, ...]:
        """Return the layers by the names that the first model gives them; a kernel that computes nothing of
        the original has no say where others do."""
        for at in sorted(self.kernels):
            kernels = self.kernels[at]
            for chosen in ([kernel for kernel in kernels if kernel.values], kernels):
                if found := tuple(dict.fromkeys(name for kernel in chosen for name in kernel.layers)):
                    return found
        return ()


def group_kernels(models: Sequence[ProfiledModel]) -> dict[tuple[str, ...], KernelGroup]:
    """Return the timed kernels of `models` in groups, by the layers that they compute, in order of execution.

    Two kernels belong together where they compute the same original value; where two models have hardly a
    value in common, where they compute the same layer. What the runtime put in belongs to the kernel that
    reads it. Groups of the same layers are one.
    """
    keys = _keys(models)
    union = _Union()
    for model in models:
        for kernel in model.times:
            union.join(keys.get(kernel, ()))
    found: dict[str, KernelGroup] = {}
    for at, model in enumerate(models):
        owners = _owners(model.kernels, keys)
        for kernel in model.times:
            root = union.root(owners[kernel]) if kernel in owners else ""
            found.setdefault(root, KernelGroup()).kernels.setdefault(at, []).append(kernel)
    merged: dict[tuple[str, ...], KernelGroup] = {}
    for group in found.values():
        into = merged.setdefault(group.layers(), KernelGroup())
        for at, kernels in group.kernels.items():
            into.kernels.setdefault(at, []).extend(kernels)
    return merged


class _Union:
    """Union-find over names."""

    def __init__(self) -> None:
        self._parents: dict[str, str] = {}

    def root(self, key: str) -> str:
        while (parent := self._parents.setdefault(key, key)) != key:
            key = parent
        return key

    def join(self, keys: Sequence[str]) -> None:
        for key in keys[1:]:
            self._parents[self.root(key)] = self.root(keys[0])


def _keys(models: Sequence[ProfiledModel]) -> dict[Kernel, Sequence[str]]:
    """Return what each kernel computes, by original value or by layer."""
    values = [{kernel: sorted(kernel.values) for kernel in model.kernels} for model in models]
    if len(models) < 2:
        return dict(values[0])
    known = [set().union(*found.values()) for found in values]
    if len(known[0] & known[1]) * 2 < min(len(item) for item in known):
        return {kernel: kernel.layers for model in models for kernel in model.kernels}
    makers = [model.makers() for model in models]
    return {
        **_with_vanished(values[0], known[0], makers[1]),
        **_with_vanished(values[1], known[1], makers[0]),
    }


def _with_vanished(
    values: Mapping[Kernel, Sequence[str]], known: set[str], makers: Mapping[str, ir.Node]
) -> dict[Kernel, Sequence[str]]:
    """Return the values of each kernel with those that the other model computes on the way there and that are
    gone in this one: a MatMul that took its bias along also computes what was added to."""
    taken = set(known)
    return {kernel: [*names, *_vanished(names, taken, makers)] for kernel, names in values.items()}


def _vanished(names: Iterable[str], taken: set[str], makers: Mapping[str, ir.Node]) -> Iterator[str]:
    pending = [makers[name] for name in names if name in makers]
    while pending:
        for value in pending.pop().inputs:
            name = stands_for(value) if value is not None else None
            if name is not None and name in makers and name not in taken:
                taken.add(name)
                yield name
                pending.append(makers[name])


def _owners(kernels: Iterable[Kernel], keys: Mapping[Kernel, Sequence[str]]) -> dict[Kernel, str]:
    """Return a key for each kernel: its own, else that of the nearest kernel that reads it, else that of the
    nearest that it reads."""
    owners = {kernel: keys[kernel][0] for kernel in kernels if keys.get(kernel)}
    by_node = {kernel.node: kernel for kernel in kernels}
    for forward in (True, False):
        moved = True
        while moved:
            moved = False
            for kernel in [kernel for kernel in by_node.values() if kernel not in owners]:
                near = [by_node[node] for node in _neighbours(kernel.node, forward) if node in by_node]
                if found := next((owners[other] for other in near if other in owners), None):
                    owners[kernel], moved = found, True
    return owners


def _neighbours(node: ir.Node, forward: bool) -> Iterable[ir.Node]:
    if forward:
        return [use.node for value in node.outputs for use in value.uses()]
    return [made for value in read_values(node) if (made := value.producer()) is not None]
