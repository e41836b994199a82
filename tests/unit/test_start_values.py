"""What ranks agree on at start, read by a process that comes later."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from moetion_lightning.distributed import start_values
from moetion_lightning.distributed.start_values import StartValues
from moetion_lightning.errors import LaunchError, RankLostError

Functions = dict[str, Callable[..., Any]]

NAMES = ("broadcast_object_list", "all_gather_object", "broadcast", "all_reduce")


@pytest.fixture(autouse=True)
def _torchs_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """They do nothing here, and are put back."""
    monkeypatch.setattr(start_values, "_WAIT_SECONDS", 20.0)
    for module in (dist, distributed_c10d):
        for name in start_values._KINDS:
            monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(dist, "broadcast_object_list", lambda object_list, src=None, group=None: None)
    monkeypatch.setattr(dist, "all_gather_object", lambda object_list, obj, group=None: None)
    monkeypatch.setattr(dist, "broadcast", lambda tensor, src=None, group=None, async_op=False: None)
    monkeypatch.setattr(
        dist, "all_reduce", lambda tensor, op=dist.ReduceOp.SUM, group=None, async_op=False: tensor.fill_(0.25)
    )


def rank_of(
    store: dist.HashStore, rank: int, *, alone: bool = False
) -> tuple[StartValues, dict[str, Callable[..., Any]]]:
    values = StartValues(lambda: store, rank, 2)
    values.alone = alone
    before = {name: getattr(dist, name) for name in NAMES}
    values.stand_between()
    functions = {name: getattr(dist, name) for name in NAMES}
    for name, function in before.items():
        setattr(dist, name, function)
    return values, functions


def agree(functions: Functions, own: Any) -> Any:
    objects = [own]
    functions["broadcast_object_list"](objects, src=0)
    return objects[0]


def test_a_newcomer_reads_what_the_others_have_agreed_on() -> None:
    store = dist.HashStore()
    for rank, alone in ((0, False), (1, False), (0, True)):  # one place in the program for all
        values, functions = rank_of(store, rank, alone=alone)
        folder = agree(functions, {"folder": f"run-{rank}-{alone}", "shape": (1, 2)})
        total = torch.ones(1)
        functions["all_reduce"](total)
        values.end()
    assert folder == {"folder": "run-0-False", "shape": (1, 2)}
    assert total.item() == 0.25, "the backend's own sum, not one of our order"


def test_what_a_newcomer_leaves_out_shifts_nothing() -> None:
    store = dist.HashStore()
    for rank, alone in ((0, False), (1, False), (1, True)):
        values, functions = rank_of(store, rank, alone=alone)
        if not alone:
            agree(functions, "a check")
        folder = agree(functions, f"folder of {rank} {alone}")
        values.end()
    assert folder == "folder of 0 False"


def test_several_newcomers_agree_with_each_other() -> None:
    """No rank has come through its start yet."""
    store = dist.HashStore()
    found: dict[int, list[Any]] = {}

    def start(rank: int, functions: Functions) -> None:
        gathered: list[Any] = [None, None]
        functions["all_gather_object"](gathered, f"of rank {rank}")
        seed = torch.tensor([float(rank)])
        functions["broadcast"](seed, src=1)
        total = torch.tensor([rank + 1.0])
        functions["all_reduce"](total)
        found[rank] = [gathered, seed.item(), total.item()]

    ranks = [rank_of(store, rank, alone=True)[1] for rank in (0, 1)]
    threads = [threading.Thread(target=start, args=(rank, functions)) for rank, functions in enumerate(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found[0] == found[1] == [["of rank 0", "of rank 1"], 1.0, 3.0]


def test_where_the_others_did_not_come_along_they_would_have_given_the_same() -> None:
    store = dist.HashStore()
    values, _ = rank_of(store, 0)
    values.end()
    _, functions = rank_of(store, 1, alone=True)
    assert agree(functions, "mine") == "mine"
    total = torch.ones(1)
    functions["all_reduce"](total)
    assert total.item() == 2.0
    whole = torch.tensor([7])
    functions["all_reduce"](whole, op=dist.ReduceOp.AVG)
    assert whole.item() == 7


def test_what_cannot_be_kept_is_refused_with_the_line(caplog: pytest.LogCaptureFixture) -> None:
    store = dist.HashStore()

    def start(rank: int, *, alone: bool) -> None:
        agree(rank_of(store, rank, alone=alone)[1], object())

    def all_start() -> None:
        for rank, alone in ((0, False), (1, False), (1, True)):
            start(rank, alone=alone)

    with pytest.raises(LaunchError, match=r"test_start_values.py:\d+: what the ranks agree on.*torchrun"):
        all_start()
    assert f"{__file__}:" in caplog.text
    assert "broadcast_object_list" in caplog.text


def test_what_is_called_again_and_again_is_no_start_and_weights_are_not_kept() -> None:
    store = dist.HashStore()
    values, functions = rank_of(store, 0)
    for _ in range(200):
        agree(functions, "again")
    assert store.num_keys() <= 65
    functions["broadcast"](torch.zeros(1 << 20), src=0)
    assert store.num_keys() <= 65
    values.end()
    assert dist.broadcast_object_list is not functions["broadcast_object_list"]


def test_nobody_who_waits_in_vain_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_values, "_WAIT_SECONDS", 0.1)
    _, functions = rank_of(dist.HashStore(), 1, alone=True)
    with pytest.raises(LaunchError, match="rank 1 was started again and waited.*broadcast_object_list at .*test_start"):
        agree(functions, "mine")


def test_newcomer_does_not_wait_for_those_that_went_back_to_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends, and the process that takes its place meets them."""
    monkeypatch.setattr(start_values, "_LOST_SECONDS", 0.05)

    def check() -> None:
        raise RankLostError("generation 2 begins")

    values, functions = rank_of(dist.HashStore(), 1, alone=True)
    values._check = check
    with pytest.raises(RankLostError, match="generation 2"):
        agree(functions, "own")
