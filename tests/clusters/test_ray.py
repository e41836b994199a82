"""Ray Train's TorchTrainer around a Lightning script: a node is lost with its memory, the job ends the same."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clusters import jobs
from tests.runs.drill import Zygote
from tests.runs.references import References

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).parent / "workers" / "ray_job.py"
LIMIT_SECONDS = 900

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(LIMIT_SECONDS + 300),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed: run `make test-ray`"),
]


def test_job_that_loses_a_node_ends_the_same(zygote: Zygote, tmp_path: Path, references: References) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback only
        "RAY_worker_niceness": "0",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    }
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)],
        env=environment, capture_output=True, text=True, errors="replace", timeout=LIMIT_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    places = [path.read_text() for path in sorted((tmp_path / "places").glob("1-*"))]
    assert len(places) == 2
    assert places[0] != places[1]  # on the node that has replaced the lost one
    assert set(jobs.restored(tmp_path)) & set(range(jobs.HOLD - 6, jobs.HOLD + 1))
    assert jobs.differences(tmp_path, jobs.undisturbed(zygote, references, 2), 2) == []
