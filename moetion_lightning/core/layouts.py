"""Known MoE layouts: a small vocabulary, and the table of the libraries that it describes.

Three types are enough for every library that was read: where the routing decision passes (:class:`Tap`), how a class
of MoE blocks is built (:class:`MoESpec`), and one such layer in one module (:class:`MoELayer`). Most transformers
families need no row here, because they publish an expert-parallel plan that ``discovery`` reads.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from moetion_lightning.core.operators import Piece
from moetion_lightning.errors import ConfigurationError

__all__ = ["BUILT_IN_SPECS", "MoELayer", "MoESpec", "Tap"]

Site = Literal["experts", "router", "block"]
Direction = Literal["in", "out", "attr", "call"]
Form = Literal["index", "mask", "load", "dispatch", "rows", "logits"]
Pack = Literal["auto", "dim0", "rows", "list", "numbered"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "site": ("experts", "router", "block"),
    "io": ("in", "out", "attr", "call"),
    "form": ("index", "mask", "load", "dispatch", "rows", "logits"),
    "pack": ("auto", "dim0", "rows", "list", "numbered"),
}


def _check_choice(owner: str, field: str, value: str) -> None:
    if value not in _CHOICES[field]:
        raise ConfigurationError(f"{owner}({field}={value!r}): expected one of {', '.join(_CHOICES[field])}")


@dataclass(frozen=True, kw_only=True)
class Tap:
    """Where the routing decision of an MoE layer passes, and in which form.

    Args:
        site: The module to hook: the experts container, the router, or the block that owns both.
        io: Its input, its output, an attribute read after its forward, or the calls of the single experts.
        key: Position or argument name (``in``), index in the output tuple or None for the output itself (``out``),
            attribute name (``attr``).
        form: ``index`` integer ids ``[..., k]``; ``mask`` ``[..., E]``, nonzero where chosen; ``load`` tokens per
            expert ``[E]`` (tensor or list); ``dispatch`` ``[..., E, capacity]``; ``rows`` the rows that each expert
            is called with; ``logits`` ``[..., E]``, of which the highest ``top_k`` are taken.
        weights: For ``index`` from ``in``: position of the routing weights; ids with weight zero are not counted.
        top_k: For ``logits``: number of experts a token.

    Raises:
        ConfigurationError: A field is none of its choices.
    """

    site: Site
    io: Direction
    key: int | str | None = None
    form: Form
    weights: int | None = None
    top_k: int | None = None

    def __post_init__(self) -> None:
        _check_choice("Tap", "site", self.site)
        _check_choice("Tap", "io", self.io)
        _check_choice("Tap", "form", self.form)
        if self.io == "attr" and not isinstance(self.key, str):
            raise ConfigurationError(f"Tap(io='attr', key={self.key!r}): expected the name of an attribute")
        if (self.io == "call") != (self.form == "rows"):
            raise ConfigurationError(
                f"Tap(io={self.io!r}, form={self.form!r}): io='call' and form='rows' belong together"
            )
        if self.form == "logits" and self.top_k is None:
            raise ConfigurationError("Tap(form='logits') needs top_k, the number of experts a token")


@dataclass(frozen=True, kw_only=True)
class MoESpec:
    r"""How a class of MoE blocks is built.

    Args:
        block: Regular expression that must match ``"module.Class"`` of any class in the block's MRO, completely.
        experts: Path(s) from the block to the module(s) that own the expert parameters; ``""`` is the block itself.
        router: Path from the block to the router, or None if the caller routes.
        pack: ``dim0`` fused ``[E, ...]``; ``rows`` packed ``[E*r, ...]``; ``list`` a ModuleList or ModuleDict;
            ``numbered`` parameters ``weight0 .. weightN``; ``auto`` finds out.
        tap: Where to count tokens; None lets the first training iteration find it.
        also_gate: Further parameters of the gate, as paths from the block.

    Raises:
        ConfigurationError: The regular expression does not compile, or ``pack`` is unknown.

    Example:
        >>> spec = MoESpec(block=r".*\.MyMoE", experts="ffn.experts", router="gate")
        >>> spec.pack
        'auto'
    """

    block: str
    experts: str | tuple[str, ...] = "experts"
    router: str | None = "gate"
    pack: Pack = "auto"
    tap: Tap | None = None
    also_gate: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_choice("MoESpec", "pack", self.pack)
        try:
            re.compile(self.block)
        except re.error as error:
            raise ConfigurationError(
                f"MoESpec(block={self.block!r}) is no regular expression: {error}; expected a pattern for "
                "'module.Class', for example r'my_model\\.MoEBlock'"
            ) from error

    @property
    def expert_paths(self) -> tuple[str, ...]:
        """``experts`` as a tuple."""
        return (self.experts,) if isinstance(self.experts, str) else self.experts


@dataclass(frozen=True, kw_only=True)
class MoELayer:
    """One MoE layer of one module.

    Args:
        name: Name of the block, free of wrapper components.
        num_experts: Experts that own parameters (E).
        experts: The pieces of each expert, ``num_experts`` entries.
        gate: The pieces of the gate; may be empty.
        tap: Where to count tokens, or None until calibrated.
        candidate: Found by structure only: an MoE layer once calibration confirms it.
        block_module: Name of the block in ``module.named_modules()``.
        experts_module: Name of the (first) experts container there.
        router_module: Name of the router there, if it is a module.
        expert_modules: Names of the single experts there, where each is a module.
        source: Which rule found it: user, built-in, ep_plan, signature or structure.
    """

    name: str
    num_experts: int
    experts: tuple[tuple[Piece, ...], ...]
    gate: tuple[Piece, ...] = ()
    tap: Tap | None = None
    candidate: bool = False
    block_module: str = ""
    experts_module: str = ""
    router_module: str | None = None
    expert_modules: tuple[str, ...] = ()
    source: str = "user"


def _input(key: int | str, *, weights: int | None = None, site: Site = "experts") -> Tap:
    return Tap(site=site, io="in", key=key, form="index", weights=weights)


def _router(key: int | None, form: Form) -> Tap:
    return Tap(site="router", io="out", key=key, form=form)


_ROWS = Tap(site="experts", io="call", form="rows")
_SCATTERMOE = _input("expert_idxs", site="block")
_TUTEL = Tap(site="block", io="attr", key="dispatch_count", form="load")

# The first row that matches a class, and whose paths exist in the instance, wins.
# fmt: off
BUILT_IN_SPECS: tuple[MoESpec, ...] = (
    # transformers: families without an expert-parallel plan, also in its newest version. Where the decision passes
    # differs from version to version in two of them: they are calibrated.
    MoESpec(block=r"transformers.*\.DbrxFFN", router="router", pack="rows"),
    MoESpec(block=r"transformers.*\.JetMoeMo[EA]", experts=("input_linear", "output_linear"), router="router",
            pack="dim0", tap=_router(3, "load")),
    # Every expert gets all tokens, scaled by sigmoid(-inf) = 0 where it was not chosen.
    MoESpec(block=r"transformers.*\.Llama4TextMoe", router="router", pack="dim0", tap=_router(0, "mask")),
    MoESpec(block=r"transformers.*\.SwitchTransformersSparseMLP", router="router", pack="list"),
    MoESpec(block=r"transformers.*\.NllbMoeSparseMLP", router="router", pack="list", tap=_router(0, "mask")),
    # Has a plan, but sends the tokens of its "skip" expert to expert 0 with weight 0.
    MoESpec(block=r"transformers.*\.ZayaSparseMoeBlock", pack="dim0", tap=_input(1, weights=2)),
    # DeepSpeed 2026-08: the last output of the gate is the count before the capacity drop.
    MoESpec(block=r"deepspeed\..*\.MoE", experts="deepspeed_moe.experts.deepspeed_experts",
            router="deepspeed_moe.gate", pack="list", tap=_router(-1, "load")),
    # torchtitan 2026-08, then older releases.
    MoESpec(block=r"torchtitan\..*MoE", experts="routed_experts.inner_experts", router="router", pack="dim0",
            tap=_router(1, "index"), also_gate=("expert_bias", "expert_bias_E")),
    MoESpec(block=r"torchtitan\..*MoE", router="router", pack="dim0", tap=_router(1, "index"),
            also_gate=("expert_bias",)),
    # Megatron-core 2026-08: SequentialMLP, then TEGroupedMLP.
    MoESpec(block=r"megatron\..*\.MoELayer", experts="experts.local_experts", router="router", pack="list",
            tap=_router(1, "mask")),
    MoESpec(block=r"megatron\..*\.MoELayer", router="router", pack="numbered", tap=_router(1, "mask")),
    # megablocks 2025-06: dMoE packs rows, MoE keeps a 3-D tensor.
    MoESpec(block=r"megablocks\..*\.dMoE", experts="experts.mlp", router="router", pack="rows",
            tap=_router(2, "index")),
    MoESpec(block=r"megablocks\..*\.MoE", experts="experts.mlp", router="router", tap=_router(2, "index")),
    MoESpec(block=r"scattermoe\..*\.(GLU)?MLP", experts=("experts", "output_experts"), router=None, pack="dim0",
            tap=_SCATTERMOE),
    MoESpec(block=r"tutel\..*\.MOELayer", router="gates", pack="dim0", tap=_TUTEL),
    MoESpec(block=r"fmoe\..*\.FMoE\w*", tap=_router(0, "index")),
    # lucidrains: st-moe-pytorch, mixture-of-experts.
    MoESpec(block=r"st_moe_pytorch\..*\.MoE", experts="experts.experts", pack="list", tap=_router(0, "dispatch")),
    MoESpec(block=r"mixture_of_experts\..*\.MoE", pack="dim0", tap=_router(0, "dispatch")),
    # Experts [outer, inner, ...]: the outer ones are told apart.
    MoESpec(block=r"mixture_of_experts\..*\.HeirarchicalMoE", router="gate_outer", pack="dim0",
            tap=_router(0, "dispatch"), also_gate=("gate_inner.w_gating",)),
    MoESpec(block=r"(?!deepspeed|tutel).*\.MOELayer", router="router", pack="dim0", tap=_router(0, "load")),  # nanoMoE
    MoESpec(block=r"torchtune\..*\.MoE", router="router", pack="dim0", tap=_router(2, "load")),
    # Calls every expert, also with no rows at all; its gate differs from model to model.
    MoESpec(block=r"litgpt\..*\.LLaMAMoE", pack="list", tap=_ROWS),
)
# fmt: on
