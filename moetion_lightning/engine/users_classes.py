"""Whose attributes are whose: a library's own flags and caches belong to one process, and are no state of training."""

from __future__ import annotations

import dis
import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, Sampler

__all__ = ["NOT_FOLLOWED", "UsersClasses", "is_framework"]

#: Their state is captured otherwise, or is no state of training.
NOT_FOLLOWED = (
    *(nn.Module, Optimizer, LRScheduler, Dataset, DataLoader, Sampler, torch.Generator, np.random.Generator),
    *(type, types.ModuleType, types.FunctionType, types.MethodType, Iterator),
)
_FRAMEWORKS = frozenset(
    (
        *("torch", "lightning", "pytorch_lightning", "lightning_fabric", "moetion_lightning", "torchmetrics"),
        *("transformers", "accelerate", "peft", "trl", "diffusers", "timm", "torchvision", "torchaudio", "torchao"),
        *("deepspeed", "bitsandbytes", "xformers", "flash_attn", "builtins", "abc", "typing"),
    )
)
#: Of torch: their own attributes say what they are, and do not change; what users add to them is watched.
_STRUCTURAL = frozenset(
    (
        *(nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.Identity),
        *(nn.GELU, nn.SiLU, nn.ReLU, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    )
)
_LIBRARY_FOLDERS = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))
_BASE_ATTRIBUTES = frozenset(vars(nn.Module()))
_STORE_ATTR = dis.opmap["STORE_ATTR"]


def is_framework(kind: type | types.FunctionType) -> bool:
    """Whether a class is of a framework that says itself, by ``state_dict``, what the state of its objects is."""
    return _root(kind) in _FRAMEWORKS


def _root(kind: type | types.FunctionType) -> str:
    return kind.__module__.split(".")[0]


class UsersClasses:
    """Tells which classes, and which attributes of their objects, are the user's.

    Args:
        roots: The user's own objects: what comes from their packages is the user's, wherever it is installed.
    """

    def __init__(self, roots: Iterable[object]) -> None:
        self._packages = {_root(type(root)) for root in roots} - _FRAMEWORKS
        self._owned: dict[type, bool] = {}
        self._left_out: dict[type, frozenset[str]] = {}
        self._rules: dict[type, tuple[bool, frozenset[str] | None]] = {}

    def owns(self, kind: type) -> bool:
        """Whether a class is the user's: neither of the standard library nor of another installed package."""
        if kind not in self._owned:
            file = getattr(sys.modules.get(kind.__module__), "__file__", None)
            installed = file is None or file.startswith(_LIBRARY_FOLDERS)
            own = _root(kind) in self._packages or kind.__module__ == "__main__" or not installed
            self._owned[kind] = own and _root(kind) not in _FRAMEWORKS
        return self._owned[kind]

    def is_object(self, value: object) -> bool:
        """Whether an object is stored by its attributes, and restored into the object that is there."""
        return hasattr(value, "__dict__") and not isinstance(value, NOT_FOLLOWED) and self.owns(type(value))

    def left_out(self, kind: type) -> frozenset[str]:
        """Attributes that Lightning's and torch's base classes set themselves."""
        if kind not in self._left_out:
            names = {"training", "log", "log_dict"}
            for base in kind.__mro__:
                lightning = _root(base) in ("lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics")
                if base is nn.Module or kind in _STRUCTURAL or lightning:
                    names.update(_assigned(base))
            if issubclass(kind, nn.Module):
                names |= _BASE_ATTRIBUTES
            self._left_out[kind] = frozenset(names - {"_hparams"})  # hyper-parameters are the user's
        return self._left_out[kind]

    def allows(self, kind: type, name: str, value: object) -> bool:
        """Whether an attribute may be state.

        A library keeps flags and caches of this process in its modules: of them, public numbers are taken only, which
        users set in their course. Of a user's class that derives from one, private names are taken that the user's
        own code sets.
        """
        if kind not in self._rules:
            others = [base for base in kind.__mro__ if base not in (object, nn.Module) and not self.owns(base)]
            foreign = any(_root(base) not in ("lightning", "pytorch_lightning", "abc", "typing") for base in others)
            own = {name for base in kind.__mro__ if self.owns(base) for name in _assigned(base)}
            self._rules[kind] = (self.owns(kind), frozenset(own) if foreign else None)
        owned, private = self._rules[kind]
        if not owned:
            return type(value) in (int, float) and not name.startswith("_")
        return private is None or not name.startswith("_") or name in private


def _assigned(kind: type) -> Iterator[str]:
    for member in vars(kind).values():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        for candidate in (function, getattr(member, "fset", None)):
            code = getattr(candidate, "__code__", None)
            if code is not None:
                yield from _names_stored(code)


def _names_stored(code: types.CodeType) -> Iterator[str]:
    """What :func:`dis.get_instructions` would find, in a fraction of its time: a model has thousands of methods."""
    operations, arguments = code.co_code[::2], code.co_code[1::2]
    at = operations.find(_STORE_ATTR)
    while at >= 0:
        index, shift, before = arguments[at], 8, at - 1
        while before >= 0 and operations[before] == dis.EXTENDED_ARG:
            index |= arguments[before] << shift
            shift, before = shift + 8, before - 1
        yield code.co_names[index]
        at = operations.find(_STORE_ATTR, at + 1)
