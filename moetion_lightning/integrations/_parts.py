"""What a run consists of, out of the wrappers that frameworks put around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from moetion_lightning.core.generators import find_generators, is_generator
from moetion_lightning.core.optimizer_parts import is_optimizer
from moetion_lightning.data.own_state import is_stateful
from moetion_lightning.errors import ConfigurationError

__all__ = ["Parts", "unwrap_optimizer"]

_WRAPPERS = ("accelerate.", "lightning.", "lightning_fabric.")


@dataclass(kw_only=True)
class Parts:
    """The objects that are captured.

    Args:
        module: What the engine sees: the module, or all modules as children of one.
        wrappers: DDP wrappers by the prefix that their parameters have in ``module``.
        optimizers: Raw torch optimizers.
        stateful: Everything else with ``state_dict`` and ``load_state_dict`` (schedulers, scalers, the user's), by
            name.
        generators: Random number generators, and objects that hold some, by name.
        scales: Whether a gradient scaler may skip steps.
        compiled: Whether a wrapper compiles a module.
    """

    module: nn.Module
    wrappers: dict[str, DistributedDataParallel] = field(default_factory=dict)
    optimizers: list[Optimizer] = field(default_factory=list)
    stateful: dict[str, Any] = field(default_factory=dict)
    generators: dict[str, object] = field(default_factory=dict)
    scales: bool = False
    compiled: bool = False

    @classmethod
    def of(
        cls,
        modules: nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module],
        where: str,
        optimizers: Any = (),
        scheduler: Any = None,
        scaler: Any = None,
    ) -> Parts:
        """The modules without their wrappers, and what trains them.

        Args:
            modules: One module, or several.
            where: The user's call, for messages.
            optimizers: One optimizer, or several, wrapped or not.
            scheduler: Learning-rate scheduler, or several.
            scaler: Gradient scaler, or several.

        Raises:
            ConfigurationError: Something is no module, no optimizer, or cannot be saved.
        """
        parts = cls._of_modules(modules, where)
        for optimizer in _several(optimizers):
            raw = unwrap_optimizer(optimizer)
            if not is_optimizer(raw):
                raise ConfigurationError(
                    f"{where}: {type(optimizer).__name__} as optimizer; expected a torch.optim.Optimizer, or "
                    "what has its param_groups and step()"
                )
            if not any(raw is known for known in parts.optimizers):
                parts.optimizers.append(raw)
        parts.add_all("scheduler", scheduler, where)
        parts.add_all("scaler", scaler, where)
        parts.scales = any(s is not None and s.is_enabled() for s in _several(scaler))
        return parts

    @classmethod
    def _of_modules(cls, modules: nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module], where: str) -> Parts:
        if isinstance(modules, nn.Module) and not isinstance(modules, (nn.ModuleList, nn.ModuleDict)):
            parts = cls(module=modules)
            parts.module = parts._unwrap("", modules)
            return parts
        named: dict[str, Any]
        if isinstance(modules, (Mapping, nn.ModuleDict)):
            named = dict(modules.items())
        else:
            named = {str(index): module for index, module in enumerate(modules)}
        wrong = [name for name, module in named.items() if not isinstance(module, nn.Module)]
        if wrong or not named:
            given = f"{type(named[wrong[0]]).__name__} as module {wrong[0]!r}" if wrong else "no module"
            raise ConfigurationError(f"{where}: {given}; expected a torch.nn.Module, or a sequence or mapping of them")
        together = nn.Module()
        parts = cls(module=together)
        for name, module in named.items():
            together.add_module(name, parts._unwrap(f"{name}.", module))
        return parts

    def _unwrap(self, prefix: str, module: nn.Module) -> nn.Module:
        """The module inside the wrappers of Fabric, ``torch.compile`` and DDP."""
        while True:
            inner: Any = None
            if isinstance(module, DistributedDataParallel):
                self.wrappers[prefix], inner = module, module.module
            elif "_orig_mod" in module._modules:
                self.compiled, inner = True, module._modules["_orig_mod"]
            elif "_forward_module" in module._modules:  # Fabric's
                inner = module._modules["_forward_module"]
            if not isinstance(inner, nn.Module):
                return module
            module = inner

    def parameters(self) -> dict[str, nn.Parameter]:
        """By the names that the engine uses."""
        return dict(self.module.named_parameters())

    def replicated(self) -> frozenset[str]:
        """Names of the parameters that a DDP wrapper keeps equal on all ranks."""
        found = set()
        for prefix, ddp in self.wrappers.items():
            ignored = set(getattr(ddp, "parameters_to_ignore", ()))
            found |= {prefix + name for name, _ in ddp.module.named_parameters() if name not in ignored}
        return frozenset(found)

    def add(self, name: str, thing: Any, where: str) -> None:
        """Something with state of its own, or a random number generator."""
        if name in self.stateful or name in self.generators:
            raise ConfigurationError(f"{where}: {name!r} is registered already; choose another name")
        if is_stateful(thing):
            self.stateful[name] = thing
        elif is_generator(thing) or find_generators({name: thing}):
            self.generators[name] = thing
        else:
            raise ConfigurationError(
                f"{where}: {name}={type(thing).__name__}; expected an object with state_dict() and load_state_dict(), "
                "or a random number generator"
            )

    def add_all(self, kind: str, things: Any, where: str) -> None:
        """One thing, several, or None."""
        for index, thing in enumerate([] if things is None else _several(things)):
            self.add(f"{kind}{index}", thing, where)

    def schedulers(self) -> list[Any]:
        """Learning-rate schedulers."""
        return [thing for name, thing in self.stateful.items() if name.startswith("scheduler")]

    def shards(self) -> bool:
        """Whether parameters are distributed tensors."""
        return any(hasattr(parameter, "to_local") for parameter in self.module.parameters())


def _several(things: Any) -> Sequence[Any]:
    return things if isinstance(things, (list, tuple)) else [things]


def unwrap_optimizer(optimizer: Any) -> Any:
    """The torch optimizer inside those of Accelerate and Fabric."""
    while any(kind.__module__.startswith(_WRAPPERS) for kind in type(optimizer).__mro__):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None or inner is optimizer:
            break
        optimizer = inner
    return optimizer
