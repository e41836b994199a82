"""One owner writes to a place on storage: a second one is refused by name, a frozen one that comes back stops."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
import types
import uuid

import pytest

from moetion_lightning.engine.persist import Persister
from moetion_lightning.errors import JobBusyError, OwnerLostError, StoreError
from moetion_lightning.events import EventBus, Notice, WindowPersisted
from moetion_lightning.storage import owner as owner_module
from moetion_lightning.storage.disk import DirectoryTier
from moetion_lightning.storage.host_memory import HostMemoryTier
from moetion_lightning.storage.local import LocalPlace
from moetion_lightning.storage.owner import LEASE_SECONDS, Ownership
from moetion_lightning.storage.place import Place
from tests.store_windows import commit_window


@pytest.fixture
def memory(tmp_path):
    with HostMemoryTier(tmp_path / "shm", "job") as tier:
        yield tier


@pytest.fixture(params=["disk", "remote"])
def url(request, tmp_path):
    return str(tmp_path / "disk") if request.param == "disk" else f"memory://{uuid.uuid4()}"


@pytest.fixture
def process():
    """A live process that is not this one."""
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    yield child
    child.send_signal(signal.SIGCONT)
    child.kill()
    child.wait()


def record(tier: DirectoryTier) -> dict:
    return json.loads(tier.place.read("owner.json"))


def anyone() -> None:
    """May write."""


def raw(tier: DirectoryTier) -> Place:
    """The place, for whoever asks nobody."""
    return tier._place_for(anyone)


def put_record(tier: DirectoryTier, **changes) -> None:
    """Another owner's record; what is not given is as this process would write it."""
    place = raw(tier)
    place.create()
    mine = dataclasses.asdict(Ownership(tier._place_for)._mine)
    values = {**mine, "created": time.time(), "renewed": time.time(), **changes}
    place.write("owner.json", json.dumps(values).encode())


def of(pid: int) -> dict:
    return {"pid": pid, "process_started": owner_module._process(pid)[0]}


def windows_and_files(tier: DirectoryTier) -> tuple[list[int], dict[str, int]]:
    return tier.windows(), tier.place.entries("files")


def test_a_live_process_of_this_machine_is_named(url, process):
    tier = DirectoryTier(url, "job")
    put_record(tier, **of(process.pid))
    before = record(tier)
    with pytest.raises(
        JobBusyError, match=rf"process {process.pid} on {os.uname().nodename}.*another job_id= or persist"
    ):
        tier.open()
    assert record(tier) == before


def test_a_process_that_is_gone_is_replaced_at_once(url, process):
    tier = DirectoryTier(url, "job")
    put_record(tier, **of(process.pid))
    process.kill()
    process.wait()
    tier.open()
    assert record(tier)["pid"] == os.getpid()
    tier.close()
    put_record(tier, pid=os.getppid(), process_started=1)  # its number was given to another one since
    tier.open()
    tier.close()


def test_an_owner_that_let_go_is_replaced(url):
    tier = DirectoryTier(url, "job")
    tier.open()
    assert not record(tier)["released"]
    tier.close()
    assert record(tier)["released"]
    put_record(tier, host="elsewhere", released=True)
    tier.open()
    tier.close()


@pytest.mark.parametrize("lives", [True, False])
def test_an_owner_on_another_machine_lives_if_it_writes(url, lives):
    tier = DirectoryTier(url, "job")
    put_record(tier, host="elsewhere", boot_id="other", nonce="n")
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        if lives and len(waited) == 5:
            put_record(tier, host="elsewhere", boot_id="other", nonce="n")

    ownership = Ownership(tier._place_for, sleep=sleep)
    if lives:
        with pytest.raises(JobBusyError, match="on elsewhere"):
            ownership.claim()
        assert len(waited) == 5
    else:
        ownership.claim()
        assert sum(waited) == pytest.approx(LEASE_SECONDS)


def test_an_old_record_of_another_machine_needs_no_wait(url):
    tier = DirectoryTier(url, "job")
    put_record(tier, host="elsewhere", renewed=time.time() - 1000)
    Ownership(tier._place_for, sleep=pytest.fail).claim()


def test_a_frozen_process_is_replaced_when_it_has_not_written_for_a_while(url, process):
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)
    tier = DirectoryTier(url, "job")
    put_record(tier, **of(process.pid), renewed=time.time() - LEASE_SECONDS - 1)
    Ownership(tier._place_for, sleep=pytest.fail).claim()


def test_a_later_start_of_the_same_launch_takes_the_place_of_a_lost_rank_at_once(url):
    tier = DirectoryTier(url, "job", run=("launch", 3))
    put_record(tier, host="elsewhere", run="launch", attempt=2)
    tier.open()
    tier.close()


def test_a_damaged_record_is_nobodys(url):
    tier = DirectoryTier(url, "job")
    raw(tier).create()
    raw(tier).write("owner.json", b"{")
    tier.open()
    assert record(tier)["pid"] == os.getpid()
    tier.close()


