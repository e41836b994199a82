"""Values out of their descriptions and the tensors beside them: see :mod:`.description`."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moetion_lightning.core.description import FACTORIES, Describer, find_class
from moetion_lightning.core.local import local
from moetion_lightning.errors import ForeignWindowError

__all__ = ["Rebuilder"]

_DTYPES = {str(v).removeprefix("torch."): v for v in vars(torch).values() if isinstance(v, torch.dtype)}


class Rebuilder:
    """Puts values together again, into what is there where it fits.

    Args:
        load: Gives a stored tensor by its path.
        device: Where tensors belong that were not on the CPU.
        like: The parameter that they belong to; None if there is none.
        rows: The rows of it that are stored, as a function of a tensor; None: all.
        parameters: Live parameters by name.
    """

    def __init__(
        self,
        load: Callable[[str], Tensor],
        device: torch.device,
        like: Tensor | None = None,
        rows: Callable[[Tensor], Tensor] | None = None,
        parameters: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._load = load
        self._device = device
        self._like = like
        self._rows = rows
        self._parameters = parameters or {}

    def rebuild(self, described: Mapping[str, Any], current: Any = None) -> Any:
        """The value.

        Args:
            described: What :meth:`Describer.describe` gave.
            current: What is in its place now: tensors and objects that fit are written to, so that who else refers to
                them sees the change.

        Raises:
            ForeignWindowError: It needs a class that this process does not have.
        """
        if "t" in described:
            return self._tensor(described, current)
        for tag, build in self._builders.items():
            if tag in described:
                return build(self, described, current)
        raise ForeignWindowError(f"the window describes a value that this version does not know: {sorted(described)}")

    # --- tensors -------------------------------------------------------------------------------------------------

    def _tensor(self, described: Mapping[str, Any], current: Any) -> Tensor:
        stored, rows = self._load(described["t"]), described["rows"] and self._like is not None
        device = torch.device("cpu") if described["cpu"] else self._device
        shape = local(self._like).shape if rows and self._like is not None else stored.shape
        stride = described.get("stride")
        kind = self._kind(described)
        fits = (
            isinstance(current, Tensor)
            and (type(current) is kind or hasattr(current, "to_local"))
            and local(current).shape == shape
            and current.dtype == stored.dtype
            and current.device == device
            and (stride is None) == local(current).is_contiguous()
            and (stride is None or list(local(current).stride()) == stride)
        )
        target: Tensor
        if fits:
            target = current
        elif rows and hasattr(self._like, "to_local"):
            assert self._like is not None
            target = torch.zeros_like(self._like, dtype=stored.dtype, device=device)
        else:
            # Rows of other operators are zero until those are activated themselves.
            target = torch.empty(shape, dtype=stored.dtype, device=device)
            if stride is not None:
                target = torch.empty_strided(tuple(shape), stride, dtype=stored.dtype, device=device)
            target.zero_()
        shard = local(target)
        sliced = rows and self._rows is not None
        _write(self._rows(shard) if sliced and self._rows is not None else shard, stored)
        if fits or kind is Tensor:
            return target
        if kind is nn.Parameter:
            return nn.Parameter(target, requires_grad=described["parameter"])
        return target.as_subclass(kind)

    def _kind(self, described: Mapping[str, Any]) -> type:
        if "parameter" in described:
            return nn.Parameter
        return _class(described["class"]) if "class" in described else Tensor

    def _sparse(self, described: Mapping[str, Any], current: Any) -> Tensor:
        indices, values = (self.rebuild(part) for part in described["coo"])
        made = torch.sparse_coo_tensor(indices, values, described["size"], check_invariants=False)
        return made._coalesced_(described["coalesced"])

    def _wrapper(self, described: Mapping[str, Any], current: Any) -> Any:
        kind: Any = _class(described["wrapper"])
        old = current if type(current) is kind else None
        inner = {name: self.rebuild(item, getattr(old, name, None)) for name, item in described["inner"].items()}
        if old is not None and all(getattr(old, name, None) is value for name, value in inner.items()):
            context = Describer("a tensor").describe(old.__tensor_flatten__()[1], "context")
            if context == described["context"] and list(old.shape) == described["size"]:
                return old
        context = self.rebuild(described["context"])
        return kind.__tensor_unflatten__(inner, context, torch.Size(described["size"]), tuple(described["stride"]))

    # --- everything else -----------------------------------------------------------------------------------------

    def _dict(self, described: Mapping[str, Any], current: Any) -> dict[str, Any]:
        old = current if isinstance(current, Mapping) else {}
        return {key: self.rebuild(item, old.get(key)) for key, item in described["d"].items()}

    def _pairs(self, pairs: Sequence[Any], current: Any) -> Iterator[tuple[Any, Any]]:
        old = current if isinstance(current, Mapping) else {}
        for described, item in pairs:
            key = self.rebuild(described)
            yield key, self.rebuild(item, old.get(key))

    def _items(self, items: Sequence[Any], current: Any) -> list[Any]:
        old = list(current) if isinstance(current, (list, tuple, deque)) and len(current) == len(items) else None
        return [self.rebuild(item, None if old is None else old[index]) for index, item in enumerate(items)]

    def _object(self, described: Mapping[str, Any], current: Any) -> Any:
        kind = _class(described["o"])
        made = current if type(current) is kind else object.__new__(kind)
        values = self.rebuild(described["vars"], vars(made))
        vars(made).clear()
        vars(made).update(values)
        return made

    def _numpy(self, body: Sequence[Any]) -> Any:
        name, shape, data = body
        return np.frombuffer(bytes.fromhex(data), np.dtype(name)).reshape(shape).copy()

    _builders: Mapping[str, Callable[[Rebuilder, Mapping[str, Any], Any], Any]] = {
        "v": lambda self, d, now: d["v"],
        "f": lambda self, d, now: float.fromhex(d["f"]),
        "d": _dict,
        "m": lambda self, d, now: dict(self._pairs(d["m"], now)),
        "l": lambda self, d, now: self._items(d["l"], now),
        "u": lambda self, d, now: tuple(self._items(d["u"], now)),
        "od": lambda self, d, now: OrderedDict(self._pairs(d["od"], now)),
        "dd": lambda self, d, now: defaultdict(FACTORIES.get(d["dd"][0]), self._pairs(d["dd"][1], now)),
        "set": lambda self, d, now: set(self._items(d["set"], None)),
        "fset": lambda self, d, now: frozenset(self._items(d["fset"], None)),
        "q": lambda self, d, now: deque(self._items(d["q"][1], now), d["q"][0]),
        "nt": lambda self, d, now: tuple.__new__(_class(d["nt"]), self._items(d["items"], now)),
        "wrapper": _wrapper,
        "coo": _sparse,
        "o": _object,
        "e": lambda self, d, now: getattr(_class(d["e"]), d["name"]),
        "p": lambda self, d, now: self._parameters[d["p"]],
        "i": lambda self, d, now: int(d["i"], 16),
        "c": lambda self, d, now: complex(*map(float.fromhex, d["c"])),
        "b": lambda self, d, now: bytes.fromhex(d["b"]),
        "dtype": lambda self, d, now: _DTYPES[d["dtype"]],
        "device": lambda self, d, now: torch.device(d["device"]),
        "ns": lambda self, d, now: self._numpy(d["ns"])[()],
        "n": lambda self, d, now: self._numpy(d["n"]),
        "size": lambda self, d, now: torch.Size(d["size"]),  # last: others have a size, too
    }


def _class(name: str) -> type:
    found = find_class(name)
    if found is None:
        raise ForeignWindowError(
            f"the window holds an object of the class {name!r}, which this process has not loaded. Import what defines "
            "it before training begins, as in the run that was captured"
        )
    return found


def _write(target: Tensor, stored: Tensor) -> None:
    """Copy; of dimensions that are only expanded (stride 0) one element is written."""
    for dim, stride in enumerate(target.stride()):
        if stride == 0 and target.shape[dim] > 1:
            target, stored = target.narrow(dim, 0, 1), stored.narrow(dim, 0, 1)
    target.copy_(stored)
