"""State belongs to a node: ranks that come back elsewhere find it, and a node holds each byte once."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moetion_lightning.engine import peers
from moetion_lightning.engine.group_restore import LiveReport
from moetion_lightning.engine.restore import RestorePoint
from moetion_lightning.errors import ConfigurationError, HostMemoryError, RankLostError, StateLostError
from moetion_lightning.events import CopiesChanged, Notice
from moetion_lightning.storage import host_memory
from moetion_lightning.storage.disk import DirectoryTier
from moetion_lightning.storage.host_memory import HostMemoryTier
from tests.command import until
from tests.node_ranks import Job, Rank
from tests.store_windows import commit_window

pytestmark = pytest.mark.slow


@pytest.fixture
def job(memory_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    monkeypatch.setenv("MOETION_SECRET", "secret")
    return Job(memory_dir / "nodes")


def begins(*iterations: int, shares: list[int] | None = None) -> Callable[[Rank], None]:
    """Train from the beginning, until windows that end with these iterations are committed and copied."""

    def work(rank: Rank) -> None:
        assert rank.open() is None
        rank.train(*iterations, shares=shares)

    return work


def values(point: RestorePoint) -> dict[int, list[torch.Tensor]]:
    """The tensors of all windows of a restore point, by rank."""
    found = {}
    for manifest, tier in point._parts:
        files = [load_file(tier.local_path(record)) for record in manifest.files]
        found[manifest.rank] = [tensor for file in files for _, tensor in sorted(file.items())]
    return found


def restores(*after: int) -> Callable[[Rank], tuple[int, int, dict[int, list[torch.Tensor]]]]:
    """Restore, then train on. Gives the window's rank and iteration, and all its bytes."""

    def work(rank: Rank) -> tuple[int, int, dict[int, list[torch.Tensor]]]:
        point = rank.open()
        assert point is not None, "starts from the beginning"
        found = values(point)
        rank.control.all_gather("read", None)
        rank.tiers.release_point()
        rank.train(*after)
        return point.manifest.rank, point.manifest.iteration, found

    return work


def check(results: list[Any], iteration: int, owners: dict[int, list[int]] | None = None) -> None:
    """Every rank restored its own window (and those of its shares), and every bit of it is as committed."""
    for rank, result in enumerate(results):
        assert not isinstance(result, BaseException), repr(result)
        assert result[:2] == (rank, iteration)
        assert sorted(result[2]) == (owners or {}).get(rank, [rank])
        for tensors in result[2].values():
            for index, tensor in enumerate(tensors):
                file = index // 3
                assert torch.equal(tensor, torch.full_like(tensor, iteration + file / 10))


def test_two_nodes_are_swapped(job: Job) -> None:
    assert job.run("AB", begins(20, 40)) == [None, None]
    assert job.directories("A") == ["rank-00000", "replica-00001-at-00000"]
    check(job.run("BA", restores(60)), 40)
    assert job.directories("A") == ["rank-00001", "replica-00000-at-00001"], "what dead processes left is gone"
    assert job.directories("B") == ["rank-00000", "replica-00001-at-00000"]
    check(job.run("AB", restores()), 60)
    check(job.run("BA", restores()), 60)


@pytest.mark.parametrize("lost", "ABC")
def test_a_node_is_replaced_and_all_ranks_shift(job: Job, lost: str) -> None:
    """As under torchrun, whose ranks are numbered by who comes: the spare node is the last one."""
    assert job.run("ABC", begins(20, 40)) == [None] * 3
    job.lose(lost)
    check(job.run("ABC".replace(lost, "") + "D", restores(60)), 40)
    check(job.run("ABC".replace(lost, "") + "D", restores()), 60)


def test_a_window_that_came_back_elsewhere_is_copied_again_before_it_is_lost(job: Job) -> None:
    """After the shift rank 1 is on C, which has its only copy: when C is lost as well, A has another one."""
    assert job.run("ABC", begins(40)) == [None] * 3
    job.lose("B")

    def waits(rank: Rank) -> None:
        point = rank.open()
        assert point is not None
        rank.control.all_gather("read", None)
        rank.tiers.release_point()
        rank.tiers.training_begins()
        held = rank.tiers.peers and rank.tiers.peers.copies
        assert held is not None
        assert held.wait_held(40, 60.0)

    assert job.run("ACD", waits) == [None] * 3
    job.lose("C")
    check(job.run("ADE", restores()), 40)


