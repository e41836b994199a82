"""Discovery: replicas with the names and shapes of known libraries, hand-written layers, decoys and wrappers."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from moetion_lightning.core.discovery import discover_layers
from moetion_lightning.core.layouts import BUILT_IN_SPECS, MoELayer, MoESpec, Tap
from moetion_lightning.core.partition import build_operators
from moetion_lightning.errors import ConfigurationError, OperatorError
from moetion_lightning.moe.routing.counter import TokenCounter

HIDDEN, INNER, EXPERTS, TOP_K, TOKENS = 12, 20, 6, 2, 10


def route(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = logits.softmax(-1).topk(TOP_K, dim=-1)
    return weights, ids


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, INNER)
        self.down = nn.Linear(INNER, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))


def run_each(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, call) -> torch.Tensor:
    out = torch.zeros_like(x)
    for expert in range(EXPERTS):
        token, slot = torch.where(ids == expert)
        if len(token):
            out = out.index_add(0, token, call(expert, x[token]) * weights[token, slot, None])
    return out


class IdsRouter(nn.Module):
    """Emits (scores, ids, all scores) like torchtitan's, or in the order that is asked for."""

    def __init__(self, order: str = "wil") -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.order = order

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = self.gate(x)
        weights, ids = route(logits)
        mask = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, True)
        parts = {"w": weights, "i": ids, "l": logits, "m": mask, "p": logits.softmax(-1) * mask, "c": mask.sum(0)}
        return tuple(parts[letter] for letter in self.order)


class TitanExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1_EFD = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN) * 0.3)
        self.w2_EDF = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) * 0.3)
        self.w3_EFD = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN) * 0.3)

    def forward(self, x: torch.Tensor, weights: torch.Tensor, picked: torch.Tensor) -> torch.Tensor:
        def call(e: int, rows: torch.Tensor) -> torch.Tensor:
            return (F.silu(rows @ self.w1_EFD[e].T) * (rows @ self.w3_EFD[e].T)) @ self.w2_EDF[e].T

        return run_each(x, weights, picked, call)


class TitanMoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = IdsRouter("wil")
        self.routed_experts = nn.Module()
        self.routed_experts.inner_experts = TitanExperts()
        self.shared_experts = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids, _ = self.router(x)
        return self.routed_experts.inner_experts(x, weights, ids) + self.shared_experts(x)


class OldTitanMoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = IdsRouter("wic")
        self.experts = TitanExperts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids, _ = self.router(x)
        return self.experts(x, weights, ids)


class PackedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(EXPERTS * INNER, HIDDEN) * 0.3)
        self.w2 = nn.Parameter(torch.randn(EXPERTS * INNER, HIDDEN) * 0.3)

    def forward(self, x: torch.Tensor, weights: torch.Tensor, picked: torch.Tensor) -> torch.Tensor:
        w1, w2 = (w.view(EXPERTS, INNER, HIDDEN) for w in (self.w1, self.w2))
        return run_each(x, weights, picked, lambda e, rows: F.gelu(rows @ w1[e].T) @ w2[e])


class Megablocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = IdsRouter("lwi")
        self.experts = nn.Module()
        self.experts.mlp = PackedMLP()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, weights, ids = self.router(x)
        return self.experts.mlp(x, weights, ids.to(torch.int32))


class GroupedLinear(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer_norm_weight = nn.Parameter(torch.ones(inputs))
        for e in range(EXPERTS):
            self.register_parameter(f"weight{e}", nn.Parameter(torch.randn(outputs, inputs) * 0.3))
            self.register_parameter(f"bias{e}", nn.Parameter(torch.zeros(outputs)))


class MegatronRouter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = x @ self.weight.T
        _, ids = route(logits)
        mask = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, True)
        return logits.softmax(-1) * mask, mask


class MegatronGrouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = MegatronRouter()
        self.experts = nn.Module()
        self.experts.linear_fc1 = GroupedLinear(HIDDEN, INNER)
        self.experts.linear_fc2 = GroupedLinear(INNER, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        probabilities, chosen = self.router(x)
        fc1, fc2 = self.experts.linear_fc1, self.experts.linear_fc2
        out = torch.zeros_like(x)
        for e in range(EXPERTS):
            rows = torch.where(chosen[:, e])[0]
            inner = F.gelu(F.linear(x[rows], getattr(fc1, f"weight{e}"), getattr(fc1, f"bias{e}")))
            inner = F.linear(inner * fc2.layer_norm_weight, getattr(fc2, f"weight{e}"), getattr(fc2, f"bias{e}"))
            out = out.index_add(0, rows, inner * probabilities[rows, e, None])
        return out


class MegatronSequential(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = MegatronRouter()
        self.experts = nn.Module()
        self.experts.local_experts = nn.ModuleList(Expert() for _ in range(EXPERTS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        probabilities, chosen = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts.local_experts):
            rows = torch.where(chosen[:, e])[0]
            out = out.index_add(0, rows, expert(x[rows]) * probabilities[rows, e, None])
        return out


class DeepSpeedGate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wg = nn.Linear(HIDDEN, EXPERTS, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = self.wg(x)
        weights, ids = route(logits)
        return weights.sum(), weights, ids, torch.bincount(ids.flatten(), minlength=EXPERTS)


class DeepSpeedMoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.deepspeed_moe = nn.Module()
        self.deepspeed_moe.gate = DeepSpeedGate()
        self.deepspeed_moe.experts = nn.Module()
        self.deepspeed_moe.experts.deepspeed_experts = nn.ModuleList(Expert() for _ in range(EXPERTS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, weights, ids, _ = self.deepspeed_moe.gate(x)
        experts = self.deepspeed_moe.experts.deepspeed_experts
        return run_each(x, weights, ids, lambda e, rows: experts[e](rows))


class ScatterLinear(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, outputs, inputs) * 0.3)


class ScatterMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = ScatterLinear(HIDDEN, INNER)
        self.output_experts = ScatterLinear(INNER, HIDDEN)

    def forward(self, x: torch.Tensor, expert_p: torch.Tensor, expert_idxs: torch.Tensor) -> torch.Tensor:
        w1, w2 = self.experts.weight, self.output_experts.weight
        return run_each(x, expert_p, expert_idxs, lambda e, rows: F.gelu(rows @ w1[e].T) @ w2[e].T)


class ScatterBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.moe = ScatterMLP()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = route(self.router(x))
        return self.moe(x, weights, expert_idxs=ids)


class LinearGate(nn.Module):
    """The MoE of a textbook: a Linear gate and a ModuleList. No library, no spec."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = route(self.gate(x))
        return run_each(x, weights, ids, lambda e, rows: self.experts[e](rows))


class LooseGate(LinearGate):
    """Its gate is a bare parameter of the block."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = None
        self.gate_weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = route(x @ self.gate_weight.T)
        return run_each(x, weights, ids, lambda e, rows: self.experts[e](rows))


class CapacityMoE(nn.Module):
    """Dispatch tensor [T, E, C], as st-moe and lucidrains."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = DispatchGate()
        self.experts = CapacityExperts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dispatch, combine = self.gate(x)
        outputs = self.experts(torch.einsum("td,tec->ecd", x, dispatch))
        return torch.einsum("ecd,tec->td", outputs, combine)


class DispatchGate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w_gating = nn.Parameter(torch.randn(HIDDEN, EXPERTS))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = route(x @ self.w_gating)
        chosen = torch.zeros(len(x), EXPERTS).scatter_(1, ids, 1.0)
        place = (chosen.cumsum(0) - 1).long().clamp(min=0)
        dispatch = F.one_hot(place, TOKENS).float() * chosen[..., None]
        return dispatch, dispatch * torch.zeros_like(chosen).scatter(1, ids, weights)[..., None]


class CapacityExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) * 0.3)
        self.w2 = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN) * 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ecf,efd->ecd", F.gelu(torch.einsum("ecd,edf->ecf", x, self.w1)), self.w2)


class StMoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = DispatchGate()
        self.experts = nn.Module()
        self.experts.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dispatch, combine = self.gate(x)
        rows = torch.einsum("td,tec->ecd", x, dispatch)
        outputs = torch.stack([expert(rows[e]) for e, expert in enumerate(self.experts.experts)])
        return torch.einsum("ecd,tec->td", outputs, combine)


class FastMoE(LinearGate):
    def __init__(self) -> None:
        super().__init__()
        self.gate = IdsRouter("iw")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids, weights = self.gate(x)
        return run_each(x, weights, ids, lambda e, rows: self.experts[e](rows))


class LoadRouted(nn.Module):
    """Experts of torchtune and nanoMoE; the router emits the load, at the position that ``order`` says."""

    order = "wic"

    def __init__(self) -> None:
        super().__init__()
        self.router = IdsRouter(self.order)
        self.experts = TitanExperts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = dict(zip(self.order, self.router(x), strict=True))
        return self.experts(x, parts["w"], parts["i"])


class NanoMoE(LoadRouted):
    order = "cwi"


class Tutel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ModuleList([nn.Module()])
        self.gates[0].wg = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.Module()
        self.experts.batched_fc1_w = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN) * 0.3)
        self.experts.batched_fc2_w = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN) * 0.3)
        self.experts.batched_fc1_bias = nn.Parameter(torch.zeros(EXPERTS, INNER))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = route(self.gates[0].wg(x))
        self.dispatch_count = torch.bincount(ids.flatten(), minlength=EXPERTS)
        w1, b1, w2 = self.experts.batched_fc1_w, self.experts.batched_fc1_bias, self.experts.batched_fc2_w
        return run_each(x, weights, ids, lambda e, rows: F.gelu(rows @ w1[e].T + b1[e]) @ w2[e])


class OwnRouter(nn.Module):
    """Expert matrices and router in one module; the router is a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.router = IdsRouter("wi")
        self.w_gate = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) * 0.3)
        self.w_out = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN) * 0.3)
        self.b_out = nn.Parameter(torch.randn(EXPERTS, HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.router(x)
        return run_each(x, weights, ids, lambda e, rows: F.silu(rows @ self.w_gate[e]) @ self.w_out[e] + self.b_out[e])


class MoELora(nn.Module):
    """A frozen matrix, and LoRA experts beside it that are fused; their router is about as large as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(HIDDEN, HIDDEN).requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 2))
        self.lora_B = nn.Parameter(torch.randn(EXPERTS, 2, HIDDEN))
        self.lora_router = IdsRouter("wi")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.lora_router(x)
        return self.base(x) + run_each(x, weights, ids, lambda e, rows: rows @ self.lora_A[e] @ self.lora_B[e])


class Hierarchy(nn.Module):
    """lucidrains: an outer gate chooses a group, an inner one an expert of the group; all experts in 4-D parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_outer = DispatchGate()
        self.gate_inner = nn.Module()
        self.gate_inner.w_gating = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 3))
        self.experts = nn.Module()
        self.experts.w1 = nn.Parameter(torch.randn(EXPERTS, 3, HIDDEN, INNER) * 0.3)
        self.experts.w2 = nn.Parameter(torch.randn(EXPERTS, 3, INNER, HIDDEN) * 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dispatch, combine = self.gate_outer(x)
        rows = torch.einsum("td,tec->ecd", x, dispatch)
        inner = torch.einsum("ecd,edi->eci", rows, self.gate_inner.w_gating).softmax(-1)
        hidden = F.gelu(torch.einsum("ecd,eidf->eicf", rows, self.experts.w1))
        outputs = torch.einsum("eicf,eifd,eci->ecd", hidden, self.experts.w2, inner)
        return torch.einsum("ecd,tec->td", outputs, combine)


class Einsum(nn.Module):
    """GShard in one module: no routing decision passes a module's boundary."""

    def __init__(self) -> None:
        super().__init__()
        self.wg = nn.Parameter(torch.randn(HIDDEN, EXPERTS))
        self.wi = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) * 0.3)
        self.bi = nn.Parameter(torch.zeros(EXPERTS, INNER))
        self.wo = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN) * 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = route(x @ self.wg)
        combine = torch.zeros(len(x), EXPERTS).scatter(1, ids, weights)
        hidden = F.gelu(torch.einsum("td,edf->etf", x, self.wi) + self.bi[:, None])
        return torch.einsum("etf,efd,te->td", hidden, self.wo, combine)


