"""Runs the unchanged forward of an MoE layer whose experts are spread over several ranks.

A block that calls expert modules (:class:`ListDispatch`) may call them in any order and skip those without tokens, so
that collectives inside the calls would not match between ranks. Its forward therefore runs twice: the first time each
expert only notes its rows; then all rows of the layer are exchanged at once and every rank runs its own experts; the
second time each expert answers with its result. The second pass sees the random numbers and the buffers of the first.
A container that is called once with the routing decision (:class:`FusedDispatch`) needs no second pass.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.moe.routing.forms import repeated_forward
from moetion_lightning.strategies.expert_exchange import exchange, exchange_integers, new_token, tie, touch
from moetion_lightning.strategies.expert_layout import ExpertGroups

__all__ = ["FusedDispatch", "ListDispatch"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class _Random:
    """The global random state of the CPU and of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._module = None if device.type == "cpu" else torch.get_device_module(device)
        self._own = None if self._module is None else self._module.get_rng_state(device)

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._module is not None:
            self._module.set_rng_state(self._own, self._device)


@contextlib.contextmanager
def _copied_buffers(block: nn.Module) -> Iterator[None]:
    # Others take the places of the buffers, instead of writing the old values back: autograd may have saved a buffer,
    # and would refuse one that was written to.
    kept = [(module, name, buffer) for module in block.modules() for name, buffer in module._buffers.items()]
    for module, name, buffer in kept:
        module._buffers[name] = None if buffer is None else buffer.detach().clone()
    try:
        yield
    finally:
        for module, name, buffer in kept:
            module._buffers[name] = buffer


class _Record:
    """First pass: notes the rows of every call and answers with zeros."""

    def __init__(self, num_experts: int, result_of: Callable[[Tensor], tuple[torch.dtype, int]]) -> None:
        self.calls: list[list[Tensor]] = [[] for _ in range(num_experts)]
        self._result_of = result_of

    def __call__(self, expert: int, rows: Tensor) -> Tensor:
        self.calls[expert].append(rows)
        dtype, width = self._result_of(rows)
        return rows.new_zeros((*rows.shape[:-1], width), dtype=dtype)


class _Answer:
    """Second pass: answers every call with its part of the results."""

    def __init__(self, name: str, calls: list[list[Tensor]], results: Tensor) -> None:
        self._name = name
        shapes = [(expert, rows.shape) for expert, recorded in enumerate(calls) for rows in recorded]
        sizes = [shape[:-1].numel() for _, shape in shapes]
        # unsafe: no views of one tensor, so that the block may change a result in place.
        pieces = torch.unsafe_split_with_sizes(results, sizes) if sizes else ()
        self._waiting: list[list[tuple[torch.Size, Tensor]]] = [[] for _ in calls]
        for (expert, shape), piece in zip(shapes, pieces):
            self._waiting[expert].append((shape, piece))

    def __call__(self, expert: int, rows: Tensor) -> Tensor:
        if not self._waiting[expert] or self._waiting[expert][0][0] != rows.shape:
            self._refuse(f"called expert {expert} with {tuple(rows.shape)}")
        shape, piece = self._waiting[expert].pop(0)
        return piece.reshape(*shape[:-1], piece.shape[-1])

    def finish(self) -> None:
        left = [expert for expert, calls in enumerate(self._waiting) if calls]
        if left:
            self._refuse(f"did not call experts {left}")

    def _refuse(self, what: str) -> None:
        raise ConfigurationError(
            f"MoE layer {self._name!r}: its second pass {what}, unlike its first. Under expert parallelism the forward "
            "of the block runs twice and must route alike: keep state that changes routing in buffers, and draw random "
            "numbers from torch's global generator"
        )


