"""What the ranks agree on when they start, kept for a process that takes a lost rank's place.

A program's start is collective: a folder's name is broadcast, ids are gathered, a seed is agreed on. The living do not
repeat it for a newcomer, which would decide alone what the others decided together. So each rank notes in the run's
store what it contributes to such a collective, before it takes part, and a newcomer computes the result from the notes.

A collective is known by its group, by the place in the program that calls it, and by how often that place has called
it: what a newcomer leaves out (a check that the others have made) shifts nothing. What was never noted, because the
others did not come along there, is computed as if they had contributed the same.

Keys, below the prefix of the run: ``moetion/start/{call}/{index in the group}``: a contribution; ``.../result`` of a
sum, whose last bits depend on the backend; ``moetion/start/over``: a rank has finished its start. They stay.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from moetion_lightning.distributed.bounded_store import BoundedStore
from moetion_lightning.errors import LaunchError, MoEtionError
from moetion_lightning.storage.tree import dump_tree, load_tree

__all__ = ["StartValues"]

_log = logging.getLogger(__name__)

_OVER = "moetion/start/over"
_MAX_TENSOR_BYTES = 1 << 16  # larger ones are weights, which are restored
_MAX_BYTES = 1 << 18
_MAX_CALLS = 64  # of one place in the program: more is a loop, and no start
_FRAMES = 4
_WAIT_SECONDS = 600.0
_LOST_SECONDS = 60.0
_POLL_SECONDS = 0.02
_VALUE, _REFUSED = b"v", b"r"
_LIBRARIES = tuple(
    os.path.join(os.path.dirname(os.path.dirname(torch.__file__)), name) + os.sep
    for name in ("torch", "lightning", "lightning_fabric", "pytorch_lightning", "lightning_utilities")
)
_SKIPPED = (_LIBRARIES[0], __file__, os.path.dirname(inspect.__file__) + os.sep + "contextlib")


class StartValues:
    """Stands between a program and torch's collectives while the program starts, and while its rank is alone.

    Args:
        store: Gives a store of this object's own.
        rank: This rank.
        world_size: Number of ranks.
        check: Raises when ranks were lost since this process began: the others may wait for it elsewhere, then.
    """

    def __init__(
        self, store: Callable[[], BoundedStore], rank: int, world_size: int, check: Callable[[], None] = lambda: None
    ) -> None:
        self._open = store
        self._check = check
        self._opened: BoundedStore | None = None
        self._rank = rank
        self._world = range(world_size)
        self._calls: Counter[str] = Counter()
        self._originals = {name: getattr(dist, name) for name in _KINDS}
        self._signatures = {name: inspect.signature(function) for name, function in self._originals.items()}
        #: Whether the start is over, so that nothing is noted.
        self.over = False
        #: Whether this process has no others to talk to.
        self.alone = False

    def stand_between(self) -> None:
        """Put this object's functions in the place of torch's, as long as they are needed."""
        self._put(self._wrap if self.alone or not self.over else self._originals.__getitem__)

    def remove(self) -> None:
        """Put torch's functions back."""
        self._put(self._originals.__getitem__)

    def be_alone(self, alone: bool) -> None:
        """Collectives have no effect outside of this process from now on, or have one again."""
        self.alone = alone
        self.stand_between()

    def _put(self, function_of: Callable[[str], Callable[..., Any]]) -> None:
        for name in self._originals:
            function = function_of(name)
            setattr(dist, name, function)
            setattr(distributed_c10d, name, function)

    def end(self) -> None:
        """The first batch is there: what comes now, all ranks do together."""
        if not self.over:
            self.over = True
            self._store.set(_OVER, "1")
            self.stand_between()

    @property
    def _store(self) -> BoundedStore:
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    def _wrap(self, name: str) -> Callable[..., Any]:
        def collective(*args: Any, **kwargs: Any) -> Any:
            bound = self._signatures[name].bind(*args, **kwargs)
            bound.apply_defaults()
            call = _Call(name, bound.arguments, self._rank, self._world)
            original = self._originals[name]
            if not call.is_kept():
                return original(*args, **kwargs)
            if self.alone:
                self._replay(call)
                return original(*args, **kwargs) if call.given.get("async_op") else None
            key = self._key(call)
            if key is None:
                return original(*args, **kwargs)
            self._note(key, call)
            result = original(*args, **kwargs)
            if call.kind.sums and call.index < 2 and not call.given.get("async_op"):  # two: one may be lost here
                self._store.compare_set(f"{key}/result", "", _encode(call.given["tensor"]).decode("latin-1"))
            return result

        collective.__name__ = name
        return collective

    def _key(self, call: _Call) -> str | None:
        """The same on all ranks; None for a place that calls too often."""
        text = "|".join([call.name, str(call.ranks), *_stack()])
        self._calls[text] += 1
        if self._calls[text] > _MAX_CALLS:
            return None
        return f"moetion/start/{hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}-{self._calls[text]}"

    def _note(self, key: str, call: _Call) -> None:
        if call.index in call.contributors:
            data = _encode(call.contribution())
            if data.startswith(_REFUSED):
                _log.warning("%s", _cannot(call, data))
            self._store.set(f"{key}/{call.index}", data.decode("latin-1"))

    def _replay(self, call: _Call) -> None:
        key = None if self.over else self._key(call)
        if key is not None and self._has_more(key, call):
            if call.kind.sums and self._store.check([f"{key}/result"]):
                call.given["tensor"].copy_(self._read(f"{key}/result", call))
                return
            call.apply({index: self._read(f"{key}/{index}", call) for index in call.contributors})
            return
        own = call.contribution()
        call.apply({index: own for index in call.contributors})

    def _has_more(self, key: str, call: _Call) -> bool:
        """Whether the notes of the others are there, or will be: they may be newcomers as well."""
        keys = [f"{key}/{index}" for index in call.contributors]
        if self._store.check(keys):
            return True
        if self._store.check([_OVER]):
            return bool(self._store.check(keys))  # written before the start was over
        self._note(key, call)
        began = time.monotonic()
        while not self._store.check(keys):
            if self._store.check([_OVER]):
                return bool(self._store.check(keys))
            waited = time.monotonic() - began
            if waited > _LOST_SECONDS:
                self._check()  # not at once: those that are started in the place of others have notes to come
            if waited > _WAIT_SECONDS:
                raise LaunchError(
                    f"rank {self._rank} was started again and waited {_WAIT_SECONDS:.0f} s for what the others give to "
                    f"{call.name} at {_users_line()}. Either a rank hangs while it starts, or not all ranks come along "
                    "there: call it on all of them."
                )
            time.sleep(_POLL_SECONDS)
        return True

    def _read(self, key: str, call: _Call) -> Any:
        data = bytes(self._store.get(key)).decode().encode("latin-1")
        if data.startswith(_REFUSED):
            raise LaunchError(_cannot(call, data))
        return load_tree(data[1:])