def test_a_restored_node_holds_each_byte_once(job: Job) -> None:
    """Four ranks hold the same state; two of them come back on a node that has nothing."""
    everybody = [0, 1, 2, 3]
    assert job.run("AABB", begins(40, shares=everybody), replicas=1) == [None] * 4
    job.lose("B")
    used: dict[int, list[str]] = {}

    def work(rank: Rank) -> tuple[int, int, dict[int, list[torch.Tensor]]]:
        point = rank.open()
        assert point is not None
        found = values(point)
        rank.control.all_gather("read", None)
        files = [p for p in (job.memory(rank.node) / "job").glob("*/files/*") if p.stat().st_nlink == 1]
        windows = [p for p in (job.memory(rank.node) / "job").glob("*/windows/*.json")]
        used[rank.rank] = sorted(str(p.parent.parent.name) for p in windows)
        assert len(files) == 2 * len(windows)
        rank.tiers.release_point()
        return point.manifest.rank, point.manifest.iteration, found

    check(job.run("AACC", work), 40, dict.fromkeys(range(4), everybody))
    copied = [name for name in used[2] if name.startswith("replica")]
    assert [name for name in used[2] if name.startswith("rank")] == ["rank-00002", "rank-00003"]
    assert sorted(int(name[8:13]) for name in copied) == [0, 1], "one copy of each, not one for each rank"
    assert len({name[-1] for name in copied}) == 2, "both ranks have copied"


def test_one_window_service_for_several_ranks_and_its_process_is_lost(job: Job) -> None:
    """The first rank of a node serves; when it is gone, another process does."""

    def work(rank: Rank) -> tuple[int, list[int]]:
        assert rank.open() is None
        rank.train(20)
        peers = rank.tiers.peers
        assert peers is not None
        assert peers.stands_for_node == (rank.rank in (0, 2))
        assert (peers._server is not None) == peers.stands_for_node
        if rank.rank == 0 and peers._server is not None:
            peers._server.close()  # what is left of a process that is killed
        if rank.rank == 2:
            until(lambda: None in peers.copies.held().values(), "that nobody serves there")
        rank.control.all_gather("lost", None)
        peers.open()
        peers.follow()
        newest = rank.tiers.host.read_manifest(20)
        until(lambda: rank.agree(newest).newest == 20 and not rank.agree(newest).uncopied, "copies again")
        rank.train(40)
        return len(set(peers._servers)), rank.tiers.host.windows()

    assert job.run("AABB", work) == [(2, [40])] * 4


def test_ranks_of_one_node_read_each_others_files_and_open_no_port(job: Job) -> None:
    everybody = [0, 1, 2]

    def quiet(rank: Rank) -> None:
        peers = rank.tiers.peers
        assert peers is not None
        assert (peers._server, peers._servers) == (None, {})

    def first(rank: Rank) -> None:
        begins(40, shares=everybody)(rank)
        quiet(rank)

    def again(rank: Rank) -> Any:
        result = restores()(rank)
        quiet(rank)
        return result

    assert job.run("AAA", first) == [None] * 3
    before = job.directories("A")
    check(job.run("AAA", again), 40, dict.fromkeys(range(3), everybody))
    assert job.directories("A") == before == ["rank-00000", "rank-00001", "rank-00002"], "nothing is copied"


def test_memory_is_divided_by_the_ranks_that_share_it(job: Job) -> None:
    def work(rank: Rank) -> int:
        assert rank.ranks.local_size == 3, "before the ranks have met: as if all shared one memory"
        rank.open()
        return rank.ranks.local_size

    assert job.run("AAB", work) == [3, 3, 3], "the memory directories of the test are in one file system"


# --- nothing, or not enough ------------------------------------------------------------------------------------------


def test_lost_state_is_no_fresh_start(job: Job) -> None:
    assert job.run("AB", begins(40), replicas=0) == [None, None]
    job.lose("A")
    for nodes in ("CB", "BC"):
        for result in job.run(nodes, lambda rank: rank.open()):
            assert isinstance(result, StateLostError)
            assert "the state of rank 0 is lost" in str(result)


def test_loss_before_the_first_window_is_no_lost_state(job: Job) -> None:
    """Directories are there, windows are not: processes that are all new begin anew."""
    assert job.run("AB", lambda rank: rank.open()) == [None, None]

    def work(rank: Rank) -> Any:
        live = LiveReport() if rank.rank else LiveReport(live=3)
        return rank.tiers.open(lambda: live, replay_stages=False)

    for result in job.run("AB", work):
        assert isinstance(result, RankLostError), result
        assert "no window was committed by all ranks" in str(result)


def test_new_nodes_begin_from_the_beginning(job: Job) -> None:
    assert job.run("AB", begins(40)) == [None, None]
    assert job.run("CD", lambda rank: rank.open()) == [None, None]


def test_windows_on_the_disk_of_another_node_are_no_fresh_start(job: Job, tmp_path: Path) -> None:
    """Ranks persisted to disks of their nodes, and have changed places since; all memory is lost."""
    for node, rank in (("A", 0), ("B", 1)):
        with HostMemoryTier(tmp_path / "memory", "job", rank, 2) as tier:
            disk = DirectoryTier(tmp_path / node, "job", rank, 2).open()
            disk.persist(commit_window(tier, 40, world_size=2, operators=[], extra={"shares": [rank]}), tier)
            disk.close()

    def work(rank: Rank) -> Any:
        return rank.open()

    results = job.run("BA", work, persist_dir={"A": str(tmp_path / "A"), "B": str(tmp_path / "B")})
    for result in results:
        assert isinstance(result, StateLostError), result
        assert "which is on another node now" in str(result)
        assert "storage that all nodes share" in str(result)