class ListDispatch:
    """Dispatches the tokens of a block whose experts are modules.

    Args:
        name: Name of the layer, for errors.
        block: The module whose forward calls the experts.
        experts: All experts, in order; those of other ranks may be without parameters.
        blocks: The experts at each place of the expert-parallel group.
        groups: The groups of this rank.
    """

    def __init__(
        self, name: str, block: nn.Module, experts: Sequence[nn.Module], blocks: Sequence[range], groups: ExpertGroups
    ) -> None:
        self._name = name
        self._block = block
        self._blocks = blocks
        self._groups = groups
        self._forward = block.forward
        self._own = [experts[index].forward for index in blocks[groups.position]]
        self._num_experts = len(experts)
        self._phase: Callable[[int, Tensor], Tensor] | None = None
        self._results: dict[Any, tuple[torch.dtype, int]] = {}
        block.forward = self._run
        for index, expert in enumerate(experts):
            expert.forward = self._stand_in(index)

    def _stand_in(self, expert: int) -> Callable[..., Tensor]:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            values = (*args, *kwargs.values())
            if len(values) != 1 or not isinstance(values[0], Tensor) or values[0].dim() < 1:
                raise ConfigurationError(
                    f"MoE layer {self._name!r} calls expert {expert} with {[type(v).__name__ for v in values]}; expert "
                    "parallelism supports experts of one argument, a tensor of token rows [..., width]"
                )
            if self._phase is None:
                raise ConfigurationError(
                    f"expert {expert} of the MoE layer {self._name!r} was called from outside its block "
                    f"({type(self._block).__name__}.forward), where tokens are exchanged between the ranks"
                )
            return self._phase(expert, values[0])

        return forward

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        device = given[0].device if given else torch.device("cpu")
        before, versions = _Random(device), [value._version for value in given]
        record = _Record(self._num_experts, self._result_of)
        with _copied_buffers(self._block), self._answering(record):
            self._forward(*args, **kwargs)
        if versions != [value._version for value in given]:
            raise ConfigurationError(
                f"MoE layer {self._name!r} changes its input in place; under expert parallelism the forward of the "
                "block runs twice and must leave its input as it is"
            )
        token, results = self._compute(record.calls, device)
        after = _Random(device)
        before.restore()
        answer = _Answer(self._name, record.calls, results)
        with self._answering(answer), repeated_forward():
            output = self._forward(*args, **kwargs)
        answer.finish()
        # Not where the second pass ended: the experts may have drawn numbers, which nobody else should draw again.
        after.restore()
        return tie(output, token, self._name)

    @contextlib.contextmanager
    def _answering(self, phase: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
        outer, self._phase = self._phase, phase
        try:
            yield
        finally:
            self._phase = outer

    def _result_of(self, rows: Tensor) -> tuple[torch.dtype, int]:
        """Dtype and width of an expert's result."""
        kind = rows.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        key = (rows.dtype, rows.shape[-1], kind, autocast)
        if key not in self._results:
            with torch.no_grad():
                probe = self._own[0](rows.new_zeros(0, rows.shape[-1]))
            if not isinstance(probe, Tensor) or probe.dim() != 2 or probe.dtype not in _DTYPES:
                raise ConfigurationError(
                    f"MoE layer {self._name!r}: an expert makes {type(probe).__name__} of rows "
                    f"[0, {rows.shape[-1]}]; expert parallelism supports experts that return rows [0, width] of a "
                    "floating-point dtype"
                )
            self._results[key] = probe.dtype, probe.shape[-1]
        return self._results[key]

    def _compute(self, calls: list[list[Tensor]], device: torch.device) -> tuple[Tensor, Tensor]:
        """Exchange the rows, run the experts of this rank, exchange the results."""
        groups, own = self._groups, len(self._own)
        counts = [sum(rows.shape[:-1].numel() for rows in recorded) for recorded in calls]
        everything = [rows.reshape(-1, rows.shape[-1]) for recorded in calls for rows in recorded]
        dtype, width = self._kind_of(everything)
        notes = [
            [_DTYPES.index(dtype), width, *(counts[e] for e in block), *(bool(calls[e]) for e in block)]
            for block in self._blocks
        ]
        heard = exchange_integers(groups, notes, device)
        kinds = {(code, size) for code, size, *_ in heard if size}
        token = new_token(device)
        if not kinds:  # no rank called any expert
            return token, torch.zeros(0, 0, device=device)
        if len(kinds) > 1:
            raise ConfigurationError(
                f"MoE layer {self._name!r}: the ranks call experts with rows of different kinds "
                f"{sorted((str(_DTYPES[code]), size) for code, size in kinds)}; expected one dtype and width"
            )
        code, width = kinds.pop()
        rows = torch.cat(everything) if everything else torch.empty(0, width, dtype=_DTYPES[code], device=device)
        sent = [sum(counts[e] for e in block) for block in self._blocks]
        arriving = [block[2 : 2 + own] for block in heard]
        called = [any(block[2 + own + index] for block in heard) for index in range(own)]
        received = [sum(sizes) for sizes in arriving]
        token, arrived = exchange(groups, sent, received, token, rows)
        back = self._run_own(arrived, arriving, called)
        token, results = exchange(groups, received, sent, token, back)
        return token, results

    def _kind_of(self, rows: list[Tensor]) -> tuple[torch.dtype, int]:
        kinds = {(tensor.dtype, tensor.shape[-1]) for tensor in rows}
        if len(kinds) > 1 or any(dtype not in _DTYPES for dtype, _ in kinds):
            raise ConfigurationError(
                f"MoE layer {self._name!r} calls its experts with rows of the kinds {sorted(map(str, kinds))}; expert "
                "parallelism supports one floating-point dtype and one width a layer"
            )
        return kinds.pop() if kinds else (_DTYPES[0], 0)

    def _run_own(self, arrived: Tensor, arriving: list[list[int]], called: list[bool]) -> Tensor:
        """Run this rank's experts on rows ordered by source, then expert; the result is in the same order."""
        dtype, width = self._result_of(arrived)
        own = len(self._own)
        pieces = torch.split(arrived, [size for sizes in arriving for size in sizes])
        answers: list[list[Tensor]] = []
        for index, forward in enumerate(self._own):
            if not called[index]:  # as in a single process, it gets no gradient and does not move
                answers.append([arrived.new_empty(0, width, dtype=dtype)] * len(arriving))
                continue
            result = forward(torch.cat(pieces[index::own]))
            answers.append(list(torch.split(result.to(dtype), [sizes[index] for sizes in arriving])))
        return torch.cat(list(itertools.chain.from_iterable(zip(*answers))))


class FusedDispatch:
    """Dispatches the tokens of a container that is called as ``experts(hidden_states, ids, weights)``.

    Args:
        name: Name of the layer, for errors.
        experts: The container; its parameters hold this rank's experts only, from the first use on.
        blocks: The experts at each place of the expert-parallel group.
        parameters: The container's expert parameters.
        groups: The groups of this rank.
    """

    def __init__(
        self,
        name: str,
        experts: nn.Module,
        blocks: Sequence[range],
        parameters: Sequence[nn.Parameter],
        groups: ExpertGroups,
    ) -> None:
        self._name = name
        self._blocks = blocks
        self._parameters = parameters
        self._groups = groups
        self._forward = experts.forward
        self._names = list(inspect.signature(type(experts).forward).parameters)[1:4]
        experts.forward = self._run
        if getattr(experts, "num_experts", None) == blocks[-1].stop:
            setattr(experts, "num_experts", len(blocks[groups.position]))  # noqa: B010  (typed as a module)

    def _run(self, *args: Any, **kwargs: Any) -> Tensor:
        given = dict(zip(self._names, args), **kwargs)
        if len(args) + len(kwargs) != 3 or set(given) != set(self._names):
            raise ConfigurationError(
                f"MoE layer {self._name!r}: its experts were called with {len(args)} positional and the named "
                f"arguments {sorted(kwargs)}; expert parallelism expects exactly {self._names}"
            )
        hidden, ids, weights = (given[name] for name in self._names)
        groups, num_experts = self._groups, self._blocks[-1].stop
        rows = hidden.reshape(-1, hidden.shape[-1])
        flat = ids.reshape(-1).to(torch.int64)
        if flat.numel() % max(1, rows.shape[0]):
            raise ConfigurationError(
                f"MoE layer {self._name!r}: expert ids {tuple(ids.shape)} do not fit {tuple(hidden.shape)}"
            )
        counts = torch.bincount(flat.clamp(-1, num_experts) + 1, minlength=num_experts + 2).tolist()
        if counts[0] or counts[-1]:
            raise ConfigurationError(
                f"MoE layer {self._name!r}: the router chose expert ids outside of 0 .. {num_experts - 1} (identity "
                "experts, or padding), which expert parallelism does not support. Use ModelParallelStrategy (FSDP2)"
            )
        counts = counts[1:-1]
        order = torch.argsort(flat, stable=True)
        heard = exchange_integers(groups, [[counts[e] for e in block] for block in self._blocks], hidden.device)
        sent, received = [sum(counts[e] for e in block) for block in self._blocks], [sum(sizes) for sizes in heard]
        # Not `ids.shape[-1]`: a rank may have no token at all.
        top_k = flat.numel() // max(1, rows.shape[0]) or 1
        token, arrived, shares = exchange(
            groups, sent, received, new_token(hidden.device), rows[order // top_k], weights.reshape(-1, 1)[order]
        )
        if arrived.shape[0]:
            which = torch.tensor([list(range(len(sizes))) for sizes in heard], device=hidden.device).reshape(-1)
            sizes = torch.tensor(heard, device=hidden.device).reshape(-1)
            result = self._forward(arrived, torch.repeat_interleave(which, sizes)[:, None], shares)
            if result.dtype != hidden.dtype or result.shape != arrived.shape:
                raise ConfigurationError(
                    f"MoE layer {self._name!r}: its experts make {result.dtype} {tuple(result.shape)} of "
                    f"{hidden.dtype} {tuple(arrived.shape)}; expert parallelism supports experts that keep both"
                )
        else:
            result = torch.empty_like(arrived)
            token = touch(token, [parameter for parameter in self._parameters if parameter.requires_grad])
        token, answered = exchange(groups, received, sent, token, result)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        mixed = answered[back].reshape(rows.shape[0], top_k, rows.shape[1]).sum(1)
        output: Tensor = tie(mixed.reshape(hidden.shape), token, self._name)
        return output
