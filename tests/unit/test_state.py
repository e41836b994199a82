"""An operator's state out of a live module and back, for every kind of optimizer state."""

from __future__ import annotations

import copy
import dataclasses
import enum
import json
from collections import OrderedDict, defaultdict, deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moetion_lightning.core.operators import Operator, OperatorKind, Piece
from moetion_lightning.core.slot_contents import write_active, write_compute
from moetion_lightning.core.state import LiveState
from moetion_lightning.core.step_hooks import hook_steps
from moetion_lightning.engine.steps import StepWatcher
from moetion_lightning.errors import ConfigurationError, OperatorError, UnsupportedStateError
from tests.captured import capture
from tests.runs.optimizers import Handmade, Lookahead, Quantised, SharpnessAware


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


snapshot = capture


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


def _ignore(*args: object) -> None:
    """Of the steps of an optimizer."""


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
    write_active(live, OPERATORS, tensors.load, scalars)
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
    write_active(live, [OPERATORS[1]], tensors.load, scalars)
    assert torch.equal(net.experts[1], before[1])
    assert torch.equal(net.experts[[0, 2, 3]], after[[0, 2, 3]])


def test_state_that_did_not_exist_is_removed() -> None:
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    live = LiveState(net, [optimizer])
    tensors, scalars = snapshot(live, OPERATORS, [])
    step(net, optimizer)
    assert net.experts in optimizer.state
    write_active(live, OPERATORS, tensors.load, scalars)
    assert net.experts not in optimizer.state


def test_state_that_does_not_exist_yet_is_made() -> None:
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    live = LiveState(net, [optimizer])
    step(net, optimizer)
    tensors, scalars = snapshot(live, OPERATORS, [])
    expected = state_of(net, optimizer)
    optimizer.state.clear()
    write_active(live, OPERATORS, tensors.load, scalars)
    assert equal(state_of(net, optimizer), expected)


def test_compute_weights_in_reduced_precision_cast_back_to_the_same_bits() -> None:
    net = Net()
    live = LiveState(net, [torch.optim.AdamW(net.parameters())])
    tensors, _ = capture(live, [], OPERATORS, {"experts": torch.bfloat16})
    assert tensors.load("c:experts[0:1]").dtype == torch.bfloat16
    used = net.experts.detach().to(torch.bfloat16)
    with torch.no_grad():
        net.experts.zero_()
    write_compute(live, OPERATORS, tensors.load)
    assert torch.equal(net.experts.to(torch.bfloat16), used)


def test_nested_optimizer_state_round_trips() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    live = LiveState(net, [optimizer])
    entry = {"history": [torch.ones(2), torch.zeros(3)], "pair": (1, 2.5, None, True), "inner": {"q": torch.eye(2)}}
    optimizer.state[net.scale] = copy.deepcopy(entry)
    tensors, scalars = snapshot(live, OPERATORS, [])
    optimizer.state[net.scale] = {}
    write_active(live, OPERATORS, tensors.load, scalars)
    assert equal(dict(optimizer.state[net.scale]), entry)


@dataclasses.dataclass
class Kept:
    rank: int
    basis: Tensor | None = None


class Colour(enum.Enum):
    RED = 1


def wide(*sizes: int) -> Tensor:
    return torch.randn(*sizes).t()


