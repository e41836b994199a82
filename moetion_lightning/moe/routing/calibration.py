"""Find the routing decision of a layer while the first training iteration runs.

A layer without a tap is watched at its experts' input, its router's output, its block's output and the calls of its
experts. Every form that a value *may* be is counted from the first call on; when the iteration is over, the best form
that held in every call is kept, with its counts. So the first iteration is counted exactly too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moetion_lightning.core.layouts import MoELayer, Tap
from moetion_lightning.moe.routing.forms import leading_rows, tokens_per_expert

__all__ = ["Calibration", "possible_forms"]

FORMS = ("index", "mask", "load", "dispatch", "rows", "logits")
SITES = ("experts", "router", "block")
_TOP_K_NAMES = (
    "top_k", "topk", "k", "num_experts_per_tok", "num_experts_per_token", "n_expert_per_token", "experts_per_token",
    "moe_top_k", "num_selected_experts",
)  # fmt: skip


@dataclass(kw_only=True)
class _Observed:
    calls: int = 0
    counts: torch.Tensor | None = None


class Calibration:
    """Watches one layer for one iteration.

    Args:
        layer: The layer, with ``tap=None``.
        modules: The module tree by name; read for the router's ``top_k``.
    """

    def __init__(self, layer: MoELayer, modules: Mapping[str, nn.Module]) -> None:
        self.layer = layer
        self._calls: dict[tuple[str, str], int] = {}
        self._observed: dict[Tap, _Observed] = {}
        self._router_rows = 0
        self._experts_first = False
        self._top_k = _top_k(layer, modules)

    @property
    def seen(self) -> bool:
        """Whether anything was called in training."""
        return bool(self._calls)

    def observe(self, site: str, io: str, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        """Look at one call of a site: its inputs (``io="in"``) or its output (``io="out"``)."""
        self._calls[site, io] = self._calls.get((site, io), 0) + 1
        rows = leading_rows(args, kwargs)
        if site == "router" and io == "out":
            self._router_rows += rows or 0
        for key, value in _items(args, kwargs) if io == "in" else _items_of_output(output):
            for form in possible_forms(value, self.layer.num_experts, rows):
                if form == "logits" and (self._top_k is None or site != "router"):
                    continue
                top_k = self._top_k if form == "logits" else None
                tap = Tap(site=site, io=io, key=key, form=form, top_k=top_k)  # type: ignore[arg-type]
                self._count(tap, value)

    def observe_expert(self, expert: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Look at one call of a single expert."""
        self._calls["experts", "call"] = 1
        if self.layer.router_module is not None and ("router", "out") not in self._calls:
            self._experts_first = True
        tap = Tap(site="experts", io="call", form="rows")
        observed = self._observed.setdefault(tap, _Observed(calls=1))
        if observed.counts is None:
            observed.counts = torch.zeros(self.layer.num_experts, dtype=torch.int64)
        observed.counts[expert] += leading_rows(args, kwargs) or 0

    def decide(self) -> tuple[Tap, torch.Tensor] | str:
        """The tap and the counts so far (int64 ``[E]``, on CPU), or why this is not an MoE layer."""
        if not self.seen:
            return "it was not called in the first training iteration"
        valid = [(tap, seen.counts) for tap, seen in self._observed.items() if self._holds(tap, seen)]
        found = [(tap, counts) for tap, counts in valid if counts is not None]
        if not found:
            return "no routing decision passes at its experts, its router or its block"
        return min(found, key=lambda entry: (FORMS.index(entry[0].form), SITES.index(entry[0].site)))

    def _count(self, tap: Tap, value: Any) -> None:
        num_experts = self.layer.num_experts
        if tap.form == "index":
            ids = value.reshape(-1).to(device="cpu", dtype=torch.int64)
            counts = torch.bincount(ids[(ids >= 0) & (ids < num_experts)], minlength=num_experts)
        else:
            counted = tokens_per_expert(value, tap, num_experts)
            if counted is None:
                return
            counts = counted.cpu()
        observed = self._observed.setdefault(tap, _Observed())
        observed.calls += 1
        observed.counts = counts if observed.counts is None else observed.counts + counts

    def _holds(self, tap: Tap, observed: _Observed) -> bool:
        if observed.counts is None or not int(observed.counts.sum()):
            return False
        if tap.form != "rows":
            # A form that fits only some of the calls fits by chance.
            return observed.calls == self._calls[tap.site, tap.io]
        if self._experts_first:
            return False  # a head after the blocks is no router
        # Every expert sees every token: a dense mixture, or heads beside a projection.
        alike = bool((observed.counts == observed.counts[0]).all())
        return not (alike and self._router_rows in (0, int(observed.counts[0])))


