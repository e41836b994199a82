"""Batches of every form, cut into micro-batches: each sample once, in order, nothing but tensors and lists changed."""

from __future__ import annotations

import json
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.pipeline.micro_batches import map_tensors, signature, split_batch, tensors_of


class Pair(NamedTuple):
    tokens: Tensor
    target: Tensor


@dataclass(frozen=True)
class Sample:
    """A batch as user code writes it: tensors, a setting, and a field that is computed."""

    tokens: Tensor
    pair: Pair
    scale: float = 1.0
    rows: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", len(self.tokens))


def numbers(size: int, *more: int, start: int = 0) -> Tensor:
    count = size * (torch.Size(more).numel() if more else 1)
    return torch.arange(start, start + count).reshape(size, *more)


def equal(first: Any, second: Any) -> bool:
    """The same containers with the same values."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, Mapping):
        return (
            type(first) is type(second)
            and list(first) == list(second)
            and all(equal(first[key], second[key]) for key in first)
        )
    if isinstance(first, (list, tuple)):
        return type(first) is type(second) and len(first) == len(second) and all(map(equal, first, second))
    return type(first) is type(second) and bool(first == second)


@given(st.integers(1, 40), st.integers(1, 12))
def test_pieces_are_those_of_tensor_split(size: int, count: int) -> None:
    batch = {"x": numbers(size, 3), "names": [str(index) for index in range(size)]}
    pieces = split_batch(batch, count)
    expected = batch["x"].tensor_split(min(count, size))  # type: ignore[union-attr]
    assert len(pieces) == len(expected)
    for piece, rows in zip(pieces, expected):
        assert torch.equal(piece["x"], rows)
        assert piece["names"] == [str(int(row)) for row in rows[:, 0] // 3]


def test_fewer_samples_than_micro_batches_give_one_each() -> None:
    assert [piece.tolist() for piece in split_batch(numbers(2), 5)] == [[0], [1]]


@pytest.mark.parametrize(
    ("batch", "first"),
    [
        (numbers(4), numbers(2)),
        ([numbers(4), numbers(4, 2)], [numbers(2), numbers(2, 2)]),
        ((numbers(4), {"y": numbers(4)}), (numbers(2), {"y": numbers(2)})),
        (OrderedDict(b=numbers(4), a=numbers(4)), OrderedDict(b=numbers(2), a=numbers(2))),
        (defaultdict(list, x=numbers(4)), defaultdict(list, x=numbers(2))),
        (Pair(numbers(4), numbers(4, 2)), Pair(numbers(2), numbers(2, 2))),
        ([numbers(4), ["a", "b", "c", "d"]], [numbers(2), ["a", "b"]]),
        ([numbers(4), ("a", "b", "c", "d")], [numbers(2), ("a", "b")]),
        ([numbers(4), [0.5, None, True, 3]], [numbers(2), [0.5, None]]),
        ([numbers(4), ["one", "for all"], "text", 7, None], [numbers(2), ["one", "for all"], "text", 7, None]),
        ([numbers(4), torch.tensor(2.5)], [numbers(2), torch.tensor(2.5)]),
        ({"x": numbers(4), "list": [numbers(4), numbers(4)]}, {"x": numbers(2), "list": [numbers(2), numbers(2)]}),
        ({"x": numbers(3), "size": torch.Size([2, 2])}, {"x": numbers(2), "size": torch.Size([2, 2])}),
        ({1: numbers(4), ("a", 2): [numbers(4)]}, {1: numbers(2), ("a", 2): [numbers(2)]}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_containers_keep_their_type_and_order(batch: Any, first: Any) -> None:
    before = map_tensors(batch, torch.clone)
    assert equal(split_batch(batch, 2)[0], first)
    assert equal(batch, before)


def test_dataclasses_are_made_again_with_their_pieces() -> None:
    batch = Sample(numbers(5), Pair(numbers(5, 2), numbers(5)), scale=0.5)
    pieces = split_batch(batch, 2)
    assert [piece.rows for piece in pieces] == [3, 2]
    assert all(piece.scale == 0.5 and isinstance(piece.pair, Pair) for piece in pieces)
    assert torch.equal(torch.cat([piece.pair.tokens for piece in pieces]), batch.pair.tokens)


class Size(NamedTuple):
    height: int
    width: int


class Own(MutableMapping[str, Any]):
    """A mapping of the user's that keeps its items in an object of its own."""

    def __init__(self, **items: Any) -> None:
        self._items = items

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._items[key] = value

    def __delitem__(self, key: str) -> None:
        del self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