def test_whoever_finds_another_owner_writes_and_removes_nothing(url, memory):
    tier = DirectoryTier(url, "job", keep=1)
    tier.persist(commit_window(memory, 1), memory)
    commit_window(memory, 2)
    put_record(tier, host="elsewhere", nonce="n")
    before = windows_and_files(tier)
    for act in (
        lambda: tier.persist(memory.read_manifest(2), memory),
        lambda: tier.drop(1),
        lambda: tier.set_aside(),
        lambda: tier.mark_completed(),
        lambda: tier.mark_trained(),
        lambda: tier.renew(),
    ):
        with pytest.raises(OwnerLostError, match="on elsewhere .* has taken this place over"):
            act()
    tier.close()
    assert windows_and_files(tier) == before
    assert record(tier)["host"] == "elsewhere"
    assert not tier.completed


def test_one_that_is_frozen_while_it_writes_does_not_commit(url, memory):
    tier = DirectoryTier(url, "job", keep=1)
    tier.persist(commit_window(memory, 1), memory)
    manifest = commit_window(memory, 2)
    real = tier.place.put

    def put(*args):
        real(*args)
        put_record(tier, host="elsewhere", nonce="n")

    tier.place.put = put
    with pytest.raises(OwnerLostError):
        tier.persist(manifest, memory)
    assert tier.windows() == [1]
    tier.verify(tier.read_manifest(1))


#: What a place is asked to do, and the question whether it may, right after which only a removal may follow.
CALLS = ("entries", "folders", "read", "verify", "may_change", "_incoming", "_remove", "_remove_empty")


class Frozen:
    """Storage of a process that is frozen before its n-th call; another one takes the place and persists windows."""

    def __init__(self, url, memory, moment, other) -> None:
        self.tier = DirectoryTier(url, "job", keep=1)
        self.windows: list[int] = []
        self.files: set[str] = set()
        self._url, self._other, self._left = url, other, moment
        for iteration in (1, 2):
            self.tier.persist(commit_window(memory, iteration, files=1), memory)

    def freeze(self) -> None:
        for place in (self.tier.place, self.tier._owner.place):
            for name in CALLS:
                setattr(place, name, self._watched(getattr(place, name)))

    def _watched(self, method):
        def call(*args, **kwargs):
            if self._left == 0 and not self.windows:
                self._take_over()
            self._left -= 1
            return method(*args, **kwargs)

        return call

    def _take_over(self) -> None:
        successor = DirectoryTier(self._url, "job", keep=3)
        put_record(successor, host="elsewhere", nonce="n")
        successor._owner = types.SimpleNamespace(claim=lambda: None, check=lambda: None, release=lambda: None)
        with HostMemoryTier(self._other, "job") as source:
            for iteration in (4, 5):
                successor.persist(commit_window(source, iteration, files=1), source)
        self.windows = successor.windows()
        self.files = set(successor.place.entries("files"))

    def check(self) -> None:
        left = DirectoryTier(self._url, "job")
        assert record(left)["nonce"] == "n"
        assert {4, 5} <= set(left.windows())
        assert set(left.place.entries("files")) <= self.files
        assert not left.is_trained()
        assert not left.completed
        for iteration in (4, 5):
            left.verify(left.read_manifest(iteration))


