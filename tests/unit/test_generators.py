"""Random number generators are found by reachability, also those that are made later."""

from __future__ import annotations

import functools
import random
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from moetion_lightning.core.generators import Generators, find_generators
from moetion_lightning.core.reachable import reach
from moetion_lightning.engine.attribute_stamps import stamp
from moetion_lightning.engine.users_classes import UsersClasses

OF_THE_FILE = np.random.default_rng(0)


class Holder:
    """Anything."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)

    def draw(self, value: Any = None) -> Any:
        return value


class Slotted:
    __slots__ = ("rng",)

    def __init__(self) -> None:
        self.rng = random.Random(1)


class OfTheClass:
    rng = np.random.RandomState(1)


def names(root: object) -> list[str]:
    """But for those of this file."""
    return [name for name in find_generators({"root": root}) if name.startswith("root")]


def closure(rng: Any) -> Any:
    return lambda: rng


RNG = torch.Generator()

PLACES: dict[str, tuple[object, str]] = {
    "attribute": (Holder(rng=RNG), "root.rng"),
    "deep": (Holder(a=Holder(b=Holder(c=Holder(rng=RNG)))), "root.a.b.c.rng"),
    "list": (Holder(steps=[1, Holder(rng=RNG)]), "root.steps[1].rng"),
    "dict": (Holder(by={"a": {"b": RNG}}), "root.by['a']['b']"),
    "by parameter": (Holder(state={torch.ones(1): {"a": RNG}}), "root.state[#0]['a']"),
    "tuple": (Holder(pair=(RNG, 1)), "root.pair[0]"),
    "partial": (functools.partial(print, RNG), "root.args[0]"),
    "bound method": (Holder(call=Holder(rng=RNG).draw), "root.call.__self__.rng"),
    "closure": (Holder(call=closure(RNG)), "root.call.<rng>"),
    "submodule": (nn.Sequential(nn.Linear(1, 1), nn.ReLU()), "root.1.rng"),
    "sampler": (DataLoader([1, 2], shuffle=True, generator=RNG), "root.generator"),
    "slots": (Slotted(), "root.rng"),
    "bits": (Holder(bits=np.random.PCG64(1)), "root.bits"),
}
PLACES["submodule"][0][1].rng = RNG  # type: ignore[index]


@pytest.mark.parametrize("place", PLACES)
def test_generator_is_found(place: str) -> None:
    root, name = PLACES[place]
    assert name in names(root)


def test_generators_of_the_users_files_and_classes_are_found() -> None:
    found = find_generators({"root": Holder()})
    assert any(value is OF_THE_FILE for value in found.values())
    found = find_generators({"root": OfTheClass()})
    assert any(value is OfTheClass.rng for value in found.values())


def test_what_has_no_state_and_what_is_data_is_left_alone() -> None:
    assert names(Holder(system=random.SystemRandom(), many=[random.Random(1)] * 1001)) == []
    loop = Holder()
    loop.me = [loop]  # type: ignore[attr-defined]
    assert names(loop) == []


def test_walk_is_bounded() -> None:
    chain = Holder()
    for _ in range(100):
        chain = Holder(next=chain)
    assert len(reach({"root": chain}, code=False, limit=10).owners) == 10


class Counted:
    """Counts how often its attributes are looked at."""

    def __init__(self) -> None:
        self.roots = {"root": Holder(rng=np.random.default_rng(1), late=None, gone=Holder())}
        self.generators = Generators(lambda: self.roots)

    def looks(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        looks: list[int] = []
        original = Generators._look

        def look(generators: Generators, roots: Any) -> None:
            looks.append(1)
            original(generators, roots)

        monkeypatch.setattr(Generators, "_look", look)
        monkeypatch.setattr("moetion_lightning.core.generators._SELDOM", float("inf"))
        return looks


def test_found_once_and_again_only_if_something_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted()
    looks = counted.looks(monkeypatch)
    for _ in range(3):
        assert "root.rng" in counted.generators.find()
    assert len(looks) == 1
    root = counted.roots["root"]
    root.late = random.Random(1)  # type: ignore[attr-defined]
    assert "root.late" in counted.generators.find()
    root.rng = other = np.random.default_rng(2)  # type: ignore[attr-defined]
    assert counted.generators.find()["root.rng"] is other
    root.added = Holder(rng=random.Random(2))  # type: ignore[attr-defined]
    assert "root.added.rng" in counted.generators.find()
    assert len(looks) == 4


def test_a_history_that_grows_is_not_looked_at_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted()
    looks = counted.looks(monkeypatch)
    history = counted.roots["root"].history = {}  # type: ignore[attr-defined]
    for step in range(100):
        history[step] = step
        counted.generators.find()
    assert len(looks) < 15


KINDS = [
    lambda: np.random.default_rng(3),
    lambda: np.random.Generator(np.random.MT19937(3)),
    lambda: np.random.RandomState(3),
    lambda: random.Random(3),
    lambda: torch.Generator().manual_seed(3),
]


def draw(generator: Any) -> float:
    if isinstance(generator, torch.Generator):
        return float(torch.rand((), generator=generator))
    return float(generator.random())


@pytest.mark.parametrize("make", KINDS)
def test_state_is_given_to_a_generator_that_is_not_made_yet(make: Any) -> None:
    before = Holder(rng=make(), by={"a": make()})
    draw(before.rng)
    states = Generators(lambda: {"root": before}).states()
    after = Holder(rng=None, by={})
    assert Generators(lambda: {"root": after}).take(states) == []
    assert draw(after.rng) == draw(before.rng)
    assert draw(after.by["a"]) == draw(before.by["a"])
    absent = Holder(by={})
    assert Generators(lambda: {"root": absent}).take(states) == []
    assert type(absent.rng) is type(before.rng)


def test_state_without_a_taker_is_named_and_given_when_it_comes() -> None:
    before = Holder(pipeline=Holder(rng=np.random.default_rng(3)))
    draw(before.pipeline.rng)
    states = Generators(lambda: {"root": before}).states()
    after = Holder(pipeline=None)
    generators = Generators(lambda: {"root": after})
    assert generators.take(states) == ["root.pipeline.rng"]
    after.pipeline = Holder(rng=np.random.default_rng(3))
    generators.find()
    assert draw(after.pipeline.rng) == draw(before.pipeline.rng)


def test_state_of_another_kind_changes_nothing_and_is_named() -> None:
    states = Generators(lambda: {"root": Holder(rng=np.random.default_rng(3))}).states()
    after = Holder(rng=random.Random(3))
    assert Generators(lambda: {"root": after}).take({"root.rng": states["root.rng"]}) == ["root.rng"]
    assert draw(after.rng) == draw(random.Random(3))


class Lazy(OrderedDict[str, Any]):
    """As those of libraries that import a module for each item that is asked for."""

    def __len__(self) -> int:
        raise ImportError("a library that is not installed")

    __iter__ = items = values = __getitem__ = get = __len__  # type: ignore[assignment]


class LazyList(list[Any]):
    def __len__(self) -> int:
        raise ImportError("a library that is not installed")

    __iter__ = __getitem__ = __len__  # type: ignore[assignment]


class Proxy:
    """As those of libraries that make what they stand for when it is asked for anything."""

    @property
    def __class__(self) -> type:  # type: ignore[override]
        raise RuntimeError("outside of its context")


def test_proxies_are_not_asked_what_they_stand_for() -> None:
    assert names(Holder(request=Proxy(), rng=RNG)) == ["root.rng"]


def test_methods_of_users_containers_are_not_called() -> None:
    by_name, steps = Lazy(), LazyList([1, RNG])
    OrderedDict.__setitem__(by_name, "rng", RNG)
    root = Holder(by_name=by_name, steps=steps)
    assert names(root)[0] in ("root.by_name['rng']", "root.steps[1]")
    generators = Generators(lambda: {"root": root})
    generators.states()
    before = [stamp(value, UsersClasses(())) for value in (by_name, steps)]
    OrderedDict.__setitem__(by_name, "other", RNG)
    list.append(steps, 2)
    assert list(generators.states())
    assert all(stamp(value, UsersClasses(())) != old for value, old in zip((by_name, steps), before))


def test_order_of_an_ordered_dict_is_part_of_its_stamp() -> None:
    recent = OrderedDict(a=1, b=2)
    before = stamp(recent, UsersClasses(()))
    recent.move_to_end("a")
    assert stamp(recent, UsersClasses(())) != before