def test_named_tuples_of_plain_values_are_no_lists_of_samples() -> None:
    pieces = split_batch({"x": numbers(2), "size": Size(2, 2)}, 2)
    assert [piece["size"] for piece in pieces] == [Size(2, 2)] * 2


def test_mappings_that_share_their_items_when_copied_are_left_as_they_were() -> None:
    batch = Own(x=numbers(4))
    assert [piece["x"].tolist() for piece in split_batch(batch, 2)] == [[0, 1], [2, 3]]
    assert torch.equal(batch["x"], numbers(4))


def test_mappings_that_cannot_be_changed_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"a mappingproxy in a batch holds tensors.*expected a dict.*collate"):
        split_batch({"x": numbers(4), "more": MappingProxyType({"y": numbers(4)})}, 2)


@pytest.mark.hf
def test_batch_encodings_keep_their_type() -> None:
    from transformers import BatchEncoding

    batch = BatchEncoding({"input_ids": numbers(4, 3), "length": [3, 3, 3, 3]}, prepend_batch_axis=False)
    first, second = split_batch(batch, 2)
    assert type(first) is BatchEncoding
    assert torch.equal(torch.cat([first.input_ids, second.input_ids]), numbers(4, 3))
    assert first["length"] == [3, 3]
    assert torch.equal(batch["input_ids"], numbers(4, 3))


def test_a_dataclass_itself_is_a_plain_value() -> None:
    assert split_batch({"x": numbers(2), "kind": Sample}, 2)[1]["kind"] is Sample


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ({"a": numbers(4), "b": numbers(3)}, "tensors of 3 and 4 samples"),
        ([numbers(2), [numbers(6), numbers(4)]], "tensors of 2 and 4 and 6 samples"),
        ({"a": torch.tensor(1.0)}, "no tensor with a batch dimension"),
        (["text"], "no tensor with a batch dimension"),
        (object(), "no tensor with a batch dimension"),
        ({"a": torch.zeros(0, 2)}, "tensors of 0 samples"),
    ],
)
def test_batches_that_cannot_be_cut_say_what_was_found_and_what_to_do(batch: Any, found: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        split_batch(batch, 2)
    assert found in str(raised.value)
    assert "agree in dimension 0" in str(raised.value)
    assert "Define split_batch(self, batch, num_micro_batches)" in str(raised.value)


def test_pieces_share_the_memory_of_the_batch() -> None:
    batch = numbers(4)
    assert [piece.untyped_storage().data_ptr() for piece in split_batch(batch, 2)] == [batch.data_ptr()] * 2


def test_tensors_are_visited_in_one_order_and_put_back_in_it() -> None:
    batch = {
        "b": [numbers(1), (numbers(2),)],
        "a": Sample(numbers(3), Pair(numbers(4), numbers(5))),
        "text": ["x"],
        "scalar": torch.tensor(0),
    }
    found = tensors_of(batch)
    assert [tuple(tensor.shape) for tensor in found] == [(1,), (2,), (3,), (4,), (5,), ()]
    waiting = iter([tensor + 1 for tensor in found])
    replaced = map_tensors(batch, lambda tensor: next(waiting))
    assert all(torch.equal(new, old + 1) for new, old in zip(tensors_of(replaced), found))
    assert replaced["text"] == ["x"]


def test_a_template_without_rows_takes_the_tensors_of_a_whole_batch() -> None:
    """So a stage that replays makes its batch from logged tensors."""
    batch = {"x": numbers(4, 2), "pair": Pair(numbers(4), torch.tensor(3)), "names": ["a", "b"]}
    template = map_tensors(batch, lambda tensor: tensor[:0] if tensor.dim() else tensor)
    waiting = iter(tensors_of(batch))
    assert equal(map_tensors(template, lambda tensor: next(waiting)), batch)


def test_signatures_agree_exactly_where_shapes_and_dtypes_do() -> None:
    def of(size: int, dtype: torch.dtype = torch.int64, name: str = "a") -> Any:
        return signature({"x": numbers(size).to(dtype), "name": name})

    assert of(3) == of(3, name="b")
    assert of(3) != of(4)
    assert of(3) != of(3, torch.int32)
    assert of(3) == (((3,), "torch.int64"),)
    assert signature([numbers(2), numbers(3)]) != signature([numbers(3), numbers(2)])
    assert hash(of(3)) == hash(of(3))
    sent = json.loads(json.dumps(of(3)))
    assert tuple((tuple(shape), dtype) for shape, dtype in sent) == of(3)
