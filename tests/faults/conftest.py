from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs.drill import Drill, Zygote


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    process = Zygote()
    yield process
    process.close()


@pytest.fixture(scope="module")
def _references() -> dict[str, Path]:
    return {}


@pytest.fixture
def drill(
    zygote: Zygote,
    tmp_path_factory: pytest.TempPathFactory,
    _references: dict[str, Path],
    memory_dir: Path,
    request: pytest.FixtureRequest,
) -> Drill:
    name = "".join(c if c.isalnum() else "_" for c in request.node.name)[:60]
    return Drill(zygote, tmp_path_factory.mktemp(name), memory_dir, _references)
