# SPDX-License-Identifier: Apache-2.0
"""A traced module that trains: the user's names of weights, and dropouts that can be switched."""

from __future__ import annotations

import operator
from typing import TypeAlias

import torch.fx
from torch import Tensor, nn

from splitfold.compiler.traced.program import Program, training_argument

__all__ = ["Module", "TracedModule", "put", "trainable"]

Module: TypeAlias = nn.Module
TracedModule: TypeAlias = torch.fx.GraphModule
_FLAG = "while_training"


class WhileTraining(nn.Module):
    """Tells whether the module trains."""

    def forward(self) -> bool:
        """Return it."""
        return self.training


def trainable(program: Program) -> torch.fx.GraphModule:
    """Return a program as a module in training mode; its weights are those of the program.

    It takes the inputs of the user's module and has all of its parameters and buffers under their names.
    """
    whole = program.exported.module(check_guards=False)
    whole.add_module(_FLAG, WhileTraining())
    graph = whole.graph
    first = next(node for node in graph.nodes if node.op not in ("get_attr", "placeholder"))
    with graph.inserting_before(first):
        flag = graph.call_module(_FLAG)
    for node in list(graph.nodes):
        found = training_argument(node)
        if found is None:
            continue
        at, value = found
        if isinstance(value, bool):
            node.update_arg(at, flag)
        elif value:
            with graph.inserting_before(node):
                node.update_arg(at, graph.call_function(operator.mul, (flag, value)))
    if not flag.users:
        graph.erase_node(flag)
    made = torch.fx.GraphModule(whole, graph, type(program.module).__name__)
    for name, parameter in program.module.named_parameters(remove_duplicate=False):
        put(made, name, parameter)
    kept = set(program.module.state_dict())
    buffers = {**dict(made.named_buffers()), **dict(program.module.named_buffers(remove_duplicate=False))}
    for name, buffer in buffers.items():  # constants of the trace are no state
        put(made, name, buffer, persistent=name in kept)
    return made


def put(root: nn.Module, name: str, tensor: Tensor, *, persistent: bool = True) -> None:
    """Let `root` hold a parameter or buffer under a dotted name; what has the name gives way."""
    *path, last = name.split(".")
    place = root
    for part in path:
        if not hasattr(place, part):
            place.add_module(part, nn.Module())
        place = getattr(place, part)
    if hasattr(place, last):
        delattr(place, last)
    if isinstance(tensor, nn.Parameter):
        place.register_parameter(last, tensor)
    else:
        place.register_buffer(last, tensor, persistent=persistent)
