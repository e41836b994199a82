from __future__ import annotations

import datetime
import enum
import math
import random
import struct
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from moetion_lightning.core.kept_values import Fresh, Unchanging
from moetion_lightning.errors import CorruptSnapshotError, UnsupportedStateError, VersionError
from moetion_lightning.storage.tree import dump_tree, flatten_tree, load_tree
from moetion_lightning.storage.tree_cache import TreeCache

TENSOR_DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.uint16,
    torch.uint64, torch.bool, torch.complex32, torch.complex64, torch.complex128, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
]  # fmt: skip


def same(a, b) -> bool:
    """Bitwise and type-exact equality of trees."""
    if isinstance(a, torch.Tensor):
        raw = [t.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        return type(b) is torch.Tensor and a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)
    if type(a) is not type(b):
        return False
    if isinstance(a, (np.ndarray, np.generic)):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, float):
        return struct.pack(">d", a) == struct.pack(">d", b)
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, dict):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a.items(), b.items(), strict=True))
    if isinstance(a, (list, tuple, deque)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


tensors = st.builds(
    lambda dtype, shape, seed: torch.from_numpy(
        np.random.default_rng(seed).integers(0, 2 if dtype is torch.bool else 256, math.prod(shape) * dtype.itemsize)
        .astype(np.uint8)
    ).as_strided((math.prod(shape) * dtype.itemsize,), (1,)).view(dtype).view(shape),
    st.sampled_from(TENSOR_DTYPES), st.lists(st.integers(0, 3), max_size=3), st.integers(0, 99),
)  # fmt: skip
hashables = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters()) | st.binary()
)
leaves = st.one_of(
    hashables, st.floats(), st.complex_numbers(), tensors, st.sampled_from(TENSOR_DTYPES), st.timedeltas(),
    st.datetimes(timezones=st.sampled_from([None, datetime.timezone.utc])), st.dates(),
    st.just(torch.device("cuda:1")), st.builds(torch.Size, st.lists(st.integers(0, 9))),
    st.binary(min_size=1025, max_size=2000).map(bytearray), st.sets(hashables), st.frozensets(hashables),
)  # fmt: skip
trees = st.recursive(
    leaves,
    lambda t: st.one_of(
        st.lists(t), st.lists(t).map(tuple), st.dictionaries(st.text(), t),
        st.dictionaries(hashables | st.tuples(hashables), t), st.lists(st.tuples(st.text(), t)).map(OrderedDict),
        st.builds(deque, st.lists(t), st.none() | st.integers(0, 9)), st.text().map(Counter),
    ),
    max_leaves=12,
)  # fmt: skip


@settings(deadline=None, max_examples=200)
@given(trees)
def test_round_trip_is_exact(tree):
    assert same(tree, load_tree(dump_tree(tree)))


@pytest.mark.parametrize(
    "value",
    [
        float("nan"), -0.0, math.inf, 2**4000, -(2**63) - 1, "\ud83d\ude00", Path("/tmp/x"), PurePosixPath("a"),
        PureWindowsPath("c:\\a"), np.float32(1.5), np.str_(""), np.str_("ab"), np.bool_(True), np.array("x"),
        np.datetime64("2024-01-01"), np.arange(6, dtype=">i4").reshape(2, 3), np.zeros((0, 3)), np.arange(999.0),
        np.zeros((2,), "U0"), torch.Size([1, 2]), b"", bytearray(b"x"), b"\0" * 5000, deque([1], maxlen=1),
        datetime.datetime(2024, 1, 1, fold=1), {True: 1, "1": 2, (1, None): [3]}, random.Random(3).getstate(),
        struct.unpack(">d", bytes.fromhex("7ff0000000000001"))[0],
    ],
)  # fmt: skip
def test_special_values_round_trip(value):
    assert same(value, load_tree(dump_tree(value)))


def test_defaultdict_comes_back_as_dict():
    assert load_tree(dump_tree(defaultdict(list, a=[1]))) == {"a": [1]}


def test_random_states_of_numpy_and_torch_round_trip():
    state = {
        "np": np.random.get_state(),
        "gen": np.random.default_rng(1).bit_generator.state,
        "t": torch.get_rng_state(),
    }
    assert same(state, load_tree(dump_tree(state)))


