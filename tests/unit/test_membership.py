"""Generations, membership and the places of nodes, against a real store in this process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from torch.distributed import PrefixStore, TCPStore

from moetion_lightning.cli import main
from moetion_lightning.config import LaunchedProcess, launched_process
from moetion_lightning.distributed.generations import announce_loss, newest_generation, read_records
from moetion_lightning.distributed.launch import derive_job_id
from moetion_lightning.distributed.launch_settings import Launch
from moetion_lightning.distributed.membership import Membership
from moetion_lightning.distributed.nodes import NodeLease, Place, Roster, check_claim
from moetion_lightning.distributed.processes import Program, describe_exit
from moetion_lightning.distributed.stable_store import connect_store, host_store, parse_endpoint
from moetion_lightning.errors import ConfigurationError, LaunchError, RankLostError

RUN = "job.1"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def server() -> TCPStore:
    return host_store("127.0.0.1")


@pytest.fixture
def store(server: TCPStore) -> PrefixStore:
    return PrefixStore(RUN, server)


def process(server: TCPStore, rank: int = 1, generation: int = 0) -> LaunchedProcess:
    return LaunchedProcess(
        rank=rank,
        world_size=4,
        store_host="127.0.0.1",
        store_port=server.port,
        run_id=RUN,
        generation=generation,
        failure_domain="here",
        local_address="127.0.0.1",
    )


def test_loss_is_noticed_and_adopted(server: TCPStore, store: PrefixStore) -> None:
    with closing(Membership(process(server))) as membership:
        membership.check()
        assert membership.generation == 0
        assert not membership.is_replacement
        assert announce_loss(store, [3, 2], "killed") == 1
        assert membership.wait_for_loss(10.0)
        with pytest.raises(RankLostError, match=r"lost ranks 2, 3 \(killed\): generation 1 begins"):
            membership.check()
        assert membership.generation == 0
        assert membership.advance() == 1
        membership.check()


def test_losses_since_the_own_generation_are_merged(server: TCPStore, store: PrefixStore) -> None:
    announce_loss(store, [0], "first")
    announce_loss(store, [2], "second")
    with closing(Membership(process(server))) as membership:
        with pytest.raises(RankLostError, match=r"lost ranks 0, 2 \(first; second\): generation 2 begins"):
            membership.check()
    with closing(Membership(process(server, rank=0, generation=1))) as replacement:
        assert replacement.is_replacement
        assert replacement.generation == 1
        with pytest.raises(RankLostError, match=r"lost ranks 2 \(second\)"):
            replacement.check()


def test_process_that_was_replaced_may_not_go_on(server: TCPStore, store: PrefixStore) -> None:
    announce_loss(store, [1], "node 0 gave no sign of life")
    with closing(Membership(process(server, rank=1))) as membership:
        with pytest.raises(RankLostError, match="rank 1 itself was declared lost in generation 1"):
            membership.check()
        with pytest.raises(RankLostError, match="this one must end"):
            membership.advance()


def test_waiting_ends_without_a_loss(server: TCPStore) -> None:
    with closing(Membership(process(server))) as membership:
        assert not membership.wait_for_loss(0.05)


def test_store_that_is_gone_is_a_loss() -> None:
    server = host_store("127.0.0.1")
    membership = Membership(process(server))
    del server
    assert membership.wait_for_loss(20.0)
    with pytest.raises(RankLostError, match="does not answer rank 1 any more"):
        membership.check()
    membership.close()


def test_interpreter_ends_cleanly_while_watching(server: TCPStore) -> None:
    code = f"""
