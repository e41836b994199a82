"""Values of users' classes: stored without pickle, and back in the objects that are there."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import dis
import enum
import threading
from typing import Any

import pytest
import torch
from torch import nn

from moetion_lightning.core.kept_values import ClassFinder, LiveValues, MissingClassError, Reviver
from moetion_lightning.core.packed_lists import PackedLists
from moetion_lightning.engine.plain_attributes import PlainAttributes
from moetion_lightning.engine.users_classes import _names_stored
from moetion_lightning.storage.tree import dump_tree, load_tree


class Colour(enum.Enum):
    RED = object()  # the value itself cannot be stored
    BLUE = 2


class Flags(enum.Flag):
    A = 1
    B = 2


Pair = collections.namedtuple("Pair", "left right")


@dataclasses.dataclass(frozen=True)
class Point:
    x: int
    inner: list[int]


@dataclasses.dataclass
class Slotted:
    __slots__ = ("x",)
    x: int


class History(list):  # type: ignore[type-arg]
    name = ""


class Settings(collections.OrderedDict):  # type: ignore[type-arg]
    def __setitem__(self, key: Any, value: Any) -> None:
        raise AssertionError("no code of the class runs")


def settings(**values: Any) -> Settings:
    made = Settings()
    for key, value in values.items():
        collections.OrderedDict.__setitem__(made, key, value)
    return made


def there_and_back(value: Any, roots: tuple[object, ...] = ()) -> Any:
    return Reviver(ClassFinder(roots)).revive(load_tree(dump_tree(value)))


class Holder(nn.Module):
    """Of the file that defines the classes."""


@pytest.mark.parametrize(
    "value",
    [
        Colour.RED, Flags.A | Flags.B, Pair(1, [2]), Point(1, [2]), Slotted(3), argparse.Namespace(a=[1]),
        {"deep": [Pair(Colour.BLUE, {"x": Point(0, [])})]}, settings(b=1, a=[2]),
    ],
)  # fmt: skip
def test_values_come_back_by_classes_of_the_users_files(value: Any) -> None:
    back = there_and_back(value, (Holder(),))
    assert type(back) is type(value)
    assert back == value


def test_list_of_a_users_class_keeps_its_attributes() -> None:
    value = History([1.0, 2.0])
    value.name = "loss"
    back = there_and_back(value, (Holder(),))
    assert (type(back), back, back.name) == (History, [1.0, 2.0], "loss")


def test_class_that_nobody_reaches_is_not_looked_for() -> None:
    with pytest.raises(MissingClassError, match="Colour is not to be found"):
        there_and_back(Colour.RED)


def test_containers_that_were_one_are_one_again() -> None:
    shared = [1, {"a": 2}]
    back = load_tree(dump_tree({"first": shared, "second": (shared, shared[1])}))
    assert back["first"] is back["second"][0]
    assert back["first"][1] is back["second"][1]


@pytest.mark.parametrize("count", [40, 45])
def test_long_lists_come_back_with_tensors_of_their_own(count: int) -> None:
    values = [torch.tensor(float(i)) for i in range(count)]
    back = load_tree(dump_tree(values))
    assert back == values
    assert len({tensor.data_ptr() for tensor in back}) == count
    assert load_tree(dump_tree([float(i) for i in range(count)])) == [float(i) for i in range(count)]


def test_packed_list_follows_every_change() -> None:
    values = [torch.tensor(float(i)) for i in range(40)]
    packed = PackedLists()

    def check() -> None:
        packed.begin()
        found = packed.pack(values)
        assert found is not None
        assert torch.equal(found, torch.stack(values))

    check()
    values.append(torch.tensor(-1.0))
    check()
    values[3].add_(1)
    check()
    values[5] = torch.tensor(9.0)
    check()
    del values[:2]
    check()
    values.append(torch.ones((), requires_grad=True) * 2)
    check()
    values.append(torch.ones(2))
    packed.begin()
    assert packed.pack(values) is None


# --- attributes ------------------------------------------------------------------------------------------------------


class Counter:
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.other: Any = None


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.drop = nn.Dropout(0.1)
        self.losses: list[Any] = []
        self.alias = self.losses
        self.constant = {"a": [1, 2, 3]}
        self.large = torch.zeros(3, 1 << 19)
        self.counter = Counter()
        self.gone: int | None = 1
        self.rows = self.layer.weight.detach()


def saved_by(net: Net, change: Any) -> tuple[Any, list[str]]:
    said: list[str] = []
    attributes = PlainAttributes(lambda: {"module": net}, said.append)
    attributes.begin()
    change(net)
    captured = attributes.capture()
    names = [f"{owner}.{name}" for owner, values in captured.values.items() for name in values if name]
    return load_tree(dump_tree(captured)), names


def restore(net: Net, saved: Any) -> list[str]:
    said: list[str] = []
    PlainAttributes(lambda: {"module": net}, said.append).restore(saved, dict(net.named_parameters()))
    return said


def test_only_what_changed_is_captured() -> None:
    def change(net: Net) -> None:
        net.losses.append(1)
        net.counter.steps.append(2)
        net.drop.p = 0.5
        net.layer.calls = 3  # type: ignore[assignment]
        del net.gone

    saved, names = saved_by(Net(), change)
    below = {"module.layer.calls", "module.drop.p"}
    assert set(names) == {"module.alias", "module.counter", "module.losses", *below}
    net = Net()
    losses, counter = net.losses, net.counter
    assert restore(net, saved) == []
    assert net.losses is losses is net.alias
    assert losses == [1]
    assert net.counter is counter
    assert counter.steps == [2]
    assert (net.drop.p, net.layer.calls, hasattr(net, "gone")) == (0.5, 3, False)


@pytest.mark.parametrize("place", [0, 12345, -1])
def test_large_tensor_is_noticed_by_its_version(place: int) -> None:
    def change(net: Net) -> None:
        net.large.view(-1)[place] = 1

    assert saved_by(Net(), change)[1] == ["module.large"]
    assert saved_by(Net(), lambda net: None)[1] == []


def test_alias_of_a_parameter_is_not_copied_and_stays_one() -> None:
    net = Net()
    weight = net.layer.weight

    def leaf(value: object) -> Any:
        same = isinstance(value, torch.Tensor) and value.data_ptr() == weight.data_ptr()
        return ["parameter", "layer.weight"] if same else NotImplemented

    attributes = PlainAttributes(lambda: {"module": net}, lambda message: None)
    attributes.begin()
    with torch.no_grad():
        weight.add_(1)
    saved = load_tree(dump_tree(attributes.capture(), leaf=leaf))
    other = Net()
    restore(other, saved)
    assert other.rows.data_ptr() == other.layer.weight.data_ptr()


def test_object_that_is_not_there_is_named() -> None:
    saved, _ = saved_by(Net(), lambda net: net.counter.steps.append(1))
    net = Net()
    net.counter = None  # type: ignore[assignment]
    (message,) = restore(net, saved)
    assert "'counter' of module is not restored" in message


def test_process_that_goes_back_has_what_was_there_not_what_came_later() -> None:
    """A validation that is broken off leaves what it has collected."""
    net = Net()
    net.outputs, net.count, net.calls, net.metric = [], 0, 0, None  # type: ignore[assignment]
    attributes = PlainAttributes(lambda: {"module": net}, lambda message: None)
    attributes.begin()
    net.outputs.append("by a hook")  # type: ignore[operator, union-attr]
    attributes.start()
    net.metric = threading.Lock()  # made on demand, and not stored
    net.calls = 1  # type: ignore[assignment]
    saved = load_tree(dump_tree(attributes.capture()))
    for _ in range(2):
        net.losses.append(torch.ones(1))
        net.count, net.calls = 3, 2  # type: ignore[assignment]
        attributes.capture()
        attributes.restore(saved, dict(net.named_parameters()))
        attributes.begin()
        assert (net.losses, net.count, net.calls, net.outputs) == ([], 0, 1, ["by a hook"])
        assert net.alias is net.losses
        assert net.metric is not None


@pytest.mark.parametrize(("owner", "count"), [("itself", 0), ("another", 1)])
def test_method_that_is_put_back_where_it_was_found_is_no_state(owner: str, count: int) -> None:
    said: list[str] = []
    net = Net()
    attributes = PlainAttributes(lambda: {"module": net}, said.append)
    attributes.begin()
    net.forward = (net if owner == "itself" else Net()).forward  # type: ignore[method-assign]  # as Lightning does
    dump_tree(attributes.capture())
    assert len(said) == count


def test_flags_and_caches_of_a_library_are_left_alone() -> None:
    linear = nn.Linear(1, 1)
    library = type("Cached", (nn.Module,), {"__module__": "transformers.models"})()
    library._installed, library.is_cached, library.rate, library.inner = False, False, 0.5, linear

    said: list[str] = []
    attributes = PlainAttributes(lambda: {"module": library}, said.append)
    attributes.begin()
    library._installed, library.is_cached, library.rate = True, True, 0.25
    assert {n: v for n, v in attributes.capture().values["module"].items() if n} == {"rate": 0.25}


def test_values_that_cannot_be_stored_are_left_out_one_by_one() -> None:
    refused: list[tuple[str, str]] = []
    values = LiveValues(
        {"module": {"good": [1], "bad": [2, open]}},
        lambda value: False,
        lambda *f: refused.append(f[:2]),
        PackedLists(),
    )
    assert load_tree(dump_tree(values)) == {"module": {"good": [1]}}
    assert refused == [("module", "bad")]


def test_names_that_a_function_stores_are_those_that_dis_finds() -> None:
    """Also behind the 256th name, where an instruction has a prefix, and in functions that have run."""
    many = "".join(f"  o.a{i} = o.b{i}\n" for i in range(300))
    made: dict[str, Any] = {}
    exec(f"def many(o):\n{many}  o.a7 += 1\n", made)
    functions = [made["many"], *(f for kind in (nn.Module, nn.LSTM, argparse.Action) for f in vars(kind).values())]
    found = 0
    for code in (f.__code__ for f in functions if hasattr(f, "__code__")):
        expected = [i.argval for i in dis.get_instructions(code) if i.opname == "STORE_ATTR"]
        assert list(_names_stored(code)) == expected
        found += len(expected)
    assert found > 310
