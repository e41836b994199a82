"""How the JSON and the tensors of a stored tree become values again."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

from moetion_lightning.core.kept_values import Kept
from moetion_lightning.errors import UnsupportedStateError
from moetion_lightning.storage import leaves
from moetion_lightning.storage.format import tensor_bytes

__all__ = ["Resolve", "TreeLoader"]

Resolve = Callable[[Any], object]
"""Gives back the value for what a writer's ``leaf`` stored."""


class TreeLoader:
    """Builds what one file holds.

    Args:
        views: the file's tensors by name.
        resolve: gives back what the writer's ``leaf`` replaced.
    """

    def __init__(self, views: dict[str, torch.Tensor], resolve: Resolve | None) -> None:
        self._views = views
        self._resolve = resolve
        self._numbered: list[Any] = []
        self._tensors: dict[str, torch.Tensor] = {}

    def decode(self, node: Any) -> Any:
        """The value behind a node. Raises the builtin errors of malformed input."""
        if isinstance(node, list):
            return self._extend(self._known([]), node)
        if not isinstance(node, dict):
            return node
        ((tag, body),) = node.items()
        if tag == "d":
            made = self._known({})
            for key, item in body.items():
                made[key] = self.decode(item)
            return made
        if tag == "plain":
            return self._known(body)
        if tag == "apart":
            return self._known(TreeLoader(self._views, None).decode(body))
        if tag in leaves.MAPPINGS:
            made = self._known(leaves.MAPPINGS[tag]())
            for key_node, item in body:
                key = self.decode(key_node)  # containers are numbered in this order
                made[key] = self.decode(item)
            return made
        if tag == "set":
            made = self._known(set())
            made.update([self.decode(item) for item in body])
            return made
        if tag in leaves.SEQUENCES:
            return leaves.SEQUENCES[tag](self.decode(item) for item in body)
        if tag == "deque":
            return self._extend(self._known(leaves.deque(maxlen=body[0])), body[1])
        if tag == "same":
            return self._numbered[body]
        if tag == "live":
            return {o: {n: self.decode(v) for n, v in values.items()} for o, values in body.items()}
        if tag == "kept":
            return self._kept(*body)
        if tag == "floats":
            return self._known(self._tensor(body["t"]).tolist())
        if tag == "tensors":
            return self._known([tensor.clone() for tensor in self._tensor(body["t"]).unbind()])
        if tag == "x":
            if self._resolve is None:
                raise UnsupportedStateError(f"The tree refers to {str(body)[:200]}; give load_tree a resolve function.")
            return self._resolve(body)
        return leaves.decode_leaf(tag, body, self._tensor)

    def _known(self, made: Any) -> Any:
        self._numbered.append(made)
        return made

    def _extend(self, made: Any, nodes: list[Any]) -> Any:
        for node in nodes:
            made.append(self.decode(node))
        return made

    def _kept(self, kind: str, name: str, items: Any, attributes: Any) -> Kept:
        if kind == "reference":
            return Kept(kind, name, items)
        if kind in ("enum", "flag", "tensor"):
            return Kept(kind, name, self.decode(items))
        made = Kept(kind, name)
        if kind != "namedtuple":
            self._known(made)
        if kind == "dict":
            made.items = [(self.decode(key), self.decode(item)) for key, item in items]
        elif items is not None:
            made.items = [self.decode(item) for item in items]
        if attributes is not None:
            made.attributes = {n: self.decode(item) for n, item in attributes.items()}
        return made

    def _tensor(self, body: Any) -> torch.Tensor:
        key = json.dumps(body)
        if key not in self._tensors:
            self._tensors[key] = leaves.decode_tensor(body, self._stored)
        return self._tensors[key]

    def _stored(self, index: int) -> torch.Tensor:
        # Clones: the views share one allocation with the file, which must not stay alive for one small tensor.
        key = f"stored {index}"
        if key not in self._tensors:
            source = self._views[f"t{index}"]
            self._tensors[key] = tensor_bytes(source).clone().view(source.dtype).view(source.shape)
        return self._tensors[key]
