"""Names for a live module's parameters and for what its optimizers keep of them."""

from __future__ import annotations

import ctypes
import itertools
import json
import operator
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from moetion_lightning.core.local import is_wrapper, local, local_rows, place
from moetion_lightning.core.module_table import module_table
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

_LOOKED_AT = 32  # parameters of which values are compared in each iteration
_REQUIRES_GRAD = operator.attrgetter("requires_grad")
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
        self.table = module_table(module)
        self.table.refresh()
        self.optimizers: tuple[Optimizer, ...] = inner_optimizers(optimizers)
        #: How many of the optimizers were given; those behind them work inside these.
        self.num_given = len(optimizers)
        self.parameters: dict[str, nn.Parameter] = {}
        #: The optimizers, by index, that update a parameter or keep something of it.
        self.owners: dict[str, tuple[int, ...]] = {}
        #: Why the state cannot be captured whole any more; "" if it can.
        self.problem = ""
        #: Counts the times that it was looked at what there is: names and owners may have changed.
        self.generation = 0
        #: Counts how often something was found in another form than before: its size may have changed.
        self.forms = 0
        self._held = held
        #: Optimizers that the user says to be elementwise, by qualified name.
        self.declared = frozenset(elementwise)
        self._elementwise_names = ELEMENTWISE_NAMES | self.declared
        #: Wrappers that show their inner optimizer's state as theirs.
        self.aliases: frozenset[int] = frozenset()
        self._tables: tuple[tuple[str, ...], ...] = ()
        self._shared: dict[tuple[int, int], bool] = {}
        self._coupled: dict[int, tuple[Any, bool]] = {}
        self._watched: dict[int, tuple[Sequence[str], list[Tensor], list[str]]] = {}
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
        return {name for name in self.table.parameters if self._held is None or name in self._held}

    def refresh(self) -> None:
        """Look again at what there is: parameters and groups may come and go while training.

        Never raises: what cannot be captured is said by :attr:`problem`.
        """
        self._look()

    def _show_shards(self) -> None:
        """FSDP2 modules show whole weights in place of their shards behind a forward without a backward."""
        parts: list[tuple[str, Any]] = [*self.table.where(_is_sharded)]
        for _, part in parts:
            part.reshard()

    def _look(self) -> None:
        self.generation += 1
        self._show_shards()
        self.table.refresh()
        held = self._held
        named = [(n, p) for n, p in self.table.parameters.items() if held is None or n in held]
        self._lazy = any(is_lazy(parameter) for _, parameter in named)
        self._shared.clear()
        self._coupled.clear()
        self._watched.clear()
        self._coupled_shards: list[str] | None = None
        self.parameters = {name: parameter for name, parameter in named if not is_lazy(parameter)}
        #: Names of the parameters by ``id``.
        names = self.names_by_id = {id(parameter): name for name, parameter in self.parameters.items()}
        self._listed: dict[int, tuple[list[Any], str]] = {}
        self._places: dict[tuple[Any, ...], str] | None = None
        self._pointers: list[int] = []
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
        for name, other in self.table.parameters.items():
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
                    found += itertools.compress(map(id, params), map(_REQUIRES_GRAD, params))
        return tuple(found)

    def outdated(self) -> bool:
        """Whether parameters of the module, or tables of an optimizer or optimizers in it, came or went."""
        self._show_shards()
        if self.table.refresh() or (self._lazy and self._initialised()):
            return True
        if len(inner_optimizers(self.optimizers)) > len(self.optimizers):
            return True
        return self._tables != tuple(parameter_tables(optimizer, self.names_by_id) for optimizer in self.optimizers)

    def _initialised(self) -> bool:
        return any(not is_lazy(p) for name, p in self.table.parameters.items() if name not in self.parameters)

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
        return sorted(set(named) & self.declared - ELEMENTWISE_NAMES)

    def couples_parameters(self) -> list[str]:
        """Names of optimizer classes whose update of one parameter depends on the state of others."""
        return [
            type(optimizer).__name__
            for optimizer in self.optimizers
            if isinstance(optimizer, torch.optim.LBFGS) or self._keeps_more(optimizer) or attribute_tensors(optimizer)
        ]

    def _keeps_more(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer's state has an entry of no parameter; looked at when the number of entries changes."""
        state = state_of(optimizer)
        mark = (id(state), len(state))
        known = self._coupled.get(id(optimizer))
        if known is None or known[0] != mark:
            known = (mark, not all(isinstance(key, Tensor) for key in state))
            self._coupled[id(optimizer)] = known
        return known[1]

    def couples_shards(self) -> list[str]:
        """Names of optimizer classes that update a distributed parameter and are not known to work element by element.

        The shards of one parameter are then to be captured at the same iteration on all ranks.
        """
        if self._coupled_shards is None:
            found = {
                type(self.optimizers[index]).__name__
                for name, indices in self.owners.items()
                if hasattr(self.parameters[name], "to_local")
                for index in indices
                if not self._updates_elementwise(self.optimizers[index])
            }
            self._coupled_shards = sorted(found)
        return self._coupled_shards

    def updates_apart(self) -> bool:
        """Whether every optimizer is known to update each parameter from that parameter's gradient and state alone."""
        return all(self._updates_elementwise(o) or type(o) in CLOSURE_FIRST_OPTIMIZERS for o in self.optimizers)

    @property
    def has_inner(self) -> bool:
        """Whether an optimizer works inside another one."""
        return len(self.optimizers) > self.num_given

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

    def versions(self, names: Sequence[str], turn: int) -> tuple[list[int], list[bytes]]:
        """Version counters of parameters: every in-place change counts, except through ``.data``.

        On the CPU some values are looked at, too: a change of whole tensors through ``.data`` shows there.

        Args:
            names: The parameters, as the same object at each call; of many, others in each turn are looked at.
            turn: The iteration.
        """
        known = self._watched.get(id(names))
        if known is None or known[0] is not names:
            own = self.parameters
            plain: list[Tensor] = [own[name] for name in names if name in own and type(own[name]) is nn.Parameter]
            others = [name for name in names if name in own and type(own[name]) is not nn.Parameter]
            known = (names, plain, others)
            self._watched[id(names)] = known
        shards = [*known[1], *map(self.weight, known[2])]
        each = -(-len(shards) // _LOOKED_AT)
        looked_at = shards if each <= 1 else shards[turn % each :: each]
        return [shard._version for shard in shards], [_some_values(shard) for shard in looked_at]

    def places(self) -> Mapping[tuple[Any, ...], str]:
        """Names of the parameters by where their values are (:func:`~.local.place`), as of now."""
        pointers = [p.data_ptr() if type(p) is nn.Parameter else 0 for p in self.parameters.values()]
        if self._places is None or pointers != self._pointers:
            self._pointers = pointers
            weights = ((name, self.weight(name)) for name in self.parameters)
            self._places = {place(weight): name for name, weight in weights if weight.numel()}
        return self._places

    def listed(self, key: int, parameters: Sequence[Any]) -> str:
        """Names of parameters as one text (JSON): there may be tens of thousands. Lazy ones have none yet.

        Args:
            key: Under which to remember it.
            parameters: A parameter group's.
        """
        known, text = self._listed.get(key, ([], ""))
        if not text or len(known) != len(parameters) or not all(map(operator.is_, known, parameters)):
            names = self.names_by_id
            text = json.dumps([names[id(p)] for p in parameters if id(p) in names])
            self._listed[key] = list(parameters), text
        return text

    def sizes_depend_on(self) -> tuple[int, ...]:
        """Equal as long as sizes of parameters and of what optimizers keep of them are."""
        return (self.generation, self.forms, *(len(state_of(optimizer)) for optimizer in self.optimizers))

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


def _is_sharded(module: Any) -> bool:
    return callable(getattr(module, "reshard", None)) and callable(getattr(module, "unshard", None))


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


def _some_values(parameter: Tensor) -> bytes:
    """A few bytes from the middle of a tensor on the CPU."""
    if not parameter.is_cpu or not parameter.is_contiguous() or is_wrapper(parameter):
        return b""
    address, nbytes = parameter.data_ptr(), parameter.numel() * parameter.element_size()
    some = min(nbytes, 16)
    return ctypes.string_at(address + (nbytes - some) // 2, some) if address else b""
