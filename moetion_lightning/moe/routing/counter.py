"""Tokens per expert, counted by hooks on the module while it trains."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from moetion_lightning.core.layouts import MoELayer, Tap
from moetion_lightning.errors import OperatorError
from moetion_lightning.moe.routing.calibration import Calibration
from moetion_lightning.moe.routing.forms import (
    argument_reader,
    in_recomputation,
    item,
    leading_rows,
    site_name,
    tokens_per_expert,
)

__all__ = ["TokenCounter"]

_logger = logging.getLogger(__name__)


class TokenCounter:
    """Counts the tokens that each expert receives in training.

    Counts are exact under gradient accumulation (they add up until drained), activation checkpointing (the repeated
    forward is not counted) and evaluation in between (not counted). Under ``torch.compile``, attach before the first
    compiled forward: dynamo never calls hooks that come later. Layers with a tap cause no graph break; a layer
    without one does, since its values must be looked at.

    Args:
        module: The module in which the layers were discovered.
        layers: From ``discover_layers``. Candidates, and layers without a tap, are calibrated in the first training
            iteration, which the first :meth:`drain` after a training forward ends.

    Raises:
        OperatorError: A layer names a module that does not exist, or its tap a site that it does not have.

    Ranks:
        None. Counts are of this process's tokens; the caller sums them over its data-parallel group.
    """

    def __init__(self, module: nn.Module, layers: Sequence[MoELayer]) -> None:
        self._modules: dict[str, nn.Module] = dict(module.named_modules())
        self._all = list(layers)
        self._watches: dict[int, Calibration] = {}
        self._rejected: list[tuple[MoELayer, str]] = []
        self._gone: set[int] = set()
        # Rows of the buffer that are kept, and ones where a column is an expert of its layer: made once, on the device.
        self._rows: tuple[torch.Tensor, torch.Tensor] | None = None
        self._complained: set[int] = set()
        self._handles: dict[int, list[tuple[Tap, Any]]] = {}
        self._num_experts = [layer.num_experts for layer in layers]
        # A spare column at each end takes ids that are no expert of ours: padding (-1), identity experts (E and more).
        # Expert e is counted in column e + 1; columns between a layer's own experts and the last are never read.
        self._last = max(self._num_experts, default=0) + 1
        first = next(module.parameters(), None)
        device = torch.device("cpu") if first is None or first.is_meta else first.device
        self._buffer = torch.zeros(len(layers), self._last + 1, dtype=torch.int64, device=device)
        self._elsewhere: dict[torch.device, torch.Tensor] = {}
        self._ones = torch.ones(0, dtype=torch.int64, device=device)
        for index, layer in enumerate(layers):
            self._handles[index] = []
            if layer.tap is None:
                self._watches[index] = Calibration(layer, self._modules)
                self._watch(index, layer)
            else:
                self._attach(index, layer, layer.tap)

    @property
    def layers(self) -> tuple[MoELayer, ...]:
        """The confirmed layers, each with its tap; rows of :meth:`drain` and :attr:`counts` are in this order."""
        return tuple(self._all[index] for index in self._kept())

    @property
    def pending(self) -> tuple[MoELayer, ...]:
        """Candidates that no training iteration has confirmed or rejected yet."""
        return tuple(self._all[index] for index, watch in self._watches.items() if watch.layer.candidate)

    @property
    def rejected(self) -> tuple[tuple[MoELayer, str], ...]:
        """Candidates that are not MoE layers, each with the reason. Their parameters are shared state."""
        return tuple(self._rejected)

    @property
    def counts(self) -> torch.Tensor:
        """Tokens since the last drain: int64 ``[num_layers, max_experts]`` on the first device; a copy."""
        total = self._buffer + sum(b.to(self._buffer.device) for b in self._elsewhere.values())
        if self._rows is None:
            kept = self._kept()
            sizes = torch.tensor([self._num_experts[index] for index in kept], dtype=torch.int64)
            width = int(sizes.max()) if kept else 0
            own = (torch.arange(width) < sizes[:, None]).to(total)
            self._rows = torch.tensor(kept, dtype=torch.int64, device=total.device), own
        rows, own = self._rows
        return total[rows, 1 : own.shape[1] + 1] * own

    def drain(self) -> torch.Tensor:
        """End an iteration: return its counts and start the next one at zero.

        Call it once per optimizer step. The first call after a training forward also ends the calibration.

        Returns:
            int64 ``[num_layers, max_experts]``, rows as in :attr:`layers`, on the first device. Zero beyond a layer's
            own experts.
        """
        if self._watches and (any(w.seen for w in self._watches.values()) or bool(self._buffer.any())):
            self.settle()
        counts = self.counts
        self.reset()
        return counts

    def settle(self) -> None:
        """Decide all layers that are still calibrated, from what was seen so far."""
        self._rows = None
        for index, watch in list(self._watches.items()):
            del self._watches[index]
            decision = watch.decide()
            if not isinstance(decision, str):
                tap, counts = decision
                self._all[index] = replace(watch.layer, tap=tap, candidate=False)
                self._buffer[index, 1 : counts.numel() + 1] += counts.to(self._buffer.device)
                self._detach(index, keep=tap)
                _logger.debug("%s: tokens are counted at %s", watch.layer.name, tap)
                continue
            self._detach(index)
            if watch.layer.candidate:
                self._gone.add(index)
                self._rejected.append((watch.layer, decision))
            else:
                _logger.warning(
                    "tokens of the MoE layer %s are not counted: %s. Its experts keep their place in the order; give "
                    "its MoESpec a tap to count them",
                    watch.layer.name,
                    decision,
                )

    def reset(self) -> None:
        """Forget the counts since the last drain."""
        self._buffer.zero_()
        for buffer in self._elsewhere.values():
            buffer.zero_()

    def remove(self) -> None:
        """Take all hooks off the module. Safe to call twice."""
        for index in self._handles:
            self._detach(index)

    def _kept(self) -> list[int]:
        pending = {index for index, watch in self._watches.items() if watch.layer.candidate}
        return [index for index in range(len(self._all)) if index not in self._gone and index not in pending]

    def _detach(self, index: int, keep: Tap | None = None) -> None:
        # The hook of the chosen site stays the same object: a compiled forward would not call a new one.
        stay: list[tuple[Tap, Any]] = []
        for tap, handle in self._handles[index]:
            if keep is not None and (tap.site, tap.io) == (keep.site, keep.io):
                stay.append((tap, handle))
            else:
                handle.remove()
        self._handles[index] = stay

    def _module(self, layer: MoELayer, name: str | None, what: str) -> nn.Module:
        if name is None or name not in self._modules:
            raise OperatorError(
                f"MoE layer {layer.name!r}: its tap needs the {what}, and there is no module {name!r}; discover the "
                "layers of the module that is counted, or give the spec another tap"
            )
        found: nn.Module = self._modules[name]
        return found

    def _attach(self, index: int, layer: MoELayer, tap: Tap) -> None:
        handles = self._handles[index]
        if tap.io == "call":
            for expert, name in enumerate(layer.expert_modules):
                hook = self._expert_hook(index, expert)
                child = self._module(layer, name, f"expert {expert}")
                handles.append((tap, child.register_forward_pre_hook(hook, with_kwargs=True)))
            if not layer.expert_modules:
                raise OperatorError(f"MoE layer {layer.name!r}: form='rows' needs experts that are modules")
            return
        module = self._module(layer, site_name(layer, tap), tap.site)
        if tap.io == "in":
            reading = self._input_hook(index, module, tap)
            handles.append((tap, module.register_forward_pre_hook(reading, with_kwargs=True)))
        else:
            handles.append((tap, module.register_forward_hook(self._output_hook(index, tap))))

    def _input_hook(self, index: int, module: nn.Module, tap: Tap) -> Callable[..., None]:
        read = argument_reader(module, tap.key)
        weights = None if tap.weights is None else argument_reader(module, tap.weights)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module.training and not in_recomputation():
                used = None if weights is None else weights(args, kwargs)
                self._add(index, tap, read(args, kwargs), used)

        return hook

    def _output_hook(self, index: int, tap: Tap) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if module.training and not in_recomputation():
                value = getattr(module, str(tap.key), None) if tap.io == "attr" else item(output, tap.key)
                self._add(index, tap, value)

        return hook

    def _expert_hook(self, index: int, expert: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module.training and not in_recomputation():
                self._buffer[index, expert + 1] += leading_rows(args, kwargs) or 0

        return hook

    def _watch(self, index: int, layer: MoELayer) -> None:
        """Hook every site of a layer whose tap is unknown."""
        handles = self._handles[index]
        sites = {"experts": layer.experts_module, "router": layer.router_module, "block": layer.block_module}
        for site, name in sites.items():
            module = None if name is None else self._modules.get(name)
            if module is None:
                continue
            for io in ("in",) if site == "experts" else ("out",):
                hook = self._watching_hook(index, site, io, module)
                label = Tap(site=site, io=io, form="index")  # type: ignore[arg-type]
                register = module.register_forward_pre_hook if io == "in" else module.register_forward_hook
                handles.append((label, register(hook, with_kwargs=True)))
        for expert, name in enumerate(layer.expert_modules):
            hook = self._watching_hook(index, "experts", "call", self._modules[name], expert=expert)
            label = Tap(site="experts", io="call", form="rows")
            handles.append((label, self._modules[name].register_forward_pre_hook(hook, with_kwargs=True)))

    def _watching_hook(
        self, index: int, site: str, io: str, module: nn.Module, *, expert: int | None = None
    ) -> Callable[..., None]:
        # It looks at values, which no graph can: disabled for dynamo as a whole, so that it is right, if not fast.
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> None:
            if not module.training or in_recomputation():
                return
            watch = self._watches.get(index)
            if watch is None:
                self._count_decided(index, site, io, module, args, kwargs, output, expert)
            elif expert is not None:
                watch.observe_expert(expert, args, kwargs)
            else:
                watch.observe(site, io, args, kwargs, output)

        disable: Callable[..., Any] = torch.compiler.disable
        disabled: Callable[..., None] = disable(hook)
        return disabled

    def _count_decided(
        self, index: int, site: str, io: str, module: nn.Module, args: Any, kwargs: Any, output: Any, expert: int | None
    ) -> None:
        tap = self._all[index].tap
        if tap is None or (tap.site, tap.io) != (site, io):
            return
        if expert is not None:
            self._buffer[index, expert + 1] += leading_rows(args, kwargs) or 0
        elif io == "in":
            self._add(index, tap, argument_reader(module, tap.key)(args, kwargs))
        else:
            self._add(index, tap, item(output, tap.key))

    def _add(self, index: int, tap: Tap, value: Any, weights: Any = None) -> None:
        num_experts = self._num_experts[index]
        if tap.form == "index":
            if not isinstance(value, torch.Tensor) or value.is_floating_point():
                self._complain(index, value)
            elif not value.is_meta:
                self._add_ids(index, value, weights)
            return
        counts = tokens_per_expert(value, tap, num_experts)
        if counts is None:
            self._complain(index, value)
        elif not counts.is_meta:
            self._on(counts.device)[index, 1 : num_experts + 1].add_(counts)

    def _add_ids(self, index: int, ids: torch.Tensor, weights: Any) -> None:
        columns = (ids.detach().reshape(-1).to(torch.int64) + 1).clamp_(0, self._last)
        if isinstance(weights, torch.Tensor):
            columns = columns * (weights.detach().reshape(-1) != 0)
        # scatter_add_, not bincount: no host synchronization, no graph break.
        self._on(ids.device)[index].scatter_add_(0, columns, self._ones_for(columns))

    def _ones_for(self, flat: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or flat.device != self._ones.device:
            return torch.ones_like(flat)
        if self._ones.numel() < flat.numel():
            self._ones = torch.ones_like(flat)
        return self._ones[: flat.numel()]

    def _on(self, device: torch.device) -> torch.Tensor:
        if device == self._buffer.device:
            return self._buffer
        if device not in self._elsewhere:
            self._elsewhere[device] = torch.zeros_like(self._buffer, device=device)
        return self._elsewhere[device]

    def _complain(self, index: int, value: Any) -> None:
        if index not in self._complained:
            self._complained.add(index)
            shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            layer = self._all[index]
            _logger.warning(
                "tokens of the MoE layer %s are not counted: %s does not fit its %s experts and %s. Its experts keep "
                "their place in the order",
                layer.name,
                shape,
                layer.num_experts,
                layer.tap,
            )