KINDS: dict[str, Any] = {
    "plain": {"n": 3, "x": 0.1, "none": None, "flag": True, "text": "a:b", "z": 1 + 2j, "raw": b"ab", "big": 1 << 200},
    "keys": {0: torch.ones(2), (1, "a"): 2, "a:b": torch.zeros(3), "a.b": torch.ones(1), "a": {"b": torch.zeros(1)}},
    "containers": {
        "l": [torch.ones(2), None, (1, [2])], "od": OrderedDict(b=1, a=2), "dd": defaultdict(list, {3: [1]}),
        "s": {1, 2}, "q": deque([1, 2], maxlen=3),
    },
    "numpy": {"a": np.arange(6).reshape(2, 3), "n": np.float32(0.1)},
    "torch": {"d": torch.float16, "dev": torch.device("cpu"), "size": torch.Size([2, 3])},
    "objects": {"kept": Kept(3, torch.eye(2)), "colour": Colour.RED},
    "strides": {
        "t": wide(3, 4), "e": torch.randn(3, 1).expand(3, 4),
        "cl": torch.randn(1, 2, 3, 4).to(memory_format=torch.channels_last),
    },
    "parameter": {"p": nn.Parameter(torch.ones(2)), "frozen": nn.Parameter(torch.ones(2), requires_grad=False)},
    "sparse": {"s": torch.sparse_coo_tensor([[0, 1, 0]], [1.0, 2.0, 3.0], (4,), check_invariants=True)},
    "subclass": {"m": Quantised.of(torch.randn(4, 3)), "in": [Quantised.of(torch.randn(2))]},
}  # fmt: skip


