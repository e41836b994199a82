"""Backward passes that leave out the weight gradients of chosen parameters; the forward is that of any other iteration.

``requires_grad`` is not touched: kernels are chosen by it (``torch.matmul`` folds or does not, attention takes its fast
path), compiled code is specialized to it, and reentrant checkpointing gives no gradients at all where no input has it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge

__all__ = ["SkippedGradients"]

# Private, but the only sign that a backward is called by another one.
_graph_task_id = getattr(torch._C, "_current_graph_task_id", None)


class SkippedGradients:
    """Tells torch, in each backward pass, for which leaves gradients are wanted: for all but the chosen ones.

    Calls of :func:`torch.autograd.grad`, and calls that say themselves what they want, stay as they are. Where leaving
    out is not possible or not safe, all gradients are computed: with reentrant checkpointing, which refuses it, and
    where a custom function would not run at all, whose backward may reach parameters that the graph does not show.
    """

    def __init__(self) -> None:
        self._skipped: frozenset[int] = frozenset()
        self._original: Any = None
        self._replacement: Any = None

    def choose(self, parameters: Iterable[Tensor]) -> None:
        """Skip the gradients of these, and of no others, from now on."""
        self._skipped = frozenset(map(id, parameters))
        if self._skipped:
            self._install()
        else:
            self._remove()

    def _install(self) -> None:
        if self._original is not None or _graph_task_id is None:
            return
        original = torch.autograd.backward

        @functools.wraps(original)
        def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
            if self._skipped and len(args) < 5 and kwargs.get("inputs") is None and _graph_task_id() == -1:
                kwargs["inputs"] = self._wanted([tensors] if isinstance(tensors, Tensor) else tensors)
            original(tensors, *args, **kwargs)

        self._original, self._replacement = original, backward
        torch.autograd.backward = backward

    def _remove(self) -> None:
        if self._original is not None and torch.autograd.backward is self._replacement:
            torch.autograd.backward = self._original
        self._original = self._replacement = None

    def _wanted(self, tensors: Iterable[Any]) -> list[Tensor] | None:
        """Leaves of the graphs of these whose gradients are wanted; None: all."""
        roots = [tensor for tensor in tensors if isinstance(tensor, Tensor) and tensor.requires_grad]
        open_nodes: list[Any] = [get_gradient_edge(root).node for root in roots]
        below: dict[Any, list[Any]] = {None: []}
        while open_nodes:
            node = open_nodes.pop()
            if node not in below:
                below[node] = nodes = [following for following, _ in node.next_functions]
                open_nodes += nodes
        leaves = {node: node.variable for node, nodes in below.items() if not nodes and hasattr(node, "variable")}
        wanted = {node: leaf for node, leaf in leaves.items() if id(leaf) not in self._skipped}
        custom = {node for node in below if isinstance(node, BackwardCFunction)}
        if not wanted or any("Checkpoint" in type(node).__name__ for node in custom):
            return None
        return list(wanted.values()) if not custom or custom <= _run_for(wanted, below) else None


def _run_for(leaves: Iterable[Any], below: Mapping[Any, Iterable[Any]]) -> set[Any]:
    """Nodes that run if the gradients of these leaves are wanted."""
    above: dict[Any, list[Any]] = {node: [] for node in below}
    for node, nodes in below.items():
        for following in nodes:
            above[following].append(node)
    found, open_nodes = set(leaves), list(leaves)
    while open_nodes:
        new = set(above[open_nodes.pop()]) - found
        found |= new
        open_nodes += new
    return found