class _Call:
    """One call of a collective.

    Args:
        name: Of torch's function.
        given: Its arguments, by name.
        rank: This rank.
        world: All ranks.
    """

    def __init__(self, name: str, given: Mapping[str, Any], rank: int, world: Sequence[int]) -> None:
        self.name, self.given, self.kind = name, given, _KINDS[name]
        group = given.get("group")
        whole = group is None or group is dist.group.WORLD
        self.ranks = list(world) if whole else sorted(dist.get_process_group_ranks(group))
        self.index = self.ranks.index(rank) if rank in self.ranks else -1
        source = given.get("group_src", given.get("group_dst"))
        if source is None:
            source = given.get("src", given.get("dst"))
            source = self.ranks.index(source) if source in self.ranks else 0
        self.source = source
        self.contributors = [source] if self.kind.from_source else range(len(self.ranks))

    def is_kept(self) -> bool:
        """Whether this rank takes part, with values and not with weights."""
        if self.index < 0:
            return False
        tensors = [self.given.get("tensor"), *self.given.get("tensor_list", ())]
        return all(t.numel() * t.element_size() <= _MAX_TENSOR_BYTES for t in tensors if isinstance(t, Tensor))

    def contribution(self) -> Any:
        """What this rank gives."""
        value = self.given[self.kind.gives]
        return value.detach().cpu().clone() if isinstance(value, Tensor) else value

    def apply(self, contributions: Mapping[int, Any]) -> None:
        """Put the result where the program looks for it."""
        self.kind.apply(self, contributions)


