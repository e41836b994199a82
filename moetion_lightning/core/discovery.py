"""Find the MoE layers of any module.

Rules, first match wins: the user's specs, the built-in table, the expert-parallel plan that transformers models
publish, the name of a ``forward`` argument, and last the bare structure. The structural rule gives *candidates*: they
are cut like MoE layers, and where tokens are counted they stay so once the first training iteration shows a routing
decision (:mod:`moetion_lightning.moe.routing.calibration`).
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from moetion_lightning.core.layouts import BUILT_IN_SPECS, MoELayer, MoESpec, Tap
from moetion_lightning.core.operators import Piece, clean_name
from moetion_lightning.core.packing import Experts, ModuleIndex, fused, pack_experts, router_rows, submodules
from moetion_lightning.errors import OperatorError

__all__ = ["discover_layers"]

INDEX_ARGUMENTS = (
    "top_k_index", "top_k_indices", "topk_index", "topk_indices", "topk_idx", "topk_ids", "router_indices",
    "selected_experts", "selected_experts_indices", "expert_idxs", "expert_indices", "expert_ids",
)  # fmt: skip
ROUTER_NAMES = ("gate", "router", "gates", "gating", "wg", "routing")
SLOT_NAMES = ("slot", "slots", "phi")  # of soft mixtures
ALSO_GATE = ("expert_bias", "e_score_correction_bias", "correction_bias", "moe_statics")
# A router is small beside its experts; class heads and up-projections are not. One that is named so may be as large as
# they are: experts of a few rows each (LoRA).
MAX_ROUTER_SHARE = 0.10

#: Block, router module, and parameters of the router outside of that module.
_Router = tuple[str, str | None, list[str]]


def discover_layers(module: nn.Module, specs: Sequence[MoESpec] = ()) -> tuple[MoELayer, ...]:
    """The MoE layers of a module, in module order.

    Call it on the module whose ``named_parameters()`` names the operators (wrapped, quantized and compiled as it will
    train), before its first forward. Reads names, shapes and signatures only; nothing is run or copied.

    Args:
        module: Any module: a bare model, a LightningModule around one, a dense model (no layers).
        specs: The user's descriptions; they come before the built-in ones.

    Returns:
        The layers. Those with ``candidate`` set, or without ``tap``, need calibration.

    Raises:
        OperatorError: A user's spec matches no module, or its paths do not exist in the module that it matches.
    """
    index = ModuleIndex(module)
    found = _Found(index)
    _from_specs(found, specs, user=True)
    _from_specs(found, BUILT_IN_SPECS, user=False)
    _from_plans(found)
    _from_signatures(found)
    _from_structure(found)
    return found.in_order()


class _Found:
    """The layers found so far, and which containers they use, so that no module is claimed twice."""

    def __init__(self, index: ModuleIndex) -> None:
        self.index = index
        self._layers: dict[str, MoELayer] = {}
        self._containers: set[str] = set()

    def overlaps(self, container: str) -> bool:
        """Whether a container is, holds, or lies in one that is already known."""
        prefix = f"{container}." if container else ""
        return any(
            known == container or known.startswith(prefix) or container.startswith(f"{known}.")
            for known in self._containers
        )

    def is_gate(self, name: str) -> bool:
        """Whether a module owns a part of the router of a layer that is already known."""
        gates = {piece.parameter for layer in self._layers.values() for piece in layer.gate}
        return not gates.isdisjoint(self.index.own_parameters(name))

    def add(
        self,
        source: str,
        block: str,
        containers: Sequence[str],
        experts: Experts,
        router: str | None,
        tap: Tap | None,
        *,
        gate_parameters: Iterable[str] = (),
        candidate: bool = False,
    ) -> None:
        container = containers[0]
        self._containers.update(containers)
        owned = {piece.parameter for pieces in experts.pieces for piece in pieces}
        names = dict.fromkeys(gate_parameters)
        if router is not None:
            names.update(dict.fromkeys(self.index.parameters_of(router)))
        taken = {layer.name for layer in self._layers.values()}
        name = clean_name(block)
        self._layers[container] = MoELayer(
            name=clean_name(container) if name in taken else name,
            num_experts=len(experts.pieces),
            experts=experts.pieces,
            gate=tuple(Piece(parameter=name) for name in names if name not in owned),
            tap=tap,
            candidate=candidate,
            block_module=block,
            experts_module=container,
            router_module=router,
            expert_modules=experts.modules,
            source=source,
        )

    def in_order(self) -> tuple[MoELayer, ...]:
        position = {name: i for i, name in enumerate(self.index.modules)}
        return tuple(layer for _, layer in sorted(self._layers.items(), key=lambda item: position[item[0]]))


def _from_specs(found: _Found, specs: Sequence[MoESpec], *, user: bool) -> None:
    index = found.index
    for spec in specs:
        matched = index.of_classes(re.compile(spec.block))
        for name in matched:
            block = index.modules[name]
            paths = [index.join(name, path) for path in spec.expert_paths]
            router = None if spec.router is None else index.join(name, spec.router)
            missing = [p for p in (*paths, router) if p is not None and p not in index.modules]
            problem = f"it has no {missing[0]!r}" if missing else ""
            experts = None
            if not missing and not any(found.overlaps(path) for path in paths):
                hint = 0 if router is None else router_rows(index, router)
                experts = pack_experts(index, paths, spec.pack, num_experts=hint)
                problem = "" if experts else f"no expert parameters of the kind pack={spec.pack!r} in {paths}"
            if problem and user:
                near = [path for child in index.below(name) if (path := index.relative(name, child))]
                raise OperatorError(
                    f"MoESpec(block={spec.block!r}) matches {name or 'the module'!r} ({type(block).__name__}), but "
                    f"{problem}; its modules are {near[:12]}. Correct `experts`, `router` or `pack`"
                )
            if experts is None:
                continue
            also = [index.join(name, path) for path in spec.also_gate]
            found.add(
                "user" if user else "built-in", name, paths, experts, router, spec.tap,
                gate_parameters=[index.canonical[path] for path in also if path in index.canonical],
            )  # fmt: skip
        if user and not matched:
            _raise_no_match(index, spec)


def _raise_no_match(index: ModuleIndex, spec: MoESpec) -> None:
    classes = sorted({f"{type(m).__module__}.{type(m).__qualname__}" for m in index.modules.values()})
    wanted = re.sub(r"[^\w]+", " ", spec.block).split()
    plain = [c.rpartition(".")[2] for c in classes]
    near = difflib.get_close_matches(wanted[-1] if wanted else "", plain, n=5, cutoff=0.3)
    listed = [c for c in classes if c.rpartition(".")[2] in near] or classes[:10]
    raise OperatorError(
        f"MoESpec(block={spec.block!r}) matches no module; expected a regular expression that matches 'module.Class' "
        f"completely. Near classes: {', '.join(listed)}. Correct the expression, or remove the spec"
    )


def _from_plans(found: _Found) -> None:
    """Read ``ep_plan`` of every submodule that has one: it belongs to the inner PreTrainedModel, at any depth."""
    index = found.index
    for root, model in index.modules.items():
        plan = getattr(model, "ep_plan", None) or getattr(getattr(model, "config", None), "base_model_ep_plan", None)
        if not isinstance(plan, dict) or "ep_dispatch_experts" not in plan.values():
            continue
        containers = [_plan_pattern(key) for key, style in plan.items() if style == "ep_dispatch_experts"]
        sharded = [_plan_pattern(key) for key, style in plan.items() if style == "grouped_gemm"]
        for name in index.below(root):
            relative = index.relative(root, name)
            if not any(p.fullmatch(relative) for p in containers) or found.overlaps(name):
                continue
            names = [n for n in index.parameters_of(name) if any(p.fullmatch(index.relative(root, n)) for p in sharded)]
            experts = fused(index, names)
            if experts is None:
                continue
            block = index.parent(name)
            found.add("ep_plan", block, [name], experts, _named_router(index, block, name),
                      _index_tap(index.modules[name]), gate_parameters=_loose_gate(index, block))  # fmt: skip


def _plan_pattern(key: str) -> re.Pattern[str]:
    return re.compile(re.escape(key).replace(r"\*", r"[^.]+"))


def _index_tap(experts: nn.Module) -> Tap:
    names = _forward_arguments(experts)
    named = next((name for name in INDEX_ARGUMENTS if name in names), None)
    return Tap(site="experts", io="in", key=named or 1, form="index")


def _forward_arguments(module: nn.Module) -> Sequence[str]:
    # The class's forward: expert parallelism replaces the instance's by one that takes *args.
    return _arguments(type(module).forward)


@functools.lru_cache(maxsize=4096)
def _arguments(forward: Callable[..., Any]) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(forward).parameters)[1:]
    except (TypeError, ValueError):
        return ()


def _named_router(index: ModuleIndex, block: str, container: str) -> str | None:
    for router in ROUTER_NAMES:
        name = index.join(block, router)
        if name in index.modules and name != container and index.parameters_of(name):
            return name
    return None


def _loose_gate(index: ModuleIndex, block: str) -> list[str]:
    """Parameters of the gate that sit in the block itself."""
    names = [index.join(block, name) for name in ALSO_GATE]
    return [index.canonical[name] for name in names if name in index.canonical]


def _from_signatures(found: _Found) -> None:
    index = found.index
    # Innermost first: a block may pass the ids through to the container that owns the parameters.
    for name in sorted(index.modules, key=lambda n: -n.count(".")):
        module = index.modules[name]
        if not name or not set(INDEX_ARGUMENTS) & set(_forward_arguments(module)) or found.overlaps(name):
            continue
        experts = pack_experts(index, [name], "auto", num_experts=0)
        if experts is None:
            continue
        block = index.parent(name)
        found.add("signature", block, [name], experts, _named_router(index, block, name), _index_tap(module),
                  gate_parameters=_loose_gate(index, block))  # fmt: skip


def _from_structure(found: _Found) -> None:
    index = found.index
    # Innermost first; of those the largest: in a hierarchy the inner routers are a bank of matrices, too.
    for name in sorted(index.modules, key=lambda n: (-n.count("."), -index.size(n))):
        module = index.modules[name]
        if not name or found.overlaps(name) or found.is_gate(name) or isinstance(module, nn.modules.conv._ConvNd):
            continue  # a depthwise kernel is 3-D too
        router: _Router | None = None
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            experts = submodules(index, [name])
        else:
            experts, router = _bank(index, name)
        if experts is not None:
            router = router or _router_beside(index, name, len(experts.pieces))
            if router is None and experts.modules:  # experts without parameters (identity) are routed to as well
                router = _router_beside(index, name, len(module._modules))
        if experts is None or router is None:
            continue
        block, router_module, loose = router
        # Kernels of more than one dimension are as deep as experts of a hierarchy: there only a name tells.
        deep = max(index.parameters[piece.parameter].dim() for piece in experts.pieces[0]) > 3
        if not deep or _is_named(router_module or loose[0], ROUTER_NAMES):
            found.add("structure", block, [name], experts, router_module, None, candidate=True,
                      gate_parameters=[*loose, *_loose_gate(index, block)])  # fmt: skip


def _bank(index: ModuleIndex, name: str) -> tuple[Experts | None, _Router | None]:
    """Experts that are rows of a module's own parameters, and the router if the module owns that, too.

    Written so are einsum layers (GShard), mixtures of LoRAs beside a frozen matrix, and soft mixtures.
    """
    shapes = {n: tuple(index.parameters[n].shape) for n in index.own_parameters(name)}
    deep = {n: shape for n, shape in shapes.items() if len(shape) >= 3 and not _is_named(n, SLOT_NAMES)}
    if not deep:
        return None, None
    experts = max(deep.values(), key=math.prod)[0]
    banks = [n for n, shape in deep.items() if shape[0] == experts]
    # Tokens go in along one of the experts' dimensions. A matrix [E, width] is a bias, unless its name says otherwise.
    widths = {size for n in banks for size in shapes[n][1:]}
    routes = [
        n for n, shape in shapes.items() if n not in banks and len(shape) >= 2 and experts in shape
        and widths.intersection(shape) and (shape[0] != experts or _is_named(n, ROUTER_NAMES + SLOT_NAMES))
    ]  # fmt: skip
    if any(n not in banks and n not in routes for n in deep):
        return None, None
    biases = [n for n, shape in shapes.items() if len(shape) == 2 and shape[0] == experts and n not in routes]
    return fused(index, [*banks, *biases]), (name, None, routes) if routes else _router_in(index, name, name, experts)


def _router_beside(index: ModuleIndex, container: str, experts: int) -> _Router | None:
    """The router of a container: in its parent, or its grandparent."""
    limit = MAX_ROUTER_SHARE * index.size(container)
    block = container
    for _ in range(2):
        if not block:
            return None
        block = index.parent(block)
        router = _router_in(index, block, container, experts)
        if router is not None:
            return router
        loose = [
            n for n in index.own_parameters(block)
            if experts in (parameter := index.parameters[n]).shape and parameter.numel() <= limit
            and (parameter.dim() == 2 or (parameter.dim() == 3 and _is_named(n, SLOT_NAMES)))
        ]  # fmt: skip
        if loose:
            return block, None, loose[:1]
    return None


def _router_in(index: ModuleIndex, block: str, container: str, experts: int) -> _Router | None:
    """The child of a block that routes to a container; in a hierarchy, with the parameters of the inner routers."""
    size = index.size(container)
    matches = [c for c in _siblings(index, block, container) if _is_router(index, c, experts, size)]
    if not matches:
        return None
    first, *others = sorted(matches, key=lambda n: (not _is_named(n, ROUTER_NAMES), index.size(n)))
    inner = [name for other in others if _is_named(other, ROUTER_NAMES) for name in index.parameters_of(other)]
    return block, first, inner


def _siblings(index: ModuleIndex, block: str, container: str) -> Iterator[str]:
    for child, _ in index.modules[block].named_children():
        name = index.join(block, child)
        if name in index.modules and name != container and not container.startswith(f"{name}."):
            yield name


def _is_router(index: ModuleIndex, name: str, experts: int, size: int) -> bool:
    if any(isinstance(index.modules[n], nn.Embedding) for n in index.below(name)):
        return False
    named = _is_named(name, ROUTER_NAMES)
    if index.size(name) > size * (1 if named else MAX_ROUTER_SHARE):
        return False
    shapes = [index.parameters[n].shape for n in index.parameters_of(name)]
    return any(len(shape) in ((2, 3) if named else (2,)) and experts in shape for shape in shapes)


def _is_named(name: str, words: Collection[str]) -> bool:
    """Whether the last component of a name says so: ``lora_router`` does, ``gate_up_proj_bias`` does not."""
    parts = set(name.rpartition(".")[2].lower().split("_"))
    return not parts.isdisjoint(words) and parts.isdisjoint(("proj", "bias", "up", "down"))
