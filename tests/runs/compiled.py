"""Modules with a compiled part, in a file of their own: compiled functions are looked for in the whole source file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.runs.models import Automatic

_compiled_loss: Any = None


def _loss(body: nn.Module, tokens: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(body(tokens).float(), target)


class CompiledMethod(Automatic):
    """A bound method, compiled by the module itself and kept where ``nn.Module`` does not look."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        object.__setattr__(self, "_fast", torch.compile(self._plain, backend=spec["compile"]))

    def _plain(self, tokens: Tensor, target: Tensor) -> Tensor:
        return _loss(self.body, tokens, target)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self._fast(batch["tokens"], batch["target"])


class CompiledFunction(Automatic):
    """A function of this file."""

    def __init__(self, spec: dict[str, Any]) -> None:
        global _compiled_loss
        super().__init__(spec)
        _compiled_loss = torch.compile(_loss, backend=spec["compile"])

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return _compiled_loss(self.body, batch["tokens"], batch["target"])


MODULES: dict[str, type[Automatic]] = {"compiled_method": CompiledMethod, "compiled_function": CompiledFunction}
