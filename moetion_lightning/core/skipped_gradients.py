"""Backward passes that leave out the weight gradients of chosen parameters; the forward is that of any other iteration.

``requires_grad`` is not touched: kernels are chosen by it (``torch.matmul`` folds or does not, attention takes its fast
path), compiled code is specialized to it, and reentrant checkpointing gives no gradients at all where no input has it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

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

    def _wanted(self, roots: Sequence[Any]) -> list[Tensor] | None:
        """Leaves below the roots whose gradients are wanted; None: all."""
        above: dict[Any, list[Any]] = {}
        open_nodes: list[Any] = [
            root.grad_fn for root in roots if isinstance(root, Tensor) and root.grad_fn is not None
        ]
        above.update((node, []) for node in open_nodes)
        leaves: dict[Any, Tensor] = {}
        custom: list[Any] = []
        while open_nodes:
            node: Any = open_nodes.pop()
            if isinstance(node, BackwardCFunction):
                if "Checkpoint" in type(node).__name__:
                    return None
                custom.append(node)
            if hasattr(node, "variable"):
                leaves[node] = node.variable
            for below, _ in node.next_functions:
                if below is not None and below not in above:
                    above[below] = []
                    open_nodes.append(below)
                if below is not None:
                    above[below].append(node)
        wanted = {node: leaf for node, leaf in leaves.items() if id(leaf) not in self._skipped}
        runs, open_nodes = set(wanted), list(wanted)
        while open_nodes:
            new = set(above[open_nodes.pop()]) - runs
            runs |= new
            open_nodes += new
        return list(wanted.values()) if wanted and runs.issuperset(custom) else None
