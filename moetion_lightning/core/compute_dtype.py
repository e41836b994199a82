"""Which parameters the forward and backward consume in reduced precision only: observed, not assumed.

A float32 parameter that autocast turns into bfloat16 in every use can be captured as bfloat16 while it is frozen: the
restored float32 value casts back to the very same bfloat16. A parameter that any operation reads as it is (norms,
embeddings, many routers, a weight-averaging callback) must be captured in full.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["ComputeDtypeObserver", "runs_compiled"]

_CASTS = (torch.float16, torch.bfloat16)
_CAST_OPS = (torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype)


class ComputeDtypeObserver:
    """Watches every operator call while it is active and notes how each parameter's storage is read.

    Use :meth:`start` before the first training forward, :meth:`pause`/:meth:`resume` around the optimizer's step (which
    reads and writes the master weights and says nothing about the forward) and :meth:`stop` when the iteration ends.

    Args:
        parameters: Parameters by name. Only floating-point parameters wider than 16 bits are watched.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._names: dict[int, str] = {}
        shared: set[int] = set()
        for name, parameter in parameters.items():
            if parameter.is_floating_point() and parameter.element_size() > 2 and parameter.numel():
                storage = parameter.untyped_storage().data_ptr()
                if storage in self._names:
                    shared.add(storage)
                self._names[storage] = name
        for storage in shared:  # parameters that are views of one buffer cannot be told apart: capture them in full
            del self._names[storage]
        self._casts: dict[str, set[torch.dtype]] = {}
        self._full: set[str] = set()
        self._mode: _ObserverMode | None = None
        self.paused = False

    @property
    def active(self) -> bool:
        """Whether calls are being watched."""
        return self._mode is not None

    def start(self) -> None:
        """Begin to watch the calling thread."""
        if self._mode is None and self._names:
            self._mode = _ObserverMode(self)
            self._mode.__enter__()  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        """Stop watching."""
        if self._mode is not None:
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._mode = None

    def pause(self) -> None:
        """Ignore calls until :meth:`resume`."""
        self.paused = True

    def resume(self) -> None:
        """Listen again after :meth:`pause`."""
        self.paused = False

    def unseen(self) -> list[str]:
        """Watched parameters that no operation has read yet."""
        return [n for n in self._names.values() if n not in self._casts and n not in self._full]

    def result(self) -> dict[str, torch.dtype]:
        """Compute dtype of the parameters that are only ever cast to one 16-bit dtype."""
        return {n: next(iter(d)) for n, d in self._casts.items() if n not in self._full and len(d) == 1}

    def violations(self, assumed: Mapping[str, torch.dtype]) -> list[str]:
        """Parameters that were read in another precision than assumed."""
        return sorted(n for n, d in assumed.items() if n in self._full or self._casts.get(n, {d}) != {d})

    def note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record one operator call."""
        for tensor in _tensors((args, kwargs)):
            try:
                name = self._names.get(tensor.untyped_storage().data_ptr())
            except (RuntimeError, NotImplementedError):  # fake or sparse tensors have no storage
                continue
            if name is None:
                continue
            dtype = kwargs.get("dtype") if func in _CAST_OPS else None
            if dtype is None and func is torch.ops.aten.to.dtype and len(args) > 1:
                dtype = args[1]
            if dtype in _CASTS and func in _CAST_OPS:
                self._casts.setdefault(name, set()).add(dtype)
            elif not _is_view(func):
                self._full.add(name)


class _ObserverMode(TorchDispatchMode):
    def __init__(self, observer: ComputeDtypeObserver) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._observer = observer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._observer.paused:
            self._observer.note(func, args, kwargs)
        return func(*args, **kwargs)


def runs_compiled(module: nn.Module) -> bool:
    """Whether any part of the module is compiled: as a module, as a method, or as a function of its source file.

    Under observation, compiled functions would run eagerly, and round differently.
    """
    files = set()
    for part in module.modules():
        if getattr(part, "_compiled_call_impl", None) is not None or type(part).__name__ == "OptimizedModule":
            return True
        owners = [vars(part), *(vars(c) for c in type(part).__mro__ if not c.__module__.startswith(_LIBRARIES))]
        if any(_is_compiled(value) for owner in owners for value in list(owner.values())):
            return True
        files.add(type(part).__module__)
    loaded = [vars(sys.modules[f]) for f in files if f in sys.modules and not f.startswith(_LIBRARIES)]
    return any(_is_compiled(value) for names in loaded for value in list(names.values()))


_LIBRARIES = ("torch.", "lightning.", "pytorch_lightning.", "transformers.", "builtins")


def _is_compiled(value: Any) -> bool:
    return callable(value) and hasattr(value, "_torchdynamo_orig_callable")


def _is_view(func: Any) -> bool:
    """Views and detach read no values. An op that writes to its alias is no view."""
    if func is torch.ops.aten.detach.default:
        return True
    schema = func._schema
    returns = [r.alias_info for r in schema.returns]
    return bool(returns) and all(info is not None and not info.is_write for info in returns)


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, (list, tuple)):
        return [t for item in tree for t in _tensors(item)]
    if isinstance(tree, dict):
        return [t for item in tree.values() for t in _tensors(item)]
    return []