def test_windows_of_another_version_are_refused_with_the_remedy(job: Job) -> None:
    assert job.run("AB", begins(40)) == [None, None]
    for path in job.memory("A").parent.glob("*/job/*/windows/*.json"):
        path.write_bytes(path.read_bytes().replace(b'"version":5', b'"version":4'))
    for result in job.run("BA", lambda rank: rank.open()):
        assert isinstance(result, StateLostError)
        assert "window format version 4" in str(result)
        assert "another job_id" in str(result)


def test_copy_that_does_not_fit_is_no_lost_state(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    assert job.run("AB", begins(40)) == [None, None]
    job.lose("B")
    monkeypatch.setattr(host_memory, "free_bytes_at", lambda path: 10)
    results = job.run("AC", lambda rank: rank.open())
    for result in results:
        assert isinstance(result, HostMemoryError), result
        assert "rank 1 cannot copy the window 40 of rank 1" in str(result)


def test_damaged_window_is_read_from_another_directory_of_the_node(job: Job) -> None:
    """Both ranks are on one node, each a failure domain of its own."""
    domains = {"failure_domain": "node{rank}", "replicas": 1}
    assert job.run("AA", begins(40), **domains) == [None, None]
    for path in (job.memory("A") / "job" / "rank-00000" / "files").iterdir():
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    check(job.run("AA", restores(), **domains), 40)


def test_fresh_start_sets_aside_what_dead_processes_left(job: Job) -> None:
    assert job.run("AB", begins(20, 40)) == [None, None]

    def work(rank: Rank) -> None:
        assert rank.open(fresh=True) is None
        rank.tiers.set_aside()
        rank.control.all_gather("begun", None)

    assert job.run("BA", work) == [None, None]
    assert job.directories("A") == ["rank-00000", "rank-00001"]
    assert (job.memory("A") / "job" / "rank-00000" / "aside-000001").is_dir()
    assert job.run("AB", lambda rank: rank.open()) == [None, None]


# --- a peer that cannot be reached ------------------------------------------------------------------------------------


def test_copies_that_cannot_be_made_are_told_once_and_count_as_none(job: Job, caplog: pytest.LogCaptureFixture) -> None:
    def work(rank: Rank) -> tuple[Any, ...]:
        assert rank.open() is None
        rank.train(20)
        peers = rank.tiers.peers
        assert peers is not None
        if rank.rank == 1:  # the server of rank 1 is unreachable from now on
            assert peers._server is not None
            peers._server.close()
        newest = commit_window(rank.tiers.host, 40, world_size=2, operators=[])
        rank.tiers.on_commit(newest)
        until(lambda: (1, 0) in rank.agree(newest).uncopied, "that rank 0 cannot copy rank 1")
        agreed = rank.agree(newest)
        for _ in range(3):
            rank.tiers.agreed(agreed.newest, persist=False, uncopied=agreed.uncopied)
        missing = [event.missing for event in rank.events if isinstance(event, CopiesChanged)]
        notices = [event.message for event in rank.events if isinstance(event, Notice)]
        return agreed.uncopied, missing, len(notices)

    with caplog.at_level(logging.WARNING):
        results = job.run("AB", work)
    assert results == [(((1, 0),), [1], 1), (((1, 0),), [1], 0)]
    told = [r.getMessage() for r in caplog.records if "no copies of windows can be made" in r.getMessage()]
    assert len(told) == 1
    assert "of rank 1 to rank 0" in told[0]


def test_loopback_between_machines_is_refused_with_the_remedy(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that are in network namespaces of their own cannot reach each other there."""
    names = iter(["net:[1]", "net:[2]"])
    monkeypatch.setattr(peers, "_network_namespace", lambda: next(names))
    for result in job.run("AB", lambda rank: rank.open(), interface="lo"):
        assert isinstance(result, ConfigurationError)
        assert "a loopback address cannot be reached by other nodes" in str(result)
        assert "name or the subnet" in str(result)


def test_other_address_than_the_one_listened_on(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind a bridge or NAT: what is announced is not what is bound."""
    monkeypatch.setenv("MOETION_ADDRESS", "localhost")

    def work(rank: Rank) -> list[str]:
        begins(20)(rank)
        assert rank.tiers.peers is not None
        server = rank.tiers.peers._server
        assert server is not None
        assert server._listener.getsockname()[0] == socket.gethostbyname("localhost")
        return sorted({host for host, _ in rank.tiers.peers._servers.values()})

    assert job.run("AB", work) == [["localhost"]] * 2