def same(a: Any, b: Any) -> bool:
    """Equal in type, bits and strides."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Quantised):
        return same([a.codes, a.scale], [b.codes, b.scale])
    if isinstance(a, Tensor) and a.layout is torch.sparse_coo:
        return a.is_coalesced() == b.is_coalesced() and same([a._indices(), a._values()], [b._indices(), b._values()])
    if isinstance(a, Tensor):
        return a.stride() == b.stride() and a.requires_grad == b.requires_grad and equal(a.data, b.data)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple, deque)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, Kept):
        return same(vars(a), vars(b))
    return bool(a == b)


@pytest.mark.parametrize("present", [False, True], ids=["made", "in-place"])
@pytest.mark.parametrize("kind", KINDS)
def test_state_of_any_kind_comes_back_as_it_was(kind: str, present: bool) -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    live = LiveState(net, [optimizer])
    optimizer.state[net.scale] = copy.deepcopy(KINDS[kind]) if kind != "subclass" else KINDS[kind]
    tensors, scalars = snapshot(live, OPERATORS, [])
    scalars = json.loads(json.dumps(scalars))
    if not present:
        del optimizer.state[net.scale]
    write_active(live, OPERATORS, tensors.load, scalars)
    assert same(optimizer.state[net.scale], KINDS[kind])


def test_state_belongs_to_the_optimizer_and_the_parameter() -> None:
    net = Net()
    first, second = torch.optim.Adam(net.parameters(), 0.1), torch.optim.SGD([net.experts], 0.1, momentum=0.9)
    live = LiveState(net, [first, second])
    step(net, first)
    step(net, second)
    expected = state_of(net, first), state_of(net, second)
    tensors, scalars = snapshot(live, OPERATORS, [])
    before = live.full_bytes("experts")
    step(net, first)
    step(net, second)
    write_active(live, OPERATORS, tensors.load, scalars)
    assert equal((state_of(net, first), state_of(net, second)), expected)
    assert live.owners["experts"] == (0, 1)
    assert before == net.experts.numel() * 4 * 4 + 4  # the weight, two moments, a momentum buffer, a step count
    assert live.is_elementwise("experts")
    assert live.shares_parameters(0, 1)


def test_optimizers_are_found_inside_each_other() -> None:
    net = Net()
    sam = SharpnessAware(list(net.parameters()))
    live = LiveState(net, [sam])
    assert [type(o).__name__ for o in live.optimizers] == ["SharpnessAware", "AdamW"]
    assert not live.is_elementwise("experts")
    assert not live.shares_parameters(0, 1), "one is made of the other"
    assert not live.couples_parameters()
    slow = Lookahead(torch.optim.AdamW(net.parameters()), by_parameter=True)
    live = LiveState(net, [slow])  # type: ignore[list-item]
    assert live.aliases == {1}, "one state, shown by two"
    assert not live.couples_parameters()
    in_lists = Lookahead(torch.optim.AdamW(net.parameters()), by_parameter=False)
    assert LiveState(net, [in_lists]).couples_parameters() == ["Lookahead"]  # type: ignore[list-item]


def test_an_optimizer_that_is_made_inside_another_one_later_is_a_problem_and_no_exception() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    live = LiveState(net, [optimizer])
    assert not live.outdated()
    optimizer.inner = torch.optim.SGD(net.parameters(), lr=0.1)  # type: ignore[attr-defined]
    assert live.outdated()
    live.refresh()
    assert "was made inside another one while training" in live.problem


def test_parameters_that_join_are_found_and_foreign_ones_are_a_problem_and_no_exception() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    live = LiveState(net, [optimizer])
    net.adapter = nn.Linear(2, 2)
    assert live.outdated()
    optimizer.add_param_group({"params": list(net.adapter.parameters())})
    live.refresh()
    assert "adapter.weight" in live.trainable()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    live.refresh()
    assert "not a parameter of Net" in live.problem


def test_weights_of_a_tensor_subclass_train_in_no_capture() -> None:
    net = Net()
    net.quantised = nn.Parameter(Quantised.of(torch.ones(2, 2)), requires_grad=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    LiveState(net, [optimizer])
    net.quantised.requires_grad_(True)
    with pytest.raises(UnsupportedStateError, match="'quantised' trains and is a Quantised"):
        LiveState(net, [optimizer])


def test_what_was_only_declared_elementwise_is_told() -> None:
    class Mine(torch.optim.SGD):
        pass

    net = Net()
    name = f"{Mine.__module__}.{Mine.__qualname__}"
    mine, known = Mine(net.parameters(), lr=0.1), torch.optim.SGD(net.parameters(), lr=0.1)
    assert LiveState(net, [mine], elementwise=[name, "other.One"]).declared_elementwise() == [name]
    assert LiveState(net, [known], elementwise=[name]).declared_elementwise() == []


@pytest.mark.parametrize(
    ("before", "after", "tuned"),
    [
        ({"step": 1}, {"step": 2}, False),  # a counter
        ({"lr": 0.1}, {"lr": 0.1, "k": 1}, False),  # made now: whether it changes shows in the next step
        ({"d": 0.1}, {"d": 0.2}, True),
        ({"k": 2}, {"k": 1}, True),
        ({"d": float("nan")}, {"d": float("nan")}, False),
    ],
)
def test_a_counter_is_no_self_tuning(before: Any, after: Any, tuned: bool) -> None:
    parameter = nn.Parameter(torch.ones(1))

    class Changing(torch.optim.Optimizer):
        def step(self, closure: Any = None) -> None:
            self.param_groups[0].update(after)

    optimizer = Changing([parameter], before)
    watcher = StepWatcher([optimizer], [False], _ignore, _ignore, _ignore, _ignore, _ignore)
    optimizer.step()
    assert bool(watcher.self_tuning) is tuned
    watcher.remove()


def test_steps_are_seen_of_what_has_no_hooks() -> None:
    net = Net()
    optimizer = Handmade(net.parameters())
    order: list[str] = []
    watcher = StepWatcher(
        [optimizer],  # type: ignore[list-item]
        [False],
        lambda index: order.append("enter"),
        lambda index: order.append("before"),
        lambda index, result: order.append("ready"),
        lambda index: order.append("done"),
        _ignore,
    )
    optimizer.step(lambda: order.append("closure"))
    assert watcher.take() == (1,)
    assert order == ["enter", "before", "closure", "ready", "done"]
    watcher.remove()
    optimizer.step(lambda: order.append("closure"))
    assert watcher.take() == (0,)


def test_an_optimizer_whose_steps_cannot_be_seen_is_refused() -> None:
    class Closed:
        __slots__ = ("param_groups", "state")

        def step(self) -> None: ...

    with pytest.raises(ConfigurationError, match="Closed has neither torch's step hooks"):
        hook_steps(Closed())


def test_unsupported_optimizer_state_is_named() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer.state[net.scale] = {"thing": object()}
    with pytest.raises(UnsupportedStateError, match=r"'scale' holds 'thing' of type object"):
        capture(LiveState(net, [optimizer]), OPERATORS, [])


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
