"""An operator's state out of, and into, a live module and its optimizers.

Names of the tensors of a snapshot (``key`` is a :attr:`Piece.key`)::

    w:<key>             master weights (active capture)
    c:<key>             compute weights (frozen capture)
    s:<key>:<entry>     a tensor entry of the optimizer's state (active capture)

Entries of the optimizer's state that are not tensors travel as JSON ("scalars") beside the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moetion_lightning.core.local import local, local_rows
from moetion_lightning.core.operators import Operator, Piece
from moetion_lightning.errors import OperatorError, UnsupportedStateError

__all__ = ["CopyItem", "LiveState", "SlotContents", "TensorLoader", "read_slot", "write_active", "write_compute"]

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

TensorLoader: TypeAlias = Callable[[str], Tensor]

_OPTIONAL_STATE_BYTES_PER_ELEMENT = 8  # estimate before the first step: two float32 moments


class LiveState:
    """Names for the live parameters of a module and their optimizer state.

    Nothing is cached that training may replace: optimizer state is looked up at each use, because
    ``load_state_dict`` replaces its tensors. Of distributed tensors only the local shard is ever read or written.

    Args:
        module: The module that trains.
        optimizers: Its optimizers (raw ``torch.optim`` objects).
        elementwise: Qualified class names of further elementwise optimizers.
        held: Names of the parameters that this process holds; the others are placeholders, and no part of the state.
            None: all.

    Raises:
        OperatorError: An optimizer updates a parameter that is not the module's, or that this process does not hold.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        elementwise: Iterable[str] = (),
        held: Container[str] | None = None,
    ) -> None:
        self.module = module
        self.optimizers = tuple(optimizers)
        self.parameters: dict[str, nn.Parameter] = {
            name: parameter for name, parameter in module.named_parameters() if held is None or name in held
        }
        self.owner: dict[str, int] = {}
        self._elementwise_names = ELEMENTWISE_NAMES | frozenset(elementwise)
        self.refresh()

    def refresh(self) -> None:
        """Look again at what the optimizers update: parameter groups may be added while training.

        Raises:
            OperatorError: An optimizer updates a parameter that is not the module's, or that this process does not
                hold.
        """
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        self.owner.clear()
        for index, optimizer in enumerate(self.optimizers):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    name = names.get(id(parameter))
                    if name is None:
                        raise OperatorError(self._foreign(index, parameter))
                    self.owner[name] = index

    def _foreign(self, index: int, parameter: Tensor) -> str:
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
        return tuple(n for n, p in self.parameters.items() if n in self.owner and p.requires_grad)

    def signature(self) -> tuple[int, ...]:
        """Cheap identity of what trains: changes when parameters are added, frozen or unfrozen."""
        return tuple(
            id(p)
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for p in group["params"]
            if p.requires_grad
        )

    def calls_closure_first(self) -> tuple[bool, ...]:
        """For each optimizer, whether its ``step`` is known to call its closure before it changes anything."""
        return tuple(self._updates_elementwise(o) or type(o) in CLOSURE_FIRST_OPTIMIZERS for o in self.optimizers)

    def _updates_elementwise(self, optimizer: Optimizer) -> bool:
        kind = type(optimizer)
        return kind in ELEMENTWISE_OPTIMIZERS or f"{kind.__module__}.{kind.__qualname__}" in self._elementwise_names

    def couples_parameters(self) -> list[str]:
        """Names of optimizer classes whose update of one parameter depends on the state of others."""
        return [
            type(optimizer).__name__
            for optimizer in self.optimizers
            if isinstance(optimizer, torch.optim.LBFGS) or any(not isinstance(key, Tensor) for key in optimizer.state)
        ]

    def couples_shards(self) -> list[str]:
        """Names of optimizer classes that update a distributed parameter and are not known to work element by element.

        The shards of one parameter are then to be captured at the same iteration on all ranks.
        """
        found = {
            type(self.optimizers[index]).__name__
            for name, index in self.owner.items()
            if hasattr(self.parameters[name], "to_local") and not self._updates_elementwise(self.optimizers[index])
        }
        return sorted(found)

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
            self._updates_elementwise(self.optimizers[self.owner[name]])
            and parameter.dim() > 0
            and all(
                not isinstance(value, Tensor) or value.dim() == 0 or value.shape == parameter.shape
                for value in self.optimizer_state(name).values()
            )
        )

    def optimizer_state(self, name: str) -> dict[str, Any]:
        """The live state of a parameter's optimizer; empty before its first step."""
        state: dict[str, Any] = self.optimizers[self.owner[name]].state.get(self.parameters[name], {})
        return state

    def full_bytes(self, name: str) -> int:
        """Bytes of a parameter with its optimizer state (two moments are assumed before the first step)."""
        parameter = self.weight(name)
        state = self.optimizer_state(name)
        if not state:
            return parameter.numel() * (parameter.element_size() + _OPTIONAL_STATE_BYTES_PER_ELEMENT)
        tensors = [t for value in state.values() for t in _tensors_of(value)]
        return parameter.numel() * parameter.element_size() + sum(t.numel() * t.element_size() for t in tensors)