def _top_k(layer: MoELayer, modules: Mapping[str, nn.Module]) -> int | None:
    for name in (layer.router_module, layer.block_module, layer.experts_module):
        module = None if name is None else modules.get(name)
        for attribute in _TOP_K_NAMES:
            value = getattr(module, attribute, None)
            if isinstance(value, int) and not isinstance(value, bool) and 1 <= value < layer.num_experts:
                return value
    return None


def _items(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[int | str | None, Any]]:
    return [*enumerate(args), *kwargs.items()]


def _items_of_output(output: Any) -> list[tuple[int | str | None, Any]]:
    if isinstance(output, Mapping):
        return list(output.items())
    if isinstance(output, (tuple, list)):
        return list(enumerate(output))
    return [(None, output)]


def possible_forms(value: Any, num_experts: int, rows: int | None) -> list[str]:
    """The forms that a value may be, judged by its shape, type and values (synchronizes the device).

    Args:
        value: Anything that passes a module boundary.
        num_experts: E.
        rows: Tokens in the same call, None if unknown.

    Returns:
        Names of forms, best first; empty if the value is no routing decision.
    """
    if isinstance(value, list) and len(value) == num_experts and all(type(v) is int and v >= 0 for v in value):
        return ["load"]
    if not isinstance(value, torch.Tensor) or not value.numel() or value.is_complex():
        return []
    value = value.detach()
    integer = not value.is_floating_point() and value.dtype != torch.bool
    forms = []
    if integer and _is_index(value, num_experts, rows):
        forms.append("index")
    if _is_mask(value, num_experts, rows):
        forms.append("mask")
    if _is_load(value, num_experts, rows):
        forms.append("load")
    if _is_dispatch(value, num_experts, rows):
        forms.append("dispatch")
    scores = value.is_floating_point() and value.dim() >= 2 and value.shape[-1] == num_experts
    if scores and not forms and rows in (None, value.numel() // num_experts):
        forms.append("logits")
    return forms


def _is_index(value: torch.Tensor, num_experts: int, rows: int | None) -> bool:
    if value.dim() == 1:
        value = value.unsqueeze(-1)
        if value.shape[0] in (num_experts, 0) or value.shape[0] != rows:
            return False
    top_k = value.shape[-1]
    if top_k > num_experts or (rows is not None and value.numel() // top_k != rows):
        return False
    if int(value.min()) < 0 or int(value.max()) >= num_experts:
        return False
    ordered = value.sort(dim=-1).values
    return not bool((ordered[..., 1:] == ordered[..., :-1]).any())  # a token goes to distinct experts


def _is_mask(value: torch.Tensor, num_experts: int, rows: int | None) -> bool:
    if value.dim() < 2 or value.shape[-1] != num_experts or rows not in (None, value.numel() // num_experts):
        return False
    chosen = (value != 0).reshape(-1, num_experts).sum(dim=-1)
    if value.is_floating_point():
        top_k = int(chosen[0])
        return 1 <= top_k < num_experts and bool((chosen == top_k).all())
    binary = value.dtype == torch.bool or (int(value.min()) >= 0 and int(value.max()) <= 1)
    return binary and 0 < int(chosen.sum()) < value.numel()


def _is_load(value: torch.Tensor, num_experts: int, rows: int | None) -> bool:
    if value.dim() != 1 or value.numel() != num_experts or value.dtype == torch.bool:
        return False
    total = float(value.sum())
    whole = bool((value >= 0).all()) and bool((value == value.round()).all()) if value.is_floating_point() else True
    if value.is_floating_point() and (rows is None or total < rows):
        return False
    return whole and float(value.min()) >= 0 and total > 0 and (rows is None or total <= rows * num_experts)


def _is_dispatch(value: torch.Tensor, num_experts: int, rows: int | None) -> bool:
    if value.dim() < 3 or value.shape[-2] != num_experts:
        return False
    tokens = value.numel() // (num_experts * value.shape[-1])
    used = value != 0
    if rows not in (None, tokens) or not bool(used.any()) or tokens < 2:
        return False
    return int(used.sum(dim=-3).max()) <= 1  # a place in an expert's buffer holds one token