class SoftList(nn.Module):
    """A soft mixture: every expert gets a mean of all tokens for each of its slots."""

    def __init__(self) -> None:
        super().__init__()
        self.slot_embeds = nn.Parameter(torch.randn(EXPERTS, 2, HIDDEN))
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = torch.einsum("td,esd->tes", x, self.slot_embeds)
        slots = torch.einsum("td,tes->esd", x, logits.softmax(0))
        outputs = torch.stack([expert(slots[e]) for e, expert in enumerate(self.experts)])
        return torch.einsum("esd,tes->td", outputs, logits.flatten(1).softmax(-1).view_as(logits))


class SoftFused(nn.Module):
    """The same in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.phi = nn.Parameter(torch.randn(HIDDEN, EXPERTS, 2))
        self.w1 = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) * 0.3)
        self.w2 = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN) * 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = torch.einsum("td,des->tes", x, self.phi)
        slots = torch.einsum("td,tes->esd", x, logits.softmax(0))
        outputs = F.gelu(slots @ self.w1) @ self.w2
        return torch.einsum("esd,tes->td", outputs, logits.flatten(1).softmax(-1).view_as(logits))


def named(cls: type[nn.Module], module: str, name: str) -> type[nn.Module]:
    """The class under the name that a library gives it."""
    return type(name, (cls,), {"__module__": module, "__qualname__": name})


REPLICAS: dict[str, tuple[type[nn.Module], str, str]] = {
    "torchtitan": (named(TitanMoE, "torchtitan.models.common.moe", "MoE"), "built-in", "index"),
    "torchtitan-old": (named(OldTitanMoE, "torchtitan.models.moe", "MoE"), "built-in", "index"),
    "torchtitan-unnamed": (OldTitanMoE, "structure", "index"),
    "megablocks": (named(Megablocks, "megablocks.layers.dmoe", "dMoE"), "built-in", "index"),
    "megatron-grouped": (named(MegatronGrouped, "megatron.core.transformer.moe.moe_layer", "MoELayer"),
                         "built-in", "mask"),
    "megatron-sequential": (named(MegatronSequential, "megatron.core.transformer.moe.moe_layer", "MoELayer"),
                            "built-in", "mask"),
    "deepspeed": (named(DeepSpeedMoE, "deepspeed.moe.layer", "MoE"), "built-in", "load"),
    "scattermoe": (ScatterBlock, "built-in", "index"),
    "lucidrains": (named(CapacityMoE, "mixture_of_experts.mixture_of_experts", "MoE"), "built-in", "dispatch"),
    "lucidrains-unnamed": (CapacityMoE, "structure", "dispatch"),
    "litgpt": (named(LinearGate, "litgpt.model", "LLaMAMoE"), "built-in", "rows"),
    "st-moe": (named(StMoE, "st_moe_pytorch.st_moe_pytorch", "MoE"), "built-in", "dispatch"),
    "fastmoe": (named(FastMoE, "fmoe.layers", "FMoE"), "built-in", "index"),
    "torchtune": (named(LoadRouted, "torchtune.modules.moe.moe", "MoE"), "built-in", "load"),
    "nanomoe": (named(NanoMoE, "model", "MOELayer"), "built-in", "load"),
    "tutel": (named(Tutel, "tutel.impls.moe_layer", "MOELayer"), "built-in", "load"),
    "lucidrains-hierarchy": (named(Hierarchy, "mixture_of_experts.mixture_of_experts", "HeirarchicalMoE"),
                             "built-in", "dispatch"),
    "hierarchy-unnamed": (Hierarchy, "structure", "dispatch"),
    "own-router": (OwnRouter, "structure", "index"),
    "moe-lora": (MoELora, "structure", "index"),
    "linear-gate": (LinearGate, "structure", "rows"),
    "loose-gate": (LooseGate, "structure", "rows"),
}  # fmt: skip
ScatterMLP.__module__, ScatterMLP.__qualname__ = "scattermoe.mlp", "MLP"


class Net(nn.Module):
    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.inp = nn.Linear(HIDDEN, HIDDEN)
        self.layers = nn.ModuleList(block() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inp(x)
        for layer in self.layers:
            x = x + layer(x)
        return x


def assert_counts_match_gradients(model: nn.Module, layers: tuple[MoELayer, ...], counts: torch.Tensor) -> None:
    parameters = dict(model.named_parameters())
    for row, layer in zip(counts, layers, strict=True):
        for tokens, pieces in zip(row.tolist(), layer.experts, strict=False):
            grads = [piece.of(parameters[piece.parameter].grad) for piece in pieces
                     if parameters[piece.parameter].grad is not None]  # fmt: skip
            assert (tokens > 0) == any(bool(grad.any()) for grad in grads)


@pytest.mark.parametrize("library", REPLICAS)
def test_replica_is_found_and_counted(library: str) -> None:
    block, source, form = REPLICAS[library]
    torch.manual_seed(1)
    model = Net(block)
    layers = discover_layers(model)
    assert [(layer.source, layer.num_experts) for layer in layers] == [(source, EXPERTS)] * 2
    counter = TokenCounter(model, layers)
    for _ in range(2):
        model(torch.randn(TOKENS // 2, HIDDEN)[: TOKENS // 2]).sum().backward()
    counts = counter.drain()
    assert not counter.rejected
    assert [layer.tap.form for layer in counter.layers if layer.tap] == [form] * 2
    assert counts.sum(dim=1).tolist() == [TOKENS * TOP_K] * 2
    assert_counts_match_gradients(model, counter.layers, counts)
    model(torch.randn(3, HIDDEN))
    assert counter.drain().sum(dim=1).tolist() == [3 * TOP_K] * 2
    operators = build_operators(
        model, counter.layers, trainable=dict(model.named_parameters()), sliceable=lambda name: True
    )
    kinds = [operator.kind.value for operator in operators.operators]
    assert kinds.count("expert") == 2 * EXPERTS
    assert kinds.count("gate") == (0 if library == "scattermoe" else 2)


class IdentityExperts(LinearGate):
    """Some of its experts have no parameters: they give back what they get."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS + 2, bias=False)
        self.experts.extend(nn.Identity() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = route(self.gate(x))
        return run_each(x, weights, ids, lambda e, rows: self.experts[e](rows))


class Switch(nn.Module):
    """The Switch Transformer's: top-1, its router emits a mask, at a place that depends on the library's version."""

    def __init__(self, place: int = 0) -> None:
        super().__init__()
        self.place = place
        self.router = IdsRouter("i")
        self.experts = nn.ModuleDict({f"expert_{i}": Expert() for i in range(EXPERTS)})
        self.router.forward = self.route  # type: ignore[method-assign]

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        probability, expert = self.router.gate(x).softmax(-1).max(-1, keepdim=True)
        parts = [probability, probability.log()]
        parts.insert(self.place, F.one_hot(expert, EXPERTS))
        return tuple(parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [*self.router(x)]
        ids = parts.pop(self.place).argmax(-1)
        return run_each(x, parts[0], ids, lambda e, rows: self.experts[f"expert_{e}"](rows))


@pytest.mark.parametrize("place", [0, 1])
def test_a_mask_is_counted_wherever_the_router_of_this_version_emits_it(place: int) -> None:
    block = named(Switch, "transformers.models.switch_transformers", "SwitchTransformersSparseMLP")
    model = Net(functools.partial(block, place))
    counter = TokenCounter(model, discover_layers(model))
    model(torch.randn(TOKENS, HIDDEN)).sum().backward()
    counts = counter.drain()
    assert counts.sum(dim=1).tolist() == [TOKENS] * 2
    assert_counts_match_gradients(model, counter.layers, counts)


def test_experts_without_parameters_are_neither_cut_nor_counted() -> None:
    torch.manual_seed(1)
    model = Net(IdentityExperts)
    counter = TokenCounter(model, discover_layers(model))
    model(torch.randn(TOKENS, HIDDEN)).sum().backward()
    counts = counter.drain()
    assert [layer.num_experts for layer in counter.layers] == [EXPERTS] * 2
    assert all(0 < total < TOKENS * TOP_K for total in counts.sum(dim=1).tolist())
    assert_counts_match_gradients(model, counter.layers, counts)


@pytest.mark.parametrize(
    ("block", "gate"),
    [(Einsum, ["wg"]), (SoftList, ["slot_embeds"]), (SoftFused, ["phi"])],
    ids=["einsum", "soft-list", "soft-fused"],
)
def test_routing_inside_of_one_module_is_found_but_cannot_be_counted(block: type[nn.Module], gate: list[str]) -> None:
    """Its experts are cut like others; what needs counts takes them for shared state, which is always whole."""
    model = Net(block)
    layers = discover_layers(model)
    assert [(layer.name, layer.num_experts) for layer in layers] == [("layers.0", EXPERTS), ("layers.1", EXPERTS)]
    assert [piece.parameter for piece in layers[0].gate] == [f"layers.0.{name}" for name in gate]
    operators = build_operators(
        model, layers, trainable=dict(model.named_parameters()), sliceable=lambda name: True
    ).operators
    experts = [op for op in operators if op.kind.value == "expert"]
    assert len(experts) == 2 * EXPERTS
    owned = {piece.parameter for op in experts for piece in op.pieces}
    assert owned == {name for name in dict(model.named_parameters()) if "layers" in name} - {
        f"layers.{i}.{name}" for i in range(2) for name in gate
    }
    counter = TokenCounter(model, layers)
    model(torch.randn(TOKENS, HIDDEN)).sum().backward()
    assert counter.drain().shape[0] == 0
    assert [layer.name for layer, _ in counter.rejected] == ["layers.0", "layers.1"]


def test_numbered_parameters_leave_the_rest_to_shared() -> None:
    model = Net(REPLICAS["megatron-grouped"][0])
    result = build_operators(
        model, discover_layers(model), trainable=dict(model.named_parameters()), sliceable=lambda name: True
    )
    (shared,) = [o for o in result.operators if o.name == "layers.0.experts.linear_fc1/shared"]
    assert [piece.parameter for piece in shared.pieces] == ["layers.0.experts.linear_fc1.layer_norm_weight"]


class Heads(nn.Module):
    """Task heads beside a projection to as many outputs: a decoy, rejected once it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Expert() for _ in range(4))
        self.mix = nn.Linear(HIDDEN, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.mix(x).softmax(-1)
        return sum((weights[..., i, None] * head(x) for i, head in enumerate(self.heads)), torch.zeros(()))


class Pyramid(nn.Module):
    """Blocks for inputs of different size, and a small head after them, as in RT-DETR."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Expert() for _ in range(2))
        self.head = nn.Linear(HIDDEN, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sizes = [self.blocks[0](x).sum(), self.blocks[1](x[::2]).sum()]
        return x * self.head(x).sum() + sum(sizes)


def test_a_head_after_the_blocks_is_no_router() -> None:
    model = Net(Pyramid)
    counter = TokenCounter(model, discover_layers(model))
    assert len(counter.pending) == 2
    model(torch.randn(6, HIDDEN)).sum().backward()
    counter.drain()
    assert counter.layers == ()


def test_a_dense_mixture_is_a_candidate_that_calibration_rejects() -> None:
    model = Net(Heads)
    layers = discover_layers(model)
    assert [layer.candidate for layer in layers] == [True, True]
    counter = TokenCounter(model, layers)
    assert counter.layers == ()
    assert len(counter.pending) == 2
    model(torch.randn(5, HIDDEN)).sum().backward()
    assert counter.drain().shape[0] == 0
    assert [layer.name for layer, _ in counter.rejected] == ["layers.0", "layers.1"]
    assert all("no routing decision" in reason for _, reason in counter.rejected)


def bank_beside_linear(shapes: dict[str, tuple[int, ...]], *linear: int) -> nn.Module:
    block = nn.Module()
    block.bank, block.out = nn.Module(), nn.Linear(*linear)
    for name, shape in shapes.items():
        block.bank.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    return nn.Sequential(block)


@pytest.mark.parametrize(
    "model",
    [
        nn.Transformer(HIDDEN, 2, 2, 2, 24, batch_first=True),
        nn.Sequential(nn.Conv1d(4, 4, 3, groups=4), nn.Linear(4, 4)),
        nn.ModuleDict({"emb": nn.Embedding(4, HIDDEN), "heads": nn.ModuleList(Expert() for _ in range(4))}),
        nn.ModuleDict({"out": nn.Linear(400, 4), "heads": nn.ModuleList(Expert() for _ in range(4))}),
        nn.LSTM(4, 4),
        nn.Linear(2, 2),
        bank_beside_linear({"w_q": (4, HIDDEN, 3), "b_q": (4, 3), "w_o": (4, 3, HIDDEN)}, HIDDEN, HIDDEN),
        bank_beside_linear({"weight": (8, HIDDEN, 3, 3), "bias": (8,)}, 8, 2),
    ],
    ids=[
        "transformer",
        "depthwise-conv",
        "embedding",
        "large-projection",
        "lstm",
        "linear",
        "attention-heads",
        "kernel",
    ],
)
def test_dense_models_have_no_layers(model: nn.Module) -> None:
    assert discover_layers(model) == ()


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Module()
        self.net.bank = PackedMLP()
        self.switch = IdsRouter("lwi")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, weights, ids = self.switch(x)
        return self.net.bank(x, weights, ids)


@pytest.mark.parametrize("tap", [None, Tap(site="experts", io="in", key=2, form="index")], ids=["calibrated", "given"])
def test_a_user_spec_describes_what_no_rule_finds(tap: Tap | None) -> None:
    model = Net(Custom)
    assert discover_layers(model) == ()
    spec = MoESpec(block=r".*\.Custom", experts="net.bank", router="switch", pack="rows", tap=tap)
    layers = discover_layers(model, [spec])
    counter = TokenCounter(model, layers)
    model(torch.randn(TOKENS, HIDDEN)).sum().backward()
    counts = counter.drain()
    assert counts.sum(dim=1).tolist() == [TOKENS * TOP_K] * 2
    assert_counts_match_gradients(model, counter.layers, counts)


def test_a_user_spec_comes_before_the_table() -> None:
    model = Net(REPLICAS["torchtitan-old"][0])
    (layer, _) = discover_layers(model, [MoESpec(block=r"torchtitan\..*\.MoE", router="router")])
    assert layer.source == "user"


def test_a_spec_that_matches_nothing_names_near_classes() -> None:
    with pytest.raises(OperatorError, match=r"matches no module.*LinearGate"):
        discover_layers(Net(LinearGate), [MoESpec(block=r".*\.LinearGat")])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (MoESpec(block=r".*\.LinearGate", experts="expert"), r"no 'layers\.0\.expert'.*experts"),
        (MoESpec(block=r".*\.LinearGate", router="router"), r"no 'layers\.0\.router'"),
        (MoESpec(block=r".*\.LinearGate", pack="dim0"), "pack='dim0'"),
    ],
)
def test_a_spec_that_does_not_fit_is_an_error(spec: MoESpec, message: str) -> None:
    with pytest.raises(OperatorError, match=message):
        discover_layers(Net(LinearGate), [spec])


def test_impossible_descriptions_are_refused_at_construction() -> None:
    with pytest.raises(ConfigurationError, match="site='expert'"):
        Tap(site="expert", io="in", form="index")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="pack='fused'"):
        MoESpec(block=".*", pack="fused")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="regular expression"):
        MoESpec(block="(")
    with pytest.raises(ConfigurationError, match="top_k"):
        Tap(site="router", io="out", form="logits")
    with pytest.raises(ConfigurationError, match="belong together"):
        Tap(site="experts", io="call", form="index")
    with pytest.raises(ConfigurationError, match="attribute"):
        Tap(site="block", io="attr", form="load")