class _Kind:
    """What a collective does.

    Args:
        gives: Argument with this rank's contribution.
        apply: Writes the result into the arguments.
        from_source: Whether only one rank contributes.
        sums: Whether the result is computed from all contributions.
    """

    def __init__(
        self,
        gives: str,
        apply: Callable[[_Call, Mapping[int, Any]], None],
        *,
        from_source: bool = False,
        sums: bool = False,
    ) -> None:
        self.gives, self.apply, self.from_source, self.sums = gives, apply, from_source, sums


def _broadcast_objects(call: _Call, given: Mapping[int, Any]) -> None:
    call.given["object_list"][:] = given[call.source]


def _gather_objects(call: _Call, given: Mapping[int, Any]) -> None:
    call.given["object_list"][:] = [given[index] for index in range(len(call.ranks))]


def _gather_objects_at_one(call: _Call, given: Mapping[int, Any]) -> None:
    if call.given["object_gather_list"] is not None and call.index == call.source:
        call.given["object_gather_list"][:] = [given[index] for index in range(len(call.ranks))]


def _scatter_objects(call: _Call, given: Mapping[int, Any]) -> None:
    if given[call.source]:
        call.given["scatter_object_output_list"][0] = given[call.source][call.index]


def _broadcast(call: _Call, given: Mapping[int, Any]) -> None:
    call.given["tensor"].detach().copy_(given[call.source])


def _gather(call: _Call, given: Mapping[int, Any]) -> None:
    for index, tensor in enumerate(call.given["tensor_list"]):
        tensor.detach().copy_(given[index])


def _reduce(call: _Call, given: Mapping[int, Any]) -> None:
    values = torch.stack([given[index] for index in range(len(call.ranks))])
    ops: dict[Any, Callable[[Tensor], Tensor]] = {
        dist.ReduceOp.SUM: lambda v: v.sum(0),
        dist.ReduceOp.AVG: lambda v: v.sum(0) / len(v),  # whole numbers, too, as Lightning divides them
        dist.ReduceOp.PRODUCT: lambda v: v.prod(0),
        dist.ReduceOp.MIN: lambda v: v.amin(0),
        dist.ReduceOp.MAX: lambda v: v.amax(0),
    }
    for op, combine in ops.items():
        if call.given["op"] == op:
            call.given["tensor"].detach().copy_(combine(values))


_KINDS = {
    "broadcast_object_list": _Kind("object_list", _broadcast_objects, from_source=True),
    "all_gather_object": _Kind("obj", _gather_objects),
    "gather_object": _Kind("obj", _gather_objects_at_one),
    "scatter_object_list": _Kind("scatter_object_input_list", _scatter_objects, from_source=True),
    "broadcast": _Kind("tensor", _broadcast, from_source=True),
    "all_gather": _Kind("tensor", _gather),
    "all_reduce": _Kind("tensor", _reduce, sums=True),
}


def _encode(value: Any) -> bytes:
    try:
        data = _VALUE + dump_tree(value)
    except MoEtionError as error:
        return _REFUSED + str(error)[:500].encode()
    return data if len(data) <= _MAX_BYTES else _REFUSED + f"it has {len(data)} bytes, at most {_MAX_BYTES}".encode()


def _cannot(call: _Call, data: bytes) -> str:
    return (
        f"{_users_line()}: what the ranks agree on here by {call.name} cannot be kept for a rank that is replaced "
        f"({data[1:].decode(errors='replace')}). Let them agree on plain values or small tensors, or start the script "
        "with torchrun, which restarts all ranks."
    )


def _stack() -> list[str]:
    """The places in the program that led here, innermost first."""
    found: list[str] = []
    frame = sys._getframe(2)
    while frame is not None and len(found) < _FRAMES:
        code = frame.f_code
        if not code.co_filename.startswith(_SKIPPED):
            found.append(f"{os.path.basename(code.co_filename)}:{code.co_name}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return found


def _users_line() -> str:
    """File and line of the innermost caller outside of libraries."""
    frame = sys._getframe(1)
    own = os.path.dirname(os.path.dirname(__file__)) + os.sep
    while frame.f_back is not None:
        frame = frame.f_back
        if not frame.f_code.co_filename.startswith((*_LIBRARIES, own)):
            break
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