def test_a_tensor_referred_to_twice_is_stored_once_and_comes_back_as_one():
    t = torch.randn(1000)
    flat = flatten_tree({"a": t, "b": [t]})
    assert len(flat.tensors) == 1
    loaded = load_tree(flat.to_bytes())
    assert loaded["a"] is loaded["b"][0]


def test_views_that_cover_a_storage_store_it_once_and_share_memory_again():
    base = torch.arange(12.0).reshape(3, 4)
    tree = {"all": base, "row": base[1], "column": base[:, 2], "t": base.t()}
    flat = flatten_tree(tree)
    assert len(flat.tensors) == 1
    loaded = load_tree(flat.to_bytes())
    assert same(tree, loaded)
    loaded["all"].fill_(7)
    assert loaded["column"].tolist() == [7, 7, 7]


def test_small_views_of_a_big_storage_do_not_store_all_of_it():
    base = torch.zeros(100_000)
    assert len(dump_tree([base[:2], base[5:7]])) < 2000


@pytest.mark.parametrize("tensor", [
    torch.arange(6).reshape(2, 3).t(), torch.zeros(1).expand(4), torch.randn(3, dtype=torch.complex64).conj(),
    torch.tensor(5), torch.empty(0, 3), torch.nn.Parameter(torch.ones(2)), torch.arange(8)[::2],
])  # fmt: skip
def test_unusual_tensors_come_back_equal(tensor):
    loaded = load_tree(dump_tree([tensor]))[0]
    assert torch.equal(loaded, tensor)
    assert not loaded.requires_grad


def test_clone_detaches_from_the_callers_memory():
    t, a = torch.zeros(3), np.zeros(999)
    flat = flatten_tree({"t": t, "v": t[1:], "a": a}, clone=True)
    t.fill_(1)
    a.fill(1)
    loaded = load_tree(flat.to_bytes())
    assert loaded["t"].sum() == 0
    assert loaded["v"].sum() == 0
    assert loaded["a"].sum() == 0


def test_file_is_safetensors_and_loads_from_a_path(tmp_path):
    path = tmp_path / "rest.safetensors"
    path.write_bytes(dump_tree({"w": torch.ones(3)}))
    with safe_open(path, "pt") as file:
        assert torch.equal(file.get_tensor("t0"), torch.ones(3))
    assert torch.equal(load_tree(path)["w"], torch.ones(3))


def test_write_into_a_buffer_is_the_same_file():
    flat = flatten_tree({"w": torch.ones(3)})
    buffer = torch.zeros(flat.layout.nbytes, dtype=torch.uint8)
    flat.write_into(buffer, flat.layout)
    assert buffer.numpy().tobytes() == flat.to_bytes()


class Colour(enum.IntEnum):
    RED = 1


Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    "leaf",
    [object(), lambda: 0, torch.Generator(), torch.nn.Linear(1, 1), np.array([object()]),
     torch.zeros(2, 2).to_sparse_csr(), torch.zeros(2, device="meta"), slice(1)],
)  # fmt: skip
def test_unsupported_leaf_names_its_path_and_the_remedy(leaf):
    with pytest.raises(UnsupportedStateError, match=r"callbacks/EMA/0.*state_dict\(\)"):
        dump_tree({"callbacks": {"EMA": [leaf]}})


def test_cycles_and_bottomless_nesting_are_refused():
    cycle: list = []
    cycle.append(cycle)
    with pytest.raises(UnsupportedStateError, match="contains itself"):
        dump_tree(cycle)
    deep: list = []
    for _ in range(200):
        deep = [deep]
    with pytest.raises(UnsupportedStateError, match="nested deeper"):
        dump_tree(deep)


def test_nesting_up_to_the_limit_loads():
    deep: object = 1
    for _ in range(100):
        deep = {1: deep}
    assert load_tree(dump_tree(deep)) == deep


def test_leaf_and_resolve_replace_values_by_references():
    parameter = torch.nn.Parameter(torch.ones(2))
    data = dump_tree(
        {"p": parameter, "o": torch.zeros(1), "k": Colour.RED},
        leaf=lambda v: {"ref": "param:w"} if v is parameter else "red" if v is Colour.RED else NotImplemented,
    )
    loaded = load_tree(data, resolve=lambda ref: parameter if ref == {"ref": "param:w"} else Colour.RED)
    assert loaded["p"] is parameter
    assert loaded["k"] is Colour.RED
    with pytest.raises(UnsupportedStateError, match="resolve"):
        load_tree(data)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(0, 255))
