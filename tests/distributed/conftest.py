"""Fixtures of tests in which two ranks serve windows to each other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.replica_ranks import HOLDER, OWNER, Rank


@pytest.fixture
def base(memory_dir: Path) -> Path:
    return memory_dir / "base"


@pytest.fixture
def holder(base: Path) -> Iterator[Rank]:
    rank = Rank(base, HOLDER)
    yield rank
    rank.close()


@pytest.fixture
def owner(base: Path) -> Iterator[Rank]:
    rank = Rank(base, OWNER)
    yield rank
    rank.close()
