"""Which state a restart finds: storage when the memory is gone, nothing when told so, never that of another job."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

from tests.runs.drill import Drill, differences, read_events

SPEC: dict[str, Any] = {"block": "fused", "samples": 40}
KILL = {"hook": "backward", "step": 15}


def _kill_once(drill: Drill, spec: dict[str, Any], name: str, kill: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    out = drill.base / name
    out.mkdir(parents=True)
    memory = drill.memory_dir / name
    memory.mkdir(mode=0o700)
    common = {**spec, "out": str(out), "memory_dir": str(memory)}
    code = drill.zygote.run({**common, "kill": kill}, out / "log")
    assert code == -signal.SIGKILL, (out / "log").read_text()
    return out, common


def test_storage_serves_when_the_memory_is_lost(drill: Drill) -> None:
    spec = {**SPEC, "persist": True}
    # Killed by the second persisted window's own event, so that at least two are whole on storage.
    out, common = _kill_once(drill, spec, "lost", {"event": "WindowPersisted", "count": 2})
    shutil.rmtree(Path(common["memory_dir"]) / "job")
    code = drill.zygote.run(common, out / "log")
    assert code == 0, (out / "log").read_text()
    assert differences(drill.reference(spec), out) == []
    assert read_events(out, "RestoreStarted")[0]["tier"] == "disk"


def test_killed_while_persisting_leaves_an_older_window_on_storage(drill: Drill) -> None:
    spec = {**SPEC, "persist": True, "policy_args": {"window": 2}}
    out, common = _kill_once(drill, spec, "torn", {"event": "WindowPersisted", "count": 3})
    persist = out / "persist" / "job" / "rank-00000"
    newest = sorted((persist / "windows").glob("*.json"))[-1]
    records = json.loads(newest.read_bytes())["files"]
    file = persist / "files" / records[0][0]
    file.write_bytes(file.read_bytes()[:-7])  # cut short
    code = drill.zygote.run(common, out / "log")
    assert code == 0, (out / "log").read_text()
    assert differences(drill.reference(spec), out) == []
    assert read_events(out, "RestoreStarted")[0]["tier"] == "host memory"


def test_corrupt_newest_window_everywhere_is_an_error_that_names_file_and_remedy(drill: Drill) -> None:
    out, common = _kill_once(drill, SPEC, "corrupt", KILL)
    for file in (Path(common["memory_dir"]) / "job" / "rank-00000" / "files").glob("*slot*"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    code = drill.zygote.run(common, out / "log")
    assert code == 1
    log = (out / "log").read_text()
    assert "CorruptSnapshotError" in log
    assert ".safetensors" in log
    assert "final.safetensors" not in [p.name for p in out.iterdir()]


def test_resume_never_starts_afresh_and_is_exact(drill: Drill) -> None:
    spec = {**SPEC, "policy_args": {"window": 4, "resume": "never"}}
    killed = drill.killed(spec, [KILL, {"hook": "backward", "step": 6}])
    assert differences(drill.reference(spec), killed) == []
    assert read_events(killed, "RestoreStarted") == []


def test_completed_run_leaves_nothing_in_memory(drill: Drill) -> None:
    killed = drill.killed(SPEC, [KILL])
    memory = drill.memory_dir / killed.name
    assert [path for path in memory.rglob("*") if path.is_file()] == []


def test_window_of_another_model_is_refused(drill: Drill) -> None:
    out, common = _kill_once(drill, SPEC, "foreign", KILL)
    code = drill.zygote.run({**common, "block": "list"}, out / "log")
    assert code == 1
    log = (out / "log").read_text()
    assert "ForeignWindowError" in log
    assert "belongs to another model: parameter 'body.blocks.0" in log
    assert "resume='never'" in log


def test_two_jobs_in_one_directory_do_not_see_each_other(drill: Drill) -> None:
    spec = {**SPEC, "policy_args": {"window": 4}}
    out, common = _kill_once(drill, spec, "first", KILL)
    other = drill.base / "other"
    other.mkdir()
    # The same command for another job: nothing is found, and the first job's windows are left alone.
    code = drill.zygote.run({**common, "out": str(other), "job_id": "another"}, other / "log")
    assert code == 0, (other / "log").read_text()
    assert read_events(other, "RestoreStarted") == []
    code = drill.zygote.run(common, out / "log")
    assert code == 0
    assert len(read_events(out, "RestoreStarted")) == 1
    assert differences(drill.reference(spec), out) == []


def test_files_are_private(drill: Drill) -> None:
    _, common = _kill_once(drill, {**SPEC, "persist": True}, "private", KILL)
    out = Path(common["out"])
    files = [p for root in (Path(common["memory_dir"]), out / "persist") for p in root.rglob("*") if p.is_file()]
    assert files
    assert {p.stat().st_mode & 0o777 for p in [*files, out / "events.jsonl"]} == {0o600}
