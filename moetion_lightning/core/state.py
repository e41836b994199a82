"""Names for a live module's parameters and for what its optimizers keep of them."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from moetion_lightning.core.local import is_wrapper, local, local_rows
from moetion_lightning.core.operators import Operator
from moetion_lightning.core.optimizer_parts import attribute_tensors, inner_optimizers, parameter_tables
from moetion_lightning.errors import ConfigurationError, OperatorError, UnsupportedStateError

__all__ = ["LiveState", "state_of"]

#: Optimizers of torch whose update of an element depends on that element's gradient and state alone, so that rows of a
#: parameter may be captured at different iterations. Exact classes: a subclass may do anything in its ``step``.
ELEMENTWISE_OPTIMIZERS: frozenset[type] = frozenset(
    {
        torch.optim.Adadelta, torch.optim.Adagrad, torch.optim.Adam, torch.optim.Adamax, torch.optim.AdamW,
        torch.optim.ASGD, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop, torch.optim.Rprop, torch.optim.SGD,
    }
)  # fmt: skip

#: Third-party ones, by qualified name: they need not be installed.
ELEMENTWISE_NAMES = frozenset({"lion_pytorch.lion_pytorch.Lion", "timm.optim.lion.Lion", "torch_optimizer.lion.Lion"})

#: Further optimizers of torch whose ``step`` calls its closure before it changes anything.
CLOSURE_FIRST_OPTIMIZERS: frozenset[type] = frozenset(
    getattr(torch.optim, name) for name in ("Adafactor", "LBFGS", "Muon") if hasattr(torch.optim, name)
)

#: Kinds of devices that hold state which can be captured.
DEVICES = frozenset({"cpu", "cuda"})

_OPTIONAL_STATE_BYTES_PER_ELEMENT = 8  # estimate before an optimizer's first step: two float32 moments
_NOTHING: Mapping[Any, Any] = {}


class LiveState:
    """Names for the live parameters of a module and what its optimizers keep of them.

    Nothing is cached that training may replace: optimizer state is looked up at each use, because
    ``load_state_dict`` replaces its tensors. Of distributed tensors only the local shard is ever read or written.

    Optimizers that others hold in their attributes (``base_optimizer`` of a sharpness-aware one) are optimizers of the
    module, too: they follow those that were given. Parameters of lazy modules appear when they are initialised.

    Args:
        module: The module that trains.
        optimizers: Its optimizers (raw, not wrapped by a framework).
        elementwise: Qualified class names of further elementwise optimizers.
        held: Names of the parameters that this process holds; the others are placeholders, and no part of the state.
            None: all.

    Raises:
        OperatorError: An optimizer updates a parameter that is not the module's, or that this process does not hold.
        UnsupportedStateError: A parameter that trains has values that cannot be captured.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        elementwise: Iterable[str] = (),
        held: Container[str] | None = None,
    ) -> None:
        self.module = module
        self.optimizers: tuple[Optimizer, ...] = inner_optimizers(optimizers)
        self.parameters: dict[str, nn.Parameter] = {}
        #: The optimizers, by index, that update a parameter or keep something of it.
        self.owners: dict[str, tuple[int, ...]] = {}
        #: Why the state cannot be captured whole any more; "" if it can.
        self.problem = ""
        #: Counts the times that it was looked at what there is: names and owners may have changed.
        self.generation = 0
        self._held = held
        self._declared = frozenset(elementwise)
        self._elementwise_names = ELEMENTWISE_NAMES | self._declared
        #: Wrappers that show their inner optimizer's state as theirs.
        self.aliases: frozenset[int] = frozenset()
        self._tables: tuple[tuple[str, ...], ...] = ()
        self._structure: tuple[int, ...] = ()
        self._shared: dict[tuple[int, int], bool] = {}
        self._foreign: list[str] = []
        self._look()
        if self.problem:
            raise (OperatorError if self._foreign else UnsupportedStateError)(self.problem)

    def check_devices(self) -> None:
        """Refuse devices from which nothing can be copied.

        Raises:
            ConfigurationError: Names a parameter or buffer and its device.
        """
        for name, tensor in [*self.parameters.items(), *self.module.named_buffers()]:
            if tensor.device.type not in DEVICES and (self._held is None or name in self.parameters):
                raise ConfigurationError(
                    f"{name!r} is on the device {str(tensor.device)!r}: state can be captured from the CPU and from "
                    "CUDA only. Train on one of these (Trainer(accelerator='cpu') or 'gpu'), or without this package."
                )

    def names(self) -> set[str]:
        """Names of all parameters that this process holds, those of lazy modules too."""
        return {name for name, _ in self.module.named_parameters() if self._held is None or name in self._held}

    def refresh(self) -> None:
        """Look again at what there is: parameters and groups may come and go while training.

        Never raises: what cannot be captured is said by :attr:`problem`.
        """
        self._look()

    def _look(self) -> None:
        self.generation += 1
        named = [(n, p) for n, p in self.module.named_parameters() if self._held is None or n in self._held]
        self._structure = self._present()
        self._shared.clear()
        self.parameters = {name: parameter for name, parameter in named if not is_lazy(parameter)}
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        owners: dict[str, dict[int, None]] = {}
        self._foreign = []
        for index, optimizer in enumerate(self.optimizers):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    name = names.get(id(parameter))
                    if name is not None:
                        owners.setdefault(name, {})[index] = None
                    elif not is_lazy(parameter):
                        self._foreign.append(self._describe_foreign(index, parameter))
            for key in state_of(optimizer):  # of parameters that were taken out of its groups, and may come back
                if id(key) in names:
                    owners.setdefault(names[id(key)], {})[index] = None
        self.owners = {name: tuple(owners[name]) for name in self.parameters if name in owners}
        first: dict[int, int] = {}
        for index, optimizer in enumerate(self.optimizers):
            first.setdefault(id(state_of(optimizer)), index)
        self.aliases = frozenset(i for i, o in enumerate(self.optimizers) if first[id(state_of(o))] != i)
        self._tables = tuple(parameter_tables(optimizer, names) for optimizer in self.optimizers)
        self.problem = next(iter(self._foreign), "") or self._unreadable()

    def _present(self) -> tuple[int, ...]:
        return tuple(id(p) for p in self.module.parameters() if not is_lazy(p))

    def _unreadable(self) -> str:
        for name in self.trainable():
            weight = self.weight(name)
            if is_wrapper(weight) or weight.layout is not torch.strided or weight.is_quantized:
                return (
                    f"the parameter {name!r} trains and is a {type(weight).__name__} of layout {weight.layout}, dtype "
                    f"{weight.dtype}: weights that train are captured as plain dense tensors only. Freeze it, or train "
                    "without that tensor subclass."
                )
        if len(inner_optimizers(self.optimizers)) > len(self.optimizers):
            kinds = ", ".join(type(o).__name__ for o in inner_optimizers(self.optimizers)[len(self.optimizers) :])
            return (
                f"an optimizer ({kinds}) was made inside another one while training: a restart could not find it. Make "
                "it before training begins."
            )
        return ""

    def _describe_foreign(self, index: int, parameter: Tensor) -> str:
        optimizer = f"optimizer {index} ({type(self.optimizers[index]).__name__})"
        for name, other in self.module.named_parameters():
            if other is parameter:
                return (
                    f"{optimizer} updates the parameter {name!r}, which this rank does not hold. Take what other ranks "
                    "hold out of its parameter groups before training starts."
                )
        return (
            f"{optimizer} updates a parameter of shape {tuple(parameter.shape)} that is not a parameter of "
            f"{type(self.module).__name__}. Register the module that owns it as a submodule, so that its state can be "
            "captured."
        )

    def trainable(self) -> tuple[str, ...]:
        """Names of the parameters that an optimizer updates now, in the module's order."""
        return tuple(n for n, p in self.parameters.items() if n in self.owners and p.requires_grad)

    def signature(self) -> tuple[int, ...]:
        """Cheap identity of what trains: changes when parameters are added, frozen or unfrozen."""
        found: list[int] = []
        seen: set[int] = set()
        for index, optimizer in enumerate(self.optimizers):
            found.append(~index)
            for group in optimizer.param_groups:
                params = group["params"]
                if id(params) not in seen:  # inner optimizers share their groups
                    seen.add(id(params))
                    found.extend(id(p) for p in params if p.requires_grad)
        return tuple(found)

    def outdated(self) -> bool:
        """Whether parameters of the module, or tables of an optimizer or optimizers in it, came or went."""
        if self._present() != self._structure:
            return True
        if len(inner_optimizers(self.optimizers)) > len(self.optimizers):
            return True
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        return self._tables != tuple(parameter_tables(optimizer, names) for optimizer in self.optimizers)

    def calls_closure_first(self) -> tuple[bool, ...]:
        """For each optimizer, whether its ``step`` is known to call its closure before it changes anything."""
        return tuple(self._updates_elementwise(o) or type(o) in CLOSURE_FIRST_OPTIMIZERS for o in self.optimizers)

    def _updates_elementwise(self, optimizer: Optimizer) -> bool:
        kind = type(optimizer)
        return kind in ELEMENTWISE_OPTIMIZERS or f"{kind.__module__}.{kind.__qualname__}" in self._elementwise_names

    def declared_elementwise(self) -> list[str]:
        """Classes of optimizers in use that only the user says to be elementwise: a wrong word makes replays differ."""
        kinds = [type(optimizer) for optimizer in self.optimizers]
        named = [f"{kind.__module__}.{kind.__qualname__}" for kind in kinds if kind not in ELEMENTWISE_OPTIMIZERS]
        return sorted(set(named) & self._declared - ELEMENTWISE_NAMES)

    def couples_parameters(self) -> list[str]:
        """Names of optimizer classes whose update of one parameter depends on the state of others."""
        return [
            type(optimizer).__name__
            for optimizer in self.optimizers
            if isinstance(optimizer, torch.optim.LBFGS)
            or any(not isinstance(key, Tensor) for key in state_of(optimizer))
            or attribute_tensors(optimizer)
        ]

    def couples_shards(self) -> list[str]:
        """Names of optimizer classes that update a distributed parameter and are not known to work element by element.

        The shards of one parameter are then to be captured at the same iteration on all ranks.
        """
        found = {
            type(self.optimizers[index]).__name__
            for name, indices in self.owners.items()
            if hasattr(self.parameters[name], "to_local")
            for index in indices
            if not self._updates_elementwise(self.optimizers[index])
        }
        return sorted(found)

    def shares_parameters(self, first: int, second: int) -> bool:
        """Whether two optimizers have a parameter in common, and neither is made of the other."""
        if (first, second) not in self._shared:
            nested = any(
                self.optimizers[inner] is optimizer
                for outer, inner in ((first, second), (second, first))
                for optimizer in inner_optimizers([self.optimizers[outer]])
            )
            common = any(first in indices and second in indices for indices in self.owners.values())
            self._shared[first, second] = common and not nested
        return self._shared[first, second]

    def versions(self, operators: Iterable[Operator]) -> list[tuple[int, str]]:
        """Version counters of the operators' parameters: every in-place change counts, except through ``.data``.

        On the CPU a few elements are looked at, too: a change of the whole tensor through ``.data`` shows there.
        """
        names = dict.fromkeys(piece.parameter for op in operators for piece in op.pieces)
        shards = [self.weight(name) for name in names]
        return [(shard._version, _sample(shard)) for shard in shards]

    def weight(self, name: str) -> Tensor:
        """A parameter's values in this process, detached: all of it, or its local shard."""
        return local(self.parameters[name])

    def rows(self, name: str) -> int:
        """Size of dimension 0 in this process; 1 for 0-d parameters."""
        return local_rows(self.parameters[name])

    def is_elementwise(self, name: str) -> bool:
        """Whether rows of the parameter may be captured at different iterations."""
        parameter = self.parameters[name]
        return (
            all(self._updates_elementwise(self.optimizers[index]) for index in self.owners[name])
            and parameter.dim() > 0
            and all(_has_rows(state, parameter) for _, state in self.states(name))
        )

    def states(self, name: str) -> list[tuple[int, Any]]:
        """What optimizers keep of a parameter in their ``state``, each with the optimizer's index."""
        parameter = self.parameters[name]
        found = []
        for index in self.owners[name]:
            state = state_of(self.optimizers[index]).get(parameter)
            if state is not None and index not in self.aliases:
                found.append((index, state))
        return found

    def tables(self, name: str) -> list[tuple[int, str, Any]]:
        """What optimizers keep of a parameter in attributes that are tables by parameter: index, attribute, value."""
        if not any(self._tables):
            return []
        parameter = self.parameters[name]
        return [
            (index, attribute, vars(self.optimizers[index])[attribute][parameter])
            for index in self.owners[name]
            for attribute in self._tables[index]
            if parameter in vars(self.optimizers[index])[attribute]
        ]

    def table_names(self) -> tuple[tuple[str, ...], ...]:
        """For each optimizer, its attributes that are tables by parameter."""
        return self._tables

    def full_bytes(self, name: str) -> int:
        """Bytes of a parameter with its optimizers' state; before an optimizer's first step two moments are assumed."""
        parameter = self.weight(name)
        nbytes = parameter.numel() * parameter.element_size()
        for _, state in self.states(name):
            nbytes += _bytes_in(state)
        for index in self.owners[name]:
            if index not in self.aliases and not state_of(self.optimizers[index]):
                nbytes += parameter.numel() * _OPTIONAL_STATE_BYTES_PER_ELEMENT
        return nbytes + sum(_bytes_in(value) for _, _, value in self.tables(name))


