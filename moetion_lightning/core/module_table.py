"""Modules, parameters and buffers of a module by name, found once instead of at each look.

Walking tens of thousands of modules takes a tenth of a second; whether one came or went is seen much faster.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["ModuleTable", "joined_flags", "module_table", "split_flags"]


class ModuleTable:
    """Use :func:`module_table`.

    Args:
        module: The root.
    """

    def __init__(self, module: nn.Module) -> None:
        self._root = weakref.ref(module)
        #: Counts how often it was looked at what there is.
        self.generation = 0
        self._kept: dict[Callable[[Any], bool], list[tuple[str, nn.Module]]] = {}
        self._look()

    def _look(self) -> None:
        self.generation += 1
        root = self._root()
        assert root is not None  # whoever asks for its modules has it
        #: All modules, each once.
        self.modules: dict[str, nn.Module] = dict(root.named_modules())
        #: All parameters, each once, those of lazy modules too.
        self.parameters: dict[str, nn.Parameter] = dict(root.named_parameters())
        self._with_buffers = [(name, module) for name, module in self.modules.items() if module._buffers]
        self._marks = [(module, *_mark(module)) for module in self.modules.values()]
        self._kept.clear()

    def refresh(self) -> bool:
        """Look again if a module, a parameter or the name of a buffer came or went. Returns whether one did."""
        for module, children, parameters, buffers in self._marks:
            if (
                children != [*map(id, module._modules.values())]
                or parameters != [*map(id, module._parameters.values())]
                or buffers != [*module._buffers]
            ):
                self._look()
                return True
        return False

    def buffers(self) -> dict[str, Tensor]:
        """All buffers as they are now, each once; those of lazy modules are left out until they have values."""
        found: dict[str, Tensor] = {}
        seen: set[int] = set()
        for prefix, module in self._with_buffers:
            for name, buffer in module._buffers.items():
                if buffer is not None and id(buffer) not in seen and not is_lazy(buffer):
                    seen.add(id(buffer))
                    found[f"{prefix}.{name}" if prefix else name] = buffer
        return found

    def where(self, condition: Callable[[nn.Module], bool]) -> list[tuple[str, nn.Module]]:
        """Modules of which something holds that does not change while they are there; looked at once.

        Args:
            condition: Of a module; the same object at each call.
        """
        if condition not in self._kept:
            self._kept[condition] = [(name, module) for name, module in self.modules.items() if condition(module)]
        return self._kept[condition]


def _mark(module: nn.Module) -> tuple[list[int], list[int], list[str]]:
    return [*map(id, module._modules.values())], [*map(id, module._parameters.values())], [*module._buffers]


# A table refers to its module: whoever uses it keeps it, and with the last of them it goes.
_tables: weakref.WeakKeyDictionary[nn.Module, weakref.ref[ModuleTable]] = weakref.WeakKeyDictionary()


def module_table(module: nn.Module) -> ModuleTable:
    """The table of a module; all who have one at the same time share it."""
    known = _tables.get(module)
    found = None if known is None else known()
    if found is None:
        found = ModuleTable(module)
        _tables[module] = weakref.ref(found)
    return found


def split_flags(names: Iterable[str], flags: Iterable[bool]) -> dict[str, Any]:
    """Flags by name as one value and the names of those that differ, of which there are few."""
    flags = list(flags)
    count = sum(flags)
    most = 2 * count > len(flags)
    all_alike = count in (0, len(flags))
    others = [] if all_alike else [name for name, flag in zip(names, flags) if flag is not most]
    return {"most": most, "others": others}


def joined_flags(saved: dict[str, Any]) -> Callable[[str], bool]:
    """The flag of a name, from what :func:`split_flags` gave; a name that it did not know has that of most."""
    most, others = bool(saved["most"]), frozenset(saved["others"])
    return lambda name: most is not (name in others)