def _tensors_of(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [local(value)]
    if isinstance(value, Mapping):
        return [t for item in value.values() for t in _tensors_of(item)]
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in _tensors_of(item)]
    return []


@dataclass(frozen=True, kw_only=True)
class CopyItem:
    """One tensor of a slot: where it comes from and how it is stored.

    Args:
        name: Name in the snapshot.
        source: Live tensor (a view), valid until the next optimizer step.
        dtype: Stored dtype; differs from the source's for compute weights.
    """

    name: str
    source: Tensor
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Stored size."""
        return self.source.numel() * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class SlotContents:
    """What one capture holds.

    Args:
        items: The tensors.
        scalars: By parameter: structure of its optimizer state, with the non-tensor values.
    """

    items: tuple[CopyItem, ...]
    scalars: dict[str, Any]


def read_slot(
    live: LiveState,
    active: Sequence[Operator],
    frozen: Sequence[Operator],
    compute_dtype: Mapping[str, torch.dtype],
) -> SlotContents:
    """List what to copy for one slot; copies nothing.

    Args:
        live: The live state.
        active: Operators captured in full.
        frozen: Operators of which only the compute weights are captured.
        compute_dtype: Dtype that the forward consumes, by parameter name; missing means the parameter's own.
    """
    items: list[CopyItem] = []
    scalars: dict[str, Any] = {}
    # Pieces are many, parameters few: what is the same for all pieces of a parameter is looked up once.
    weights: dict[str, Tensor] = {}
    entries: dict[str, list[_Entry]] = {}
    for op in active:
        for piece in op.pieces:
            name = piece.parameter
            if name not in entries:
                weights[name] = live.weight(name)
                entries[name] = []
                scalars[name] = {
                    entry: _describe(value, entry, name, weights[name], entries[name])
                    for entry, value in live.optimizer_state(name).items()
                }
            key, weight = piece.key, weights[name]
            items.append(CopyItem(name=f"w:{key}", source=piece.of(weight), dtype=weight.dtype))
            for entry in entries[name]:
                source = piece.of(entry.tensor) if entry.rows else entry.tensor
                items.append(CopyItem(name=f"s:{key}:{entry.path}", source=source, dtype=source.dtype))
    for op in frozen:
        for piece in op.pieces:
            name = piece.parameter
            if name not in weights:
                weights[name] = live.weight(name)
            weight = weights[name]
            dtype = compute_dtype.get(name, weight.dtype)
            items.append(CopyItem(name=f"c:{piece.key}", source=piece.of(weight), dtype=dtype))
    return SlotContents(items=tuple(items), scalars=scalars)


class _Entry(NamedTuple):
    """A tensor in an optimizer's state."""

    path: str
    tensor: Tensor
    rows: bool


