"""What a process says of itself when it starts."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from moetion_lightning.session.process_start import _created, commit_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("how", ["branch", "packed", "detached", "worktree"])
def test_the_commit_is_found_without_running_git(tmp_path: Path, how: str) -> None:
    git, folder = tmp_path / ".git", tmp_path / "src" / "deep"
    (git / "refs" / "heads").mkdir(parents=True)
    folder.mkdir(parents=True)
    (git / "HEAD").write_text(COMMIT if how == "detached" else "ref: refs/heads/main\n")
    if how == "packed":
        (git / "packed-refs").write_text(f"# pack-refs\n{COMMIT} refs/heads/main\n")
    elif how != "detached":
        (git / "refs" / "heads" / "main").write_text(f"{COMMIT}\n")
    if how == "worktree":
        own = git / "worktrees" / "src"
        own.mkdir(parents=True)
        (own / "HEAD").write_text("ref: refs/heads/main\n")
        (own / "commondir").write_text("../..\n")
        (tmp_path / "src" / ".git").write_text(f"gitdir: {own}\n")
    assert commit_of(folder) == COMMIT


def test_no_commit_is_no_error(tmp_path: Path) -> None:
    assert commit_of(tmp_path) == ""
    (tmp_path / ".git").mkdir()
    assert commit_of(tmp_path) == ""


def test_a_process_knows_when_it_was_made() -> None:
    reading, writing = os.pipe()
    before = time.time()
    pid = os.fork()
    if pid == 0:
        os.write(writing, str(_created()).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    assert before - 0.05 <= float(os.read(reading, 100)) <= time.time() + 0.05
    os.close(reading)
    os.close(writing)
