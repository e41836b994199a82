"""An operator's state out of a live module and back, for every kind of optimizer state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moetion_lightning.core.operators import Operator, OperatorKind, Piece
from moetion_lightning.core.state import LiveState, read_slot, write_active, write_compute
from moetion_lightning.errors import OperatorError, UnsupportedStateError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(4, 3, 2))
        self.gate = nn.Linear(3, 4)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.idle = nn.Linear(3, 3)


def step(net: Net, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    x = torch.randn(5, 3)
    loss = (net.gate(x).softmax(-1) @ net.experts.flatten(1)).sum() * net.scale
    loss.backward()
    optimizer.step()


OPERATORS = [
    *(
        Operator(name=f"e{i}", kind=OperatorKind.EXPERT, pieces=(Piece(parameter="experts", start=i, stop=i + 1),))
        for i in range(4)
    ),
    Operator(
        name="rest",
        kind=OperatorKind.SHARED,
        pieces=tuple(Piece(parameter=n) for n in ("gate.weight", "gate.bias", "scale", "idle.weight", "idle.bias")),
    ),
]


def snapshot(live: LiveState, active: list[Operator], frozen: list[Operator]) -> tuple[dict[str, Tensor], Any]:
    contents = read_slot(live, active, frozen, {})
    return {item.name: item.source.to(item.dtype).clone() for item in contents.items}, contents.scalars


def state_of(net: Net, optimizer: torch.optim.Optimizer) -> Any:
    return copy.deepcopy((net.state_dict(), optimizer.state_dict()))


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b))
    return bool(a == b)


OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd-plain": lambda p: torch.optim.SGD(p, lr=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_read_is_what_is_written_back(name: str) -> None:
    torch.manual_seed(0)
    net = Net()
    optimizer = OPTIMIZERS[name](net.parameters())
    live = LiveState(net, [optimizer])
    for _ in range(3):
        step(net, optimizer)
    expected = state_of(net, optimizer)
    tensors, scalars = snapshot(live, OPERATORS, [])
    for _ in range(2):
        step(net, optimizer)
    assert not equal(state_of(net, optimizer), expected)
    write_active(live, OPERATORS, tensors.__getitem__, scalars)
    assert equal(state_of(net, optimizer), expected)


def test_slices_are_independent() -> None:
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    live = LiveState(net, [optimizer])
    step(net, optimizer)
    tensors, scalars = snapshot(live, [OPERATORS[1]], [])
    before = net.experts.detach().clone()
    step(net, optimizer)
    after = net.experts.detach().clone()
    write_active(live, [OPERATORS[1]], tensors.__getitem__, scalars)
    assert torch.equal(net.experts[1], before[1])
    assert torch.equal(net.experts[[0, 2, 3]], after[[0, 2, 3]])


def test_state_that_did_not_exist_is_removed() -> None:
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    live = LiveState(net, [optimizer])
    tensors, scalars = snapshot(live, OPERATORS, [])
    step(net, optimizer)
    assert net.experts in optimizer.state
    write_active(live, OPERATORS, tensors.__getitem__, scalars)
    assert net.experts not in optimizer.state


def test_state_that_does_not_exist_yet_is_made() -> None:
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    live = LiveState(net, [optimizer])
    step(net, optimizer)
    tensors, scalars = snapshot(live, OPERATORS, [])
    expected = state_of(net, optimizer)
    optimizer.state.clear()
    write_active(live, OPERATORS, tensors.__getitem__, scalars)
    assert equal(state_of(net, optimizer), expected)


def test_compute_weights_in_reduced_precision_cast_back_to_the_same_bits() -> None:
    net = Net()
    live = LiveState(net, [torch.optim.AdamW(net.parameters())])
    contents = read_slot(live, [], OPERATORS, {"experts": torch.bfloat16})
    tensors = {item.name: item.source.to(item.dtype) for item in contents.items}
    assert tensors["c:experts[0:1]"].dtype == torch.bfloat16
    used = net.experts.detach().to(torch.bfloat16)
    with torch.no_grad():
        net.experts.zero_()
    write_compute(live, OPERATORS, tensors.__getitem__)
    assert torch.equal(net.experts.to(torch.bfloat16), used)


def test_nested_optimizer_state_round_trips() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    live = LiveState(net, [optimizer])
    entry = {"history": [torch.ones(2), torch.zeros(3)], "pair": (1, 2.5, None, True), "inner": {"q": torch.eye(2)}}
    optimizer.state[net.scale] = copy.deepcopy(entry)
    tensors, scalars = snapshot(live, OPERATORS, [])
    optimizer.state[net.scale] = {}
    write_active(live, OPERATORS, tensors.__getitem__, scalars)
    assert equal(dict(optimizer.state[net.scale]), entry)


def test_unsupported_optimizer_state_is_named() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer.state[net.scale] = {"thing": object()}
    with pytest.raises(UnsupportedStateError, match=r"'scale' holds 'thing' of type object"):
        read_slot(LiveState(net, [optimizer]), OPERATORS, [], {})


def test_parameter_outside_the_module_is_refused() -> None:
    with pytest.raises(OperatorError, match="not a parameter of Net"):
        LiveState(Net(), [torch.optim.SGD([nn.Parameter(torch.zeros(7))], lr=1.0)])


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [(torch.optim.AdamW, True), (torch.optim.Adafactor, False), (torch.optim.SGD, True)],
)
def test_elementwise_optimizers_are_known_by_their_exact_class(optimizer: Any, expected: bool) -> None:
    net = Net()
    assert LiveState(net, [optimizer(net.parameters(), lr=0.1)]).is_elementwise("experts") is expected

    class Mine(optimizer):  # type: ignore[misc]
        pass

    mine = Mine(net.parameters(), lr=0.1)
    assert LiveState(net, [mine]).is_elementwise("experts") is False
    name = f"{Mine.__module__}.{Mine.__qualname__}"
    assert LiveState(net, [mine], elementwise=[name]).is_elementwise("experts") is True


def test_zero_dimensional_parameters_are_never_sliced() -> None:
    net = Net()
    assert LiveState(net, [torch.optim.AdamW(net.parameters())]).is_elementwise("scale") is False