CHANGES = (
    "persist", "drop", "set_aside", "take_back", "forget_aside", "mark_trained", "mark_completed", "renew", "close",
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_one_that_is_frozen_at_any_moment_neither_removes_nor_adds_anything(url, memory, tmp_path, change):
    for moment in range(100):
        frozen = Frozen(f"{url}/{moment}", memory, moment, tmp_path / f"other{moment}")
        course = frozen.tier.set_aside() if change in ("take_back", "forget_aside") else ""
        manifest = commit_window(memory, 3)
        arguments = {"persist": (manifest, memory), "drop": (2,), "take_back": (course,)}.get(change, ())
        frozen.freeze()
        with contextlib.suppress(OwnerLostError, StoreError):  # or its files are gone: they were nobody's any more
            getattr(frozen.tier, change)(*arguments)
        if not frozen.windows:  # it makes fewer calls
            assert moment > 0
            return
        frozen.check()
        frozen.tier.close()
        frozen.check()
    pytest.fail("more calls than expected")


def test_an_upload_of_many_parts_appears_after_the_owner_was_asked_or_never(memory, monkeypatch):
    monkeypatch.setattr("moetion_lightning.storage.remote._CHUNK_BYTES", 10)
    tier = DirectoryTier(f"memory://{uuid.uuid4()}", "job").open()
    record = commit_window(memory, 1).files[0]
    seen, ask = [], tier.place.may_change

    def may_change():
        seen.append(tier.place.entries("files"))
        ask()

    tier.place.may_change = may_change
    tier.place.put(record, memory.local_path(record))
    assert seen == [{}]
    tier.place.verify(record)
    tier.place.remove(f"files/{record.name}")
    put_record(tier, host="elsewhere", nonce="n")
    with pytest.raises(OwnerLostError):
        tier.place.put(record, memory.local_path(record))
    assert tier.place.entries("files") == {}


def test_an_owner_that_has_ended_meanwhile_is_not_followed(url):
    tier = DirectoryTier(url, "job").open()
    put_record(tier, host="elsewhere", nonce="n", released=True)
    with pytest.raises(OwnerLostError, match="took this place over and has ended"):
        tier.mark_completed()


def test_the_persister_says_once_that_its_place_was_taken_and_ends(url, memory):
    events = []
    tier = DirectoryTier(url, "job").open()
    persister = Persister(memory, tier, EventBus([events.append]), 1)
    persister.offer(commit_window(memory, 1))
    assert persister.wait(60)
    put_record(tier, host="elsewhere", nonce="n")
    for iteration in (2, 3, 4):
        persister.offer(commit_window(memory, iteration))
        assert persister.wait(60)
    assert persister.is_lost
    persister.persist_all()
    persister.close()
    assert [type(event) for event in events] == [WindowPersisted, Notice]
    assert "elsewhere" in events[1].message
    assert "in host memory only" in events[1].message
    assert tier.windows() == [1]


def test_a_living_owner_renews_its_record_until_its_place_is_taken(url, memory, monkeypatch):
    monkeypatch.setattr("moetion_lightning.engine.persist.RENEW_SECONDS", 0.001)
    tier = DirectoryTier(url, "job").open()
    first = record(tier)["renewed"]
    real, calls = tier.renew, []

    def renew():
        calls.append(real)
        if len(calls) == 2:
            raise StoreError("for a moment, storage does not answer")
        if len(calls) == 4:
            assert record(tier)["renewed"] > first
            put_record(tier, host="elsewhere", nonce="n")
        real()

    monkeypatch.setattr(tier, "renew", renew)
    persister = Persister(memory, tier, EventBus(), 1)
    persister._renewal.join(60)
    assert len(calls) == 4
    assert persister.is_lost
    persister.close()
    assert record(tier)["host"] == "elsewhere"


def test_everything_committed_is_persisted_at_once_when_the_process_is_being_ended(url, memory):
    tier = DirectoryTier(url, "job", keep=5).open()
    persister = Persister(memory, tier, EventBus(), every_n_windows=100)
    persister.offer(commit_window(memory, 1))
    assert persister.wait(60)
    for iteration in (2, 3):
        persister.offer(commit_window(memory, iteration))
    assert tier.windows() == [1]
    real = memory.read_manifest

    def read(iteration):
        if iteration == 2:  # the capture thread commits and drops while it is looked
            commit_window(memory, 4)
            memory.drop(2)
        return real(iteration)

    memory.read_manifest = read
    persister.persist_all()
    assert persister.wait(60)
    assert tier.windows() == [4, 3, 1]
    persister.persist_all()
    persister.close()


def test_a_finite_window_that_waits_is_not_given_up_for_one_that_is_not(url, memory):
    tier = DirectoryTier(url, "job", keep=1).open()
    persister = Persister(memory, tier, EventBus(), 1)
    real, busy, go = tier.persist, threading.Event(), threading.Event()

    def persist(*args):
        busy.set()
        assert go.wait(60)
        real(*args)

    tier.persist = persist
    persister.offer(commit_window(memory, 1))
    assert busy.wait(60)
    persister.offer(commit_window(memory, 2))
    persister.offer(commit_window(memory, 3))
    persister.offer(commit_window(memory, 4, extra={"finite": False}))
    go.set()
    persister.close()
    assert tier.windows() == [4, 3]


# --- who may write there ---------------------------------------------------------------------------------------------


def test_a_base_that_everybody_may_write_to_is_refused_and_a_groups_is_not(tmp_path):
    base = tmp_path / "disk"
    base.mkdir()
    base.chmod(0o777)
    with pytest.raises(StoreError, match="all users may write there.*chmod o-w"):
        DirectoryTier(base, "job").open()
    base.chmod(0o775)
    tier = DirectoryTier(base, "job").open()
    tier.close()
    tier.place.path.chmod(0o770)
    with pytest.raises(StoreError, match="other users may write there.*chmod 700"):
        tier.open()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory away")
def test_a_jobs_directory_of_another_user_is_refused(tmp_path):
    tier = DirectoryTier(tmp_path / "disk", "job").open()
    tier.close()
    os.chown(tmp_path / "disk" / "job", 12345, 12345)
    with pytest.raises(StoreError, match="belongs to user 12345"):
        DirectoryTier(tmp_path / "disk", "job").open()


def test_new_directories_are_made_durable_in_their_parents(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("moetion_lightning.storage.posix.sync_dir", synced.append)
    LocalPlace(tmp_path / "a" / "b", anyone).create()
    assert {tmp_path, tmp_path / "a", tmp_path / "a" / "b"} <= set(synced)
