"""Digests of batches and generators: what makes a difference, what makes none, and what is left alone."""

from __future__ import annotations

import collections
import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moetion_lightning.core.digests import HostCopy, digest_of, rng_digests, sample_positions


@dataclasses.dataclass
class Example:
    tokens: Tensor
    text: str = ""


class Packed:
    """An object of a library that has its own kind of batch."""

    def __init__(self, tokens: Tensor) -> None:
        self.inner = {"tokens": tokens}


class Evasive:
    """An object that does not like to be looked at."""

    def __getattribute__(self, name: str) -> Any:
        raise LookupError(name)


def tokens(last: int = 0) -> Tensor:
    values = torch.arange(12).reshape(3, 4)
    values[-1, -1] = last
    return values


Pair = collections.namedtuple("Pair", "a b")
BATCHES: dict[str, tuple[Any, Any]] = {
    "tensor": (tokens(), tokens(1)),
    "shape": (tokens(), tokens().reshape(4, 3)),
    "dtype": (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
    "bfloat16": (torch.ones(3, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.bfloat16)),
    "bool": (torch.tensor([True, False]), torch.tensor([False, True])),
    "complex": (torch.ones(2, dtype=torch.complex64), torch.ones(2, dtype=torch.complex64) * 1j),
    "conjugate": (torch.full((2,), 1j).conj(), torch.full((2,), 1j)),
    "0-d": (torch.tensor(1.0), torch.tensor(2.0)),
    "dict": ({"x": tokens(), "y": [1, 2]}, {"x": tokens(), "y": [1, 3]}),
    "key": ({"x": tokens()}, {"z": tokens()}),
    "list": ([tokens(), tokens(1)], [tokens(1), tokens()]),
    "named tuple": (Pair(tokens(), "a"), Pair(tokens(), "b")),
    "nested": ([({"x": (tokens(),)},)], [({"x": (tokens(1),)},)]),
    "strings": (["one", "two"], ["one", "tow"]),
    "bytes": (b"abc", b"abd"),
    "numbers": ((1, 2.0, None, True), (1, 2.5, None, True)),
    "dataclass": (Example(tokens(), "a"), Example(tokens(1), "a")),
    "object": (Packed(tokens()), Packed(tokens(1))),
    "array": (np.arange(6.0), np.arange(6.0)[::-1]),
    "array of objects": (np.array(["a", None], dtype=object), np.array(["b", None], dtype=object)),
    "user dict": (collections.UserDict(x=tokens()), collections.UserDict(x=tokens(1))),
    "large": (torch.zeros(1000, 300), torch.ones(1000, 300)),
    "large array": (np.zeros((1000, 300)), np.ones((1000, 300))),
    "long list": (list(range(10_000)), list(range(1, 10_001))),
    "set": ({1, 2}, {1, 3}),
}


@pytest.mark.parametrize("name", BATCHES)
def test_another_batch_has_another_digest_and_an_equal_one_the_same(name: str) -> None:
    one, other = BATCHES[name]
    copied = one.clone() if isinstance(one, Tensor) else one
    assert digest_of(one).read() == digest_of(copied).read()
    assert digest_of(one).read() != digest_of(other).read()


def test_rows_of_a_large_tensor_in_another_order_are_seen() -> None:
    images = torch.randn(64, 3, 32, 32)
    for first, second in ((0, 1), (10, 50), (62, 63)):
        order = torch.arange(64)
        order[[first, second]] = order[[second, first]]
        assert digest_of(images).read() != digest_of(images[order]).read()


def test_layout_in_memory_makes_no_difference() -> None:
    images = torch.randn(16, 3, 40, 40)
    wanted = digest_of(images).read()
    assert digest_of(images.to(memory_format=torch.channels_last)).read() == wanted
    assert digest_of(images.transpose(0, 1).contiguous().transpose(0, 1)).read() == wanted


def test_later_changes_in_place_make_no_difference() -> None:
    batch = {"x": torch.zeros(8), "large": torch.zeros(100_000)}
    digest, wanted = digest_of(batch), digest_of(batch).read()
    batch["x"].add_(1)
    batch["large"].add_(1)
    assert digest.read() == wanted
    loss = torch.tensor(3.0)
    copy = HostCopy([loss])
    loss.zero_()
    assert copy.read() == [3.0]


def test_an_iterator_is_not_moved_and_addresses_are_not_looked_at() -> None:
    moved = []

    def numbers() -> Iterator[int]:
        moved.append(1)
        yield 1

    assert digest_of(numbers()).read() == digest_of(numbers()).read()
    assert digest_of([object()]).read() == digest_of([object()]).read()
    assert moved == []


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_cannot_be_read_is_left_out() -> None:
    sparse = torch.eye(3).to_sparse()
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    ragged = torch._nested_tensor_from_tensor_list([torch.ones(2), torch.ones(3)])  # has no shape
    meta = torch.empty(3, device="meta")
    cyclic: list[Any] = []
    cyclic.append(cyclic)
    for value in (sparse, nested, ragged, meta, cyclic, torch.empty(0), Evasive()):
        assert digest_of({"x": value, "y": 1}).read() != digest_of({"x": value, "y": 2}).read()


@pytest.mark.parametrize("numel", [513, 70_000, 10**9])
def test_sampled_positions_are_inside_and_spread(numel: int) -> None:
    for count in (32, 512):
        positions = sample_positions(numel, torch.device("cpu"), count)
        assert len(positions) == count
        assert 0 <= int(positions.min()) < numel * 2 / count
        assert numel * (1 - 4 / count) < int(positions.max()) < numel
        assert int(positions.diff().max()) < numel * 3 / count


DRAWS: dict[str, Any] = {
    "python": random.random,
    "numpy": np.random.rand,
    "torch": lambda: torch.rand(1),
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_is_seen_in_the_digest_of_its_generator_alone(name: str) -> None:
    before = rng_digests()
    assert rng_digests() == before  # looking draws nothing
    DRAWS[name]()
    after = rng_digests()
    assert {key for key in before if before[key] != after[key]} == {name}


def test_equal_positions_under_different_seeds_differ() -> None:
    found = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        found.append(rng_digests())
    assert all(found[0][name] != found[1][name] for name in DRAWS)