def test_the_table_covers_the_libraries_that_were_read() -> None:
    table = " ".join(spec.block for spec in BUILT_IN_SPECS)
    for library in ("Dbrx", "JetMoe", "Llama4", "SwitchTransformers", "NllbMoe", "deepspeed", "torchtitan", "megatron",
                    "megablocks", "scattermoe", "tutel", "fmoe", "st_moe_pytorch", "mixture_of_experts", "MOELayer",
                    "torchtune", "litgpt"):  # fmt: skip
        assert library in table


def test_wrappers_change_neither_names_nor_counts() -> None:
    model = Net(REPLICAS["torchtitan"][0])
    for i, layer in enumerate(model.layers):
        model.layers[i] = checkpoint_wrapper(layer)
    layers = discover_layers(model)
    assert [layer.name for layer in layers] == ["layers.0", "layers.1"]
    counter = TokenCounter(model, layers)
    model(torch.randn(TOKENS, HIDDEN)).sum().backward()
    assert counter.drain().sum(dim=1).tolist() == [TOKENS * TOP_K] * 2


class Plan(nn.Module):
    """What discovery reads of a PreTrainedModel: its plan, relative to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.ep_plan = {"model.layers.*.experts": "ep_dispatch_experts", "model.layers.*.experts.w*": "grouped_gemm"}
        self.model = Net(OldTitanMoE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_a_plan_is_read_at_any_depth(depth: int) -> None:
    model: nn.Module = Plan()
    for _ in range(depth):
        outer = nn.Module()
        outer.inner = model
        model = outer
    layers = discover_layers(model)
    assert [layer.source for layer in layers] == ["ep_plan"] * 2
    assert layers[0].experts_module == "inner." * depth + "model.layers.0.experts"