def state_of(optimizer: Optimizer) -> Mapping[Any, Any]:
    """What an optimizer keeps in its ``state``; of what has none, nothing."""
    state: Any = getattr(optimizer, "state", None)
    return state if isinstance(state, Mapping) else _NOTHING


def _has_rows(value: object, parameter: Tensor) -> bool:
    """Whether a state consists of tensors laid out like the parameter and of values that belong to no element."""
    if isinstance(value, Tensor):
        plain = type(value) is Tensor or not is_wrapper(local(value))
        return value.dim() == 0 or (plain and value.layout is torch.strided and value.shape == parameter.shape)
    if isinstance(value, Mapping):
        return all(_has_rows(item, parameter) for item in value.values())
    if isinstance(value, (list, tuple)):
        return all(_has_rows(item, parameter) for item in value)
    return not hasattr(value, "__dict__")


def _bytes_in(value: object) -> int:
    if type(value) is Tensor and value.layout is torch.strided:
        return value.numel() * value.element_size()
    if isinstance(value, Tensor):
        value = local(value)
        if is_wrapper(value) and hasattr(value, "__tensor_flatten__"):
            return sum(_bytes_in(getattr(value, name)) for name in value.__tensor_flatten__()[0])
        if value.layout is torch.sparse_coo:
            return _bytes_in(value._indices()) + _bytes_in(value._values())
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(_bytes_in(item) for item in value.values())
    if isinstance(value, (list, tuple, set)):
        return sum(_bytes_in(item) for item in value)
    return 0


def _sample(parameter: Tensor) -> str:
    if parameter.device.type != "cpu" or not parameter.is_contiguous() or not parameter.numel():
        return ""
    flat = parameter.detach().view(-1)
    return repr(flat[:: max(1, flat.numel() // 4)].tolist())  # as text: nan equals nan