def _describe(value: object, path: str, name: str, parameter: Tensor, found: list[_Entry]) -> Any:
    """JSON for one entry of a parameter's optimizer state; its tensors go to ``found``."""
    if isinstance(value, Tensor):
        value = local(value)
        rows = value.shape == parameter.shape
        found.append(_Entry(path, value, rows))
        return {"t": path, "rows": rows, "cpu": value.device.type == "cpu"}
    if value is None or isinstance(value, (bool, int, str)):
        return {"v": value}
    if isinstance(value, float):
        return {"f": value.hex()}
    if isinstance(value, (list, tuple)):
        kind = "l" if isinstance(value, list) else "u"
        return {kind: [_describe(v, f"{path}.{i}", name, parameter, found) for i, v in enumerate(value)]}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"d": {k: _describe(v, f"{path}.{k}", name, parameter, found) for k, v in value.items()}}
    raise UnsupportedStateError(
        f"the optimizer's state of parameter {name!r} holds {path!r} of type {type(value).__name__}; "
        "tensors, numbers, strings, None, and lists, tuples and dicts of them can be captured"
    )


@torch.no_grad()
def write_active(
    live: LiveState, operators: Iterable[Operator], load: TensorLoader, scalars: Mapping[str, Any]
) -> None:
    """Put master weights and optimizer state of active operators back.

    Args:
        live: The live state to change in place.
        operators: The operators of the slot.
        load: Gives a stored tensor by name.
        scalars: The slot's scalars.
    """
    for op in operators:
        for piece in op.pieces:
            parameter = live.parameters[piece.parameter]
            piece.of(local(parameter)).copy_(load(f"w:{piece.key}"))
            optimizer = live.optimizers[live.owner[piece.parameter]]
            entries: Mapping[str, Any] = scalars[piece.parameter]
            if not entries:
                # No state yet when captured: whatever a frozen phase left there must go, so that it is made afresh.
                optimizer.state.pop(parameter, None)
                continue
            state = optimizer.state[parameter]
            for stale in [entry for entry in state if entry not in entries]:
                del state[stale]
            for entry, described in entries.items():
                state[entry] = _rebuild(described, state.get(entry), piece, parameter, load)


def _rebuild(described: Mapping[str, Any], current: object, piece: Piece, parameter: Tensor, load: TensorLoader) -> Any:
    if "t" in described:
        stored = load(f"s:{piece.key}:{described['t']}")
        device = torch.device("cpu") if described["cpu"] else parameter.device
        shape = local(parameter).shape if described["rows"] else stored.shape
        fits = (
            isinstance(current, Tensor)
            and local(current).shape == shape
            and current.dtype == stored.dtype
            and current.device == device
        )
        if fits:
            target = current
        elif described["rows"]:
            # Rows of other operators are zero until those are activated themselves.
            target = torch.zeros_like(parameter, dtype=stored.dtype, device=device)
        else:
            target = torch.empty(shape, dtype=stored.dtype, device=device)
        assert isinstance(target, Tensor)
        shard = local(target)
        (piece.of(shard) if described["rows"] else shard).copy_(stored)
        return target
    if "v" in described:
        return described["v"]
    if "f" in described:
        return float.fromhex(described["f"])
    if "d" in described:
        old = current if isinstance(current, Mapping) else {}
        return {k: _rebuild(v, old.get(k), piece, parameter, load) for k, v in described["d"].items()}
    kind = "l" if "l" in described else "u"
    values = [_rebuild(v, None, piece, parameter, load) for v in described[kind]]
    return values if kind == "l" else tuple(values)


@torch.no_grad()
def write_compute(live: LiveState, operators: Iterable[Operator], load: TensorLoader, *, active: bool = False) -> None:
    """Put compute weights back (``active=True``: the master weights of an active capture, without optimizer state)."""
    prefix = "w" if active else "c"
    for op in operators:
        for piece in op.pieces:
            piece.of(live.weight(piece.parameter)).copy_(load(f"{prefix}:{piece.key}"))


def _sample(parameter: Tensor) -> str:
    if parameter.device.type != "cpu" or not parameter.is_contiguous() or not parameter.numel():
        return ""
    flat = parameter.detach().view(-1)
    return repr(flat[:: max(1, flat.numel() // 4)].tolist())  # as text: nan equals nan