from moetion_lightning.config import LaunchedProcess
from moetion_lightning.distributed import membership
membership._POLL_SECONDS = 0.0  # the thread is nearly always inside the store
watched = membership.Membership({process(server)!r})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_concurrent_losses_get_numbers_and_records_without_holes(server: TCPStore) -> None:
    def announce(rank: int) -> None:
        own = PrefixStore(RUN, connect_store("127.0.0.1", server.port))
        for _ in range(10):
            announce_loss(own, [rank], f"rank {rank}")

    threads = [threading.Thread(target=announce, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store = PrefixStore(RUN, server)
    assert newest_generation(store) == 30
    records = read_records(store, 0, 30)
    assert [record.generation for record in records] == list(range(1, 31))
    assert sorted(record.lost for record in records) == [(rank,) for rank in range(3) for _ in range(10)]


def test_newest_generation_never_goes_back(store: PrefixStore) -> None:
    store.set("moetion/generation/1", "taken by a launcher that died before it told")
    assert announce_loss(store, [0], "killed") == 2
    assert newest_generation(store) == 2


def test_incomplete_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOETION_STORE", "127.0.0.1:29400")
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(ConfigurationError, match="Start the job with `moetion launch`"):
        launched_process()


def test_store_listens_on_its_interface_only(server: TCPStore) -> None:
    listening = [c.laddr for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert [a.ip for a in listening if a.port == server.port] == ["127.0.0.1"]


class Clock:
    """Counts the waits of a roster and ends them."""

    def __init__(self, limit: int = 1000, at: dict[int, Callable[[], None]] | None = None) -> None:
        self.count = 0
        self._limit = limit
        self._at = at or {}

    def __call__(self, seconds: float) -> None:
        self.count += 1
        self._at.get(self.count, lambda: None)()
        if self.count > self._limit:
            raise TimeoutError


def roster(server: TCPStore, pause: Callable[[float], None] | None = None, nodes: int = 2) -> Roster:
    own = connect_store("127.0.0.1", server.port)
    pause = pause or (lambda seconds: threading.Event().wait(0.005))
    return Roster(own, "job", num_nodes=nodes, ranks_per_node=2, node_timeout=0.3, pause=pause)


def claim(of: Roster, wanted: int | None = None, *, may_wait: bool = True) -> Place:
    place = of.claim(wanted, may_wait=may_wait)
    assert place is not None
    return place


def test_places_are_claimed_once(server: TCPStore) -> None:
    assert claim(roster(server), 1).slot == 1
    assert claim(roster(server)).slot == 0
    with pytest.raises(TimeoutError):
        roster(server, Clock(3)).claim(None, may_wait=True)


def test_place_of_a_silent_node_is_taken_over(server: TCPStore) -> None:
    silent, alive, spare = claim(roster(server)), claim(roster(server)), roster(server)
    lease = NodeLease(PrefixStore(spare.run_id, connect_store("127.0.0.1", server.port)), alive, 0.3)
    taken = claim(spare)
    lease.close()
    assert taken.slot == silent.slot
    assert taken.taken_over is not None
    assert f"launcher {os.getpid()}" in taken.taken_over
    reason = check_claim(spare.store, silent)
    assert reason is not None
    assert "has taken node 0" in reason
    assert check_claim(spare.store, alive) is None


def test_lease_tells_that_the_place_was_taken(server: TCPStore) -> None:
    own = roster(server)
    place = claim(own)
    own.store.set("moetion/node/0", '{"host": "other", "pid": 7}')
    lease = NodeLease(PrefixStore(own.run_id, connect_store("127.0.0.1", server.port)), place, 0.3)
    lease._thread.join(timeout=10.0)
    assert lease.stop_reason is not None
    assert "launcher 7 on other" in lease.stop_reason
    lease.close()


def test_run_without_any_live_node_is_not_continued(server: TCPStore) -> None:
    for _ in range(2):
        claim(roster(server))
    later = roster(server)
    place = claim(later)
    assert (place.taken_over, later.run_id) == (None, "job.2")


def test_ended_run_makes_room_for_the_next(server: TCPStore) -> None:
    first = roster(server, nodes=1)
    spare = roster(server, nodes=1)
    first.finish(claim(first).slot)
    assert first.ended() == "finished"
    assert spare.claim(None, may_wait=True) is None
    assert roster(server, nodes=1).run_id == "job.2"


def test_failure_reaches_those_who_wait(server: TCPStore) -> None:
    first, second = roster(server), roster(server)
    claim(first)
    claim(second)
    second.fail("rank 0: exit code 1")
    with pytest.raises(LaunchError, match="the job failed: rank 0: exit code 1"):
        first.wait_for_end()


def test_different_layouts_are_refused(server: TCPStore) -> None:
    roster(server, nodes=2)
    with pytest.raises(ConfigurationError, match="same --nnodes minimum and --nproc-per-node"):
        roster(server, nodes=3)


@pytest.mark.parametrize(("text", "expected"), [("2", (2, 2)), ("2:3", (2, 3)), ("1:1", (1, 1))])
def test_nodes(text: str, expected: tuple[int, int]) -> None:
    made = Launch(program=Program(argv=("json",), is_module=True), nnodes=text, rdzv_endpoint="h:1")
    assert (made.min_nodes, made.max_nodes) == expected


@pytest.mark.parametrize(("text", "expected"), [("h:1", ("h", 1)), ("[::1]:65535", ("::1", 65535))])
def test_endpoints(text: str, expected: tuple[str, int]) -> None:
    assert parse_endpoint(text) == expected


@pytest.mark.parametrize("text", ["h", "h:", ":1", "h:0", "h:65536", "h:x"])
def test_wrong_endpoints_are_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="expected HOST:PORT"):
        parse_endpoint(text)


def test_exits_in_words() -> None:
    assert [describe_exit(s) for s in (1, -9, -200)] == ["exit code 1", "killed by SIGKILL", "killed by signal 200"]


def test_same_command_is_the_same_job() -> None:
    first = derive_job_id(Program(argv=("a b.py", "--x", "1"), is_module=False))
    assert first == derive_job_id(Program(argv=("a b.py", "--x", "1"), is_module=False))
    assert first != derive_job_id(Program(argv=("a b.py", "--x 1"), is_module=False))
    assert first.startswith("a_b-")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--nnodes", "3:2"], "--nnodes '3:2': expected N or MIN:MAX"),
        (["--nnodes", "x"], "--nnodes 'x': expected N or MIN:MAX"),
        (["--nnodes", "2"], "--rdzv-endpoint None: expected HOST:PORT with --nnodes"),
        (["--rdzv-endpoint", "here"], "'here': expected HOST:PORT"),
        (["--nproc-per-node", "0"], "--nproc-per-node 0: expected at least 1"),
        (["--max-restarts", "-1"], "--max-restarts -1: expected 0 or more"),
        (["--hang-timeout", "0.5"], "--hang-timeout 0.5: expected at least 2 seconds"),
        (["--job-id", "../x"], "--job-id '../x'"),
        (["--node-rank", "1"], "--node-rank 1: expected 0 to 0"),
    ],
)
def test_wrong_usage_is_told(args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "script.py"
    script.touch()
    assert main(["launch", *args, str(script)]) == 2
    assert message in capsys.readouterr().err


def test_missing_script_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "no_such_script.py"]) == 2
    assert "no file 'no_such_script.py'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["launch"])
    assert "SCRIPT" in capsys.readouterr().err


def test_rendezvous_on_a_foreign_address_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rendezvous", "--host", "192.0.2.1", "--port", "0"]) == 2
    assert "expected an address of this machine" in capsys.readouterr().err
