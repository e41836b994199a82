"""Storage has one owner and the last committed window; a poisoned window is not preferred; memory is given back."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from typing import Any

import pytest

from moetion_lightning.storage.disk import DirectoryTier
from moetion_lightning.storage.host_memory import HostMemoryTier
from tests.faults.test_identity import Story
from tests.runs.drill import Drill
from tests.runs.ranks import environments
from tests.runs.storage_stories import JOB, listing

RUNNER = "tests.runs.storage_stories"


def events(story: Story, kind: str) -> list[dict[str, Any]]:
    lines = (story.out / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def tier(story: Story, rank: int = 0, world_size: int = 1) -> DirectoryTier:
    return DirectoryTier(str(story.out / "persist"), JOB, rank, world_size)


@pytest.mark.parametrize("window", [1, 4])
def test_sigterm_inside_a_step_persists_the_newest_window(drill: Drill, window: int) -> None:
    settings = {"persist_every_n_windows": 100}
    story = Story(drill, "terminated", runner=RUNNER, window=window, persist=True, settings=settings)
    log = story.start(code=128 + signal.SIGTERM)  # Lightning alone would end it with 0, as if it were done
    assert "Received SIGTERM" in log  # Lightning's own handler was called, too
    assert "SIGTERM: what is committed was persisted" in log
    assert tier(story).windows()[0] >= 12
    shutil.rmtree(story.memory / JOB)
    story.start()
    (restored,) = events(story, "RestoreStarted")
    assert restored["tier"] == "disk"
    assert restored["last_iteration"] >= 12
    assert story.differences(story.twin()) == []


def test_sigterm_where_nobody_handles_it_ends_the_process_after_persisting(drill: Drill) -> None:
    story = Story(drill, "terminated_loop", runner=RUNNER)
    story.start(code=-signal.SIGTERM)
    assert tier(story).windows()[0] >= 12
    shutil.rmtree(story.memory / JOB)
    story.start()
    assert min(map(int, story.steps(1))) >= 11


def test_sigterm_persists_a_window_that_all_ranks_have(drill: Drill) -> None:
    story = Story(
        drill, "terminated", runner=RUNNER, window=2, persist=True, settings={"persist_every_n_windows": 100}
    )  # fmt: skip
    common = {**story.spec, "out": str(story.out), "memory_dir": str(story.memory)}
    for start in range(2):
        logs = [story.out / f"log{start}-{rank}" for rank in range(2)]
        ended = drill.zygote.run_group([{**common, "start": start}] * 2, logs, environments(2, JOB))
        text = "\n".join(log.read_text() for log in logs)
        assert ended.codes == [0 if start else 128 + signal.SIGTERM] * 2, text
        if not start:
            common_windows = set(tier(story, 0, 2).windows()) & set(tier(story, 1, 2).windows())
            assert max(common_windows) >= 10, text
            shutil.rmtree(story.memory / JOB)
        else:
            assert "restoring iteration" in text


def _pair(drill: Drill, name: str, **spec: Any) -> tuple[Story, list[str], list[int]]:
    """Two processes of one job with memories of their own ("nodes") and one place on storage."""
    story = Story(drill, name, runner=RUNNER, persist=True, **spec)
    for fifo in ("runs", "refused", "freezes"):
        os.mkfifo(story.out / fifo)
    memories = [story.memory / role for role in ("first", "second")]
    for memory in memories:
        memory.mkdir(mode=0o700)
    logs = [story.out / f"log-{role}" for role in ("first", "second")]
    specs = [
        {**story.spec, "role": role, "out": str(story.out), "memory_dir": str(memory)}
        for role, memory in zip(("first", "second"), memories, strict=True)
    ]
    ended = drill.zygote.run_group(specs, logs, [{}, {}])
    return story, [log.read_text() for log in logs], ended.codes


def test_a_second_writer_is_refused_by_name_before_its_first_step(drill: Drill) -> None:
    story, (first, second), codes = _pair(drill, "second_writer")
    assert codes == [0, 0], first + second
    pid = (story.out / "pid").read_text()
    assert re.search(rf"REFUSED .*process {pid} on .*job_id= or persist_dir=", second)
    lines = (story.out / "steps.jsonl").read_text().splitlines()
    assert len(lines) == 21  # all of the first one
    assert story.differences(story.twin(role="first", capture=False, story="poisoned", mended=True)) == []


def test_a_frozen_process_that_comes_back_writes_nothing_and_ends_nothing(drill: Drill) -> None:
    story, (first, second), codes = _pair(drill, "frozen", settings={"keep_persisted": 2})
    assert codes == [0, 0], first + second
    assert "found the window of iterations" in second
    assert first.count("persisting has ended") == 1
    assert "has taken this place over" in first or "took this place over" in first
    assert (story.out / "listing").read_text().splitlines() == listing(story.out / "persist")
    record = json.loads((story.out / "persist" / JOB / "rank-00000" / "owner.json").read_text())
    assert record["pid"] != int((story.out / "pid").read_text())


def test_a_poisoned_window_is_not_preferred_and_an_older_one_can_be_asked_for(drill: Drill) -> None:
    settings = {"keep_persisted": 1}
    story = Story(drill, "poisoned", runner=RUNNER, persist=True, settings=settings)
    log = story.start(code=1)
    assert "a loss, a gradient norm or a weight that is not finite" in log
    assert tier(story).windows() == [12, 8]  # one more than asked for: the last one that is finite
    assert [tier(story).read_manifest(i).finite for i in (12, 8)] == [False, True]
    for poisoned, is_second in (("9..12", False), ("8..11", True)):
        log = story.start(code=1)
        assert "found the window of iterations 5..8" in log
        assert f"not restored: window {poisoned} in disk: it holds a loss" in log
        said = re.search(r"the run ended (about \d steps|soon) after this window \(5\.\.8\) 2 times", log)
        assert (said is not None) is is_second
    shutil.rmtree(story.memory / JOB)
    log = story.start(mended=True, settings={**settings, "resume": 8})
    assert "found the window of iterations 5..8" in log
    assert story.differences(story.twin(mended=True)) == []


def test_an_older_window_is_taken_when_asked_for_once_and_later_ones_lie_aside(drill: Drill) -> None:
    settings = {"keep_persisted": 4}
    story = Story(drill, "poisoned", runner=RUNNER, persist=True, mended=True, settings=settings)
    story.start(kill="18")
    assert tier(story).windows()[-1] == 4
    log = story.start(code=1, settings={**settings, "resume": 999})
    assert re.search(r"resume=999: no window .*Windows of this job: .*1\.\.4 in disk", log)
    log = story.start(kill="6", settings={**settings, "resume": 4})
    assert "found the window of iterations 1..4" in log
    assert tier(story).windows() == [4]
    memory = HostMemoryTier(story.memory, JOB)
    assert [i for t in (tier(story), memory) for c in t.courses_aside() for i in t.windows(c) if i >= 16] != []
    log = story.start(kill="14", settings={**settings, "resume": 4})
    assert "resume=4 has been done" in log
    assert " times" not in log  # before that, later windows were there
    log = story.start(settings={**settings, "resume": 4})
    assert "found the window of iterations 8..11" in log or "found the window of iterations 4..7" in log
    assert story.differences(story.twin()) == []


def test_a_job_whose_two_windows_just_fit_stays_protected_over_restarts(drill: Drill) -> None:
    measure = Story(drill, "just_fits", runner=RUNNER, capacity=1 << 40)
    sizes = re.findall(r"COMMITTED in start 0: (\d+) bytes", measure.start(kill="9"))
    story = Story(drill, "just_fits", runner=RUNNER, capacity=int(1.05 * max(map(int, sizes))))
    story.start(code=-signal.SIGKILL, torn=True)
    assert len(story.windows()) == 2
    for start, kill in enumerate(("18", "28", "37", None), 1):
        log = story.start(kill=kill)
        assert "no window begins" not in log
        assert "was given up" not in log
        committed = re.findall(rf"COMMITTED in start {start}: \d+ bytes, (\d+) removed", log)
        assert len(committed) >= (2 if kill else 1)
        assert set(committed) == {"0"}
    assert story.differences(story.twin()) == []