def test_damaged_trees_load_or_are_refused_but_never_crash(position, byte):
    data = bytearray(dump_tree({"a": [1, 2.5, torch.arange(4)], "b": {3: np.arange(3)}, "v": Path("x")}))
    data[position % len(data)] = byte
    try:
        load_tree(bytes(data))
    except (CorruptSnapshotError, UnsupportedStateError, VersionError):
        pass


def through(tree, cache):
    return load_tree(flatten_tree(tree, cache=cache).to_bytes())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow])
@given(st.lists(st.dictionaries(st.text(), trees), min_size=2, max_size=4), st.data())
def test_what_a_cache_knows_of_other_trees_changes_nothing(forms, data):
    """Trees take turns, so that values of all kinds come and go in the same places."""
    cache = TreeCache()
    for _ in range(6):
        tree = {"a": Fresh(data.draw(st.sampled_from(forms))), "b": [Fresh(data.draw(st.sampled_from(forms)))]}
        assert same(through(tree, cache), load_tree(dump_tree(tree)))


@pytest.mark.parametrize(
    "values",
    [
        [1, True, 1.0, 0.0, -0.0, "1", (1,), [1], None, math.nan, 2**70, {1: 2}, {"1": 2}, "\ud800", {"\ud800": 1}],
        [None, 1.5, np.float64(1.5), torch.ones(2), 2],
        [[1.5] * 3, [1.5] * 50, [math.nan] * 50, [(1, 2)] * 50, [np.float32(1)] * 50],
        [{"a": 1}, {"a": {1, 2}}, {"a": 1 + 2j}, {"a": b"s"}, {"a": bytearray(b"s")}, {"a": np.arange(3)}],
        [Unchanging(a=np.arange(3)), {"a": np.arange(3)}, {"a": 1}, Unchanging(a=2), Fresh(a=2), Fresh(a=np.int64(2))],
        ["s", "t", np.str_("s"), np.bytes_(b"s")],
    ],
)
def test_values_that_become_others_are_told_apart(values):
    cache = TreeCache()
    for value in [*values, *values[::-1], *values]:
        tree = {"x": Fresh(same="sss", y=value)}
        assert same(through(tree, cache), load_tree(dump_tree(tree)))


def test_depth_is_limited_in_a_cached_tree_too():
    cache, value = TreeCache(), 1
    for depth in range(95):
        value = [value]
        if not depth % 9:
            assert same(through({"x": Fresh(y=value)}, cache), {"x": {"y": value}})
    for _ in range(9):
        value = [value]
    with pytest.raises(UnsupportedStateError, match="nested deeper"):
        through({"x": Fresh(y=value)}, cache)


def test_what_is_one_object_stays_one_beside_cached_parts():
    cache, fresh = TreeCache(), Fresh(n={"m": [1, 2]})
    one, other = [1], [1]
    for count in range(4):
        if count == 2:
            other = one  # begins to be shared, and nothing else changes
        tree = {"f": fresh, "g": [fresh, fresh], "one": {"it": one}, "other": {"it": other}, "t": torch.ones(1)}
        found = through(tree, cache)
        assert found["g"][0] is found["g"][1] is found["f"]
        assert (found["one"]["it"] is found["other"]["it"]) is (count >= 2)
        assert same(found, load_tree(dump_tree(tree)))


def test_a_dict_that_does_not_change_is_walked_once():
    cache = TreeCache()
    state = Unchanging(numbers=np.arange(625, dtype=np.uint32), inner=Unchanging(x=(1, None)))
    first = flatten_tree({"a": state, "b": 1}, cache=cache).structure["root"]["d"]["a"]
    again = flatten_tree({"a": state, "b": 2}, cache=cache)
    assert again.structure["root"]["d"]["a"] is first
    assert same(load_tree(again.to_bytes()), {"a": {"numbers": state["numbers"], "inner": {"x": (1, None)}}, "b": 2})
