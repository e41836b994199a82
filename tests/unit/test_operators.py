"""Operators partition the trainable state of any module."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moetion_lightning.core.discovery import discover_layers
from moetion_lightning.core.layouts import MoELayer, MoESpec, Tap
from moetion_lightning.core.operators import Operator, OperatorKind, Piece, clean_name
from moetion_lightning.core.partition import OperatorSet, build_operators, check_partition
from moetion_lightning.errors import OperatorError


class FusedExperts(nn.Module):
    def __init__(self, num_experts: int = 4, extra_rows: int = 0) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(num_experts + extra_rows, 12, 6))
        self.down_proj = nn.Parameter(torch.randn(num_experts, 6, 6))

    def forward(self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        return hidden


class Block(nn.Module):
    def __init__(self, extra_rows: int = 0) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 4 + extra_rows, bias=False)
        self.experts = FusedExperts(extra_rows=extra_rows)
        self.shared_expert = nn.Linear(6, 6)


class Model(nn.Module):
    def __init__(self, extra_rows: int = 0) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.layers = nn.ModuleList(Block(extra_rows) for _ in range(2))
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(1.0))


def operators_of(
    model: nn.Module, *, frozen: tuple[str, ...] = (), sliceable: Callable[[str], bool] = lambda name: True
) -> OperatorSet:
    trainable = [name for name, _ in model.named_parameters() if name not in frozen]
    return build_operators(model, discover_layers(model), trainable=trainable, sliceable=sliceable)


def covered(model: nn.Module, operators: tuple[Operator, ...]) -> dict[str, torch.Tensor]:
    """How often each element of each parameter is owned."""
    counts = {name: torch.zeros(p.shape, dtype=torch.int64) for name, p in model.named_parameters()}
    for operator in operators:
        for piece in operator.pieces:
            piece.of(counts[piece.parameter]).add_(1)
    return counts


def test_every_element_is_in_exactly_one_operator() -> None:
    model = Model()
    counts = covered(model, operators_of(model).operators)
    assert all(bool((count == 1).all()) for count in counts.values())


def test_operators_are_named_after_their_module() -> None:
    names = [operator.name for operator in operators_of(Model()).operators]
    assert names[:5] == [*(f"layers.0.experts/expert/{e}" for e in range(4)), "layers.0/gate"]
    assert names[10:] == ["(root)/shared", "embed/shared", "layers.0.shared_expert/shared",
                          "layers.1.shared_expert/shared"]  # fmt: skip


def test_the_order_is_deterministic() -> None:
    assert operators_of(Model()).operators == operators_of(Model()).operators


def test_tied_parameters_are_in_one_operator_under_their_first_name() -> None:
    result = operators_of(Model())
    owners = [o.name for o in result.operators for p in o.pieces if p.parameter in ("embed.weight", "head.weight")]
    assert owners == ["embed/shared"]


def test_an_alias_of_a_tied_parameter_is_accepted_as_trainable() -> None:
    model = Model()
    result = build_operators(model, (), trainable=["head.weight"], sliceable=lambda name: True)
    assert [piece.key for o in result.operators for piece in o.pieces] == ["embed.weight"]


def test_frozen_parameters_are_static() -> None:
    frozen = ("layers.0.gate.weight", "layers.1.experts.down_proj")
    result = operators_of(Model(), frozen=frozen)
    assert result.static == frozen
    pieces = {piece.parameter for operator in result.operators for piece in operator.pieces}
    assert not pieces & set(frozen)
    assert "layers.0/gate" not in [operator.name for operator in result.operators]


def test_leftover_rows_of_a_fused_parameter_are_shared() -> None:
    model = Model(extra_rows=3)
    result = operators_of(model)
    (shared,) = [o for o in result.operators if o.name == "layers.0.experts/shared"]
    assert [piece.key for piece in shared.pieces] == ["layers.0.experts.gate_up_proj[4:7]"]
    assert all(bool((count == 1).all()) for count in covered(model, result.operators).values())


def test_parameters_that_must_not_be_sliced_stay_whole_in_one_expert_operator() -> None:
    model = Model(extra_rows=2)
    result = operators_of(model, sliceable=lambda name: "gate_up" not in name)
    assert result.unsliced == ("layers.0.experts.gate_up_proj", "layers.1.experts.gate_up_proj")
    (whole,) = [o for o in result.operators if o.name == "layers.0.experts/experts"]
    assert (whole.kind, whole.expert, [p.key for p in whole.pieces]) == (
        OperatorKind.EXPERT, None, ["layers.0.experts.gate_up_proj"],
    )  # fmt: skip
    assert all(bool((count == 1).all()) for count in covered(model, result.operators).values())


def test_a_dense_model_has_shared_operators_only() -> None:
    result = operators_of(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    assert {operator.kind for operator in result.operators} == {OperatorKind.SHARED}
    assert result.layers == ()


def test_experts_shared_between_layers_belong_to_the_first() -> None:
    model = Model()
    model.layers[1].experts.down_proj = model.layers[0].experts.down_proj
    result = operators_of(model)
    assert all(bool((count == 1).all()) for count in covered(model, result.operators).values())


def test_an_unknown_trainable_name_is_an_error() -> None:
    with pytest.raises(OperatorError, match=r"nothing\.weight"):
        build_operators(Model(), (), trainable=["nothing.weight"], sliceable=lambda name: True)


def test_a_layer_of_another_module_is_an_error() -> None:
    layer = MoELayer(name="x", num_experts=2, experts=((Piece(parameter="no.such"),),) * 2)
    with pytest.raises(OperatorError, match=r"no\.such"):
        build_operators(Model(), [layer], trainable=[], sliceable=lambda name: True)


def test_wrapper_components_are_no_part_of_operator_names() -> None:
    model = torch.compile(Model())
    result = operators_of(model)  # type: ignore[arg-type]
    assert result.operators[0].name == "layers.0.experts/expert/0"
    assert result.operators[0].pieces[0].parameter == "_orig_mod.layers.0.experts.gate_up_proj"
    assert clean_name("a._checkpoint_wrapped_module.b._fsdp_wrapped_module") == "a.b"


def test_json_round_trip() -> None:
    for operator in operators_of(Model(extra_rows=1)).operators:
        assert Operator.from_json(json.loads(json.dumps(operator.to_json()))) == operator


@pytest.mark.parametrize("broken", [{}, {"name": "a", "kind": "king", "pieces": [], "layer": None, "expert": None}])
def test_a_broken_description_is_an_error(broken: dict[str, object]) -> None:
    with pytest.raises(OperatorError, match="not the description of an operator"):
        Operator.from_json(broken)


@pytest.mark.parametrize(("start", "stop"), [(1, None), (None, 1), (2, 2), (-1, 3)])
def test_impossible_rows_are_an_error(start: int | None, stop: int | None) -> None:
    with pytest.raises(OperatorError, match="rows|start"):
        Piece(parameter="w", start=start, stop=stop)


def test_a_piece_is_a_view() -> None:
    tensor = torch.zeros(4, 2)
    Piece(parameter="w", start=1, stop=2).of(tensor).add_(1)
    assert tensor.sum(dim=1).tolist() == [0, 2, 0, 0]
    assert Piece(parameter="w").of(tensor) is tensor


def shared(name: str, *pieces: Piece) -> Operator:
    return Operator(name=name, kind=OperatorKind.SHARED, pieces=pieces)


@pytest.mark.parametrize(
    ("operators", "message"),
    [
        ([], r"'w', rows \[0:6\], belongs to no operator"),
        ([shared("a", Piece(parameter="w", start=0, stop=4))], r"rows \[4:6\], belongs to no operator"),
        ([shared("a", Piece(parameter="w", start=2, stop=6))], r"rows \[0:2\], belongs to no operator"),
        ([shared("a", Piece(parameter="w")), shared("b", Piece(parameter="w", start=3, stop=4))],
         r"rows \[3:4\], belongs to both 'a' and 'b'"),
        ([shared("a", Piece(parameter="w")), shared("b", Piece(parameter="w"))], "both 'a' and 'b'"),
        ([shared("a", Piece(parameter="w", start=0, stop=7))], r"shape \(6, 2\)"),
        ([shared("a", Piece(parameter="w")), shared("a", Piece(parameter="v"))], "two operators are named 'a'"),
        ([shared("a", Piece(parameter="w"), Piece(parameter="v"))], "does not train"),
        ([shared("a", Piece(parameter="w"), Piece(parameter="u"))], "does not exist"),
        ([shared("a")], "owns nothing"),
    ],
)  # fmt: skip
def test_what_is_no_partition_is_named(operators: list[Operator], message: str) -> None:
    with pytest.raises(OperatorError, match=message):
        check_partition(operators, {"w": (6, 2), "v": (3,)}, {"w"})


@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.integers(1, 19), unique=True), drop=st.integers(0, 20))
def test_any_cut_into_rows_is_a_partition_until_one_is_missing(cuts: list[int], drop: int) -> None:
    edges = [0, *sorted(cuts), 20]
    operators = [
        shared(str(i), Piece(parameter="w", start=a, stop=b))
        for i, (a, b) in enumerate(zip(edges, edges[1:], strict=False))
    ]
    check_partition(operators[::-1], {"w": (20, 3)}, ["w"])
    del operators[drop % len(operators)]
    with pytest.raises(OperatorError, match="no operator"):
        check_partition(operators, {"w": (20, 3)}, ["w"])


def test_scalar_and_empty_parameters_are_covered() -> None:
    model = nn.Module()
    model.scalar = nn.Parameter(torch.tensor(2.0))
    model.empty = nn.Parameter(torch.zeros(0, 3))
    result = build_operators(model, (), trainable=["scalar", "empty"], sliceable=lambda name: True)
    assert [piece.key for piece in result.operators[0].pieces] == ["scalar", "empty"]


def test_further_gate_parameters_of_a_spec_are_in_the_gate() -> None:
    model = Model()
    model.layers[0].noise = nn.Parameter(torch.randn(4))
    spec = MoESpec(block=r".*\.Block", also_gate=("noise",), tap=Tap(site="experts", io="in", key=1, form="index"))
    layers = discover_layers(model, [spec])
    result = build_operators(model, layers, trainable=dict(model.named_parameters()), sliceable=lambda name: True)
    (gate,) = [operator for operator in result.operators if operator.name == "layers.0/gate"]
    assert {piece.parameter for piece in gate.pieces} == {"layers.0.gate.weight", "layers.0.noise"}
