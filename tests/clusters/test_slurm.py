"""Jobs on a SLURM cluster of this machine: a lost node, a requeue signal, an array. `make test-slurm`."""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clusters import jobs, slurm
from tests.runs.drill import Zygote
from tests.runs.references import References

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing()),
]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Cluster]:
    with slurm.Cluster(tmp_path_factory.mktemp("slurm"), num_nodes=3) as made:
        yield made


def script(name: str, folder: Path, *options: object) -> str:
    """A batch script of examples/slurm with our training. The nodes of this cluster have no names in a name service."""
    words = " ".join(map(str, [jobs.SCRIPT, folder, jobs.STEPS, "--persist", folder / "storage", *options]))
    text = (ROOT / "examples" / "slurm" / name).read_text()
    settings = f"export PYTHONPATH={ROOT} OMP_NUM_THREADS=1 MASTER_ADDR=127.0.0.1 GLOO_SOCKET_IFNAME=lo\n"
    changed = text.replace("srun python train.py", f"{settings}srun {sys.executable} {words}")
    assert changed != text
    return changed


def output(folder: Path) -> str:
    log = folder / "log"
    return log.read_text() if log.exists() else "no output\n"


def submit(cluster: slurm.Cluster, folder: Path, text: str) -> str:
    return cluster.submit(text, f"--output={folder}/log", f"--chdir={folder}")


def test_job_that_loses_a_node_is_requeued_and_ends_the_same(
    cluster: slurm.Cluster, zygote: Zygote, tmp_path: Path, references: References
) -> None:
    text = script("train.sbatch", tmp_path, "--every", 1, "--hold", jobs.HOLD, "--nodes", 2)
    job = submit(cluster, tmp_path, text)

    def said() -> str:
        return output(tmp_path) + cluster.logs()

    slurm.until(lambda: jobs.holds(tmp_path, 2), said)
    lost = next(name for name, state in cluster.states().items() if state.startswith("alloc") and name != "n0")
    cluster.lose(lost)
    shutil.rmtree(tmp_path / f"memory-{lost}")
    (tmp_path / "go").touch()
    slurm.until(lambda: cluster.ended(job), said)
    assert "Restarts=1" in cluster.scontrol("show", "job", job)
    assert {last for last in jobs.restored(tmp_path)} & set(range(jobs.HOLD - 6, jobs.HOLD + 1)), said()
    assert jobs.differences(tmp_path, jobs.undisturbed(zygote, references, 2), 2) == []


def test_requeue_signal_to_all_ranks_requeues_the_job(
    cluster: slurm.Cluster, zygote: Zygote, tmp_path: Path, references: References
) -> None:
    text = script("train.sbatch", tmp_path, "--hold", jobs.HOLD, "--nodes", 2)
    job = submit(cluster, tmp_path, text)

    def said() -> str:
        return output(tmp_path) + cluster.logs()

    slurm.until(lambda: jobs.holds(tmp_path, 2), said)
    cluster.send(job, signal.SIGUSR1)
    (tmp_path / "go").touch()
    slurm.until(lambda: cluster.ended(job), said)
    assert "Restarts=1" in cluster.scontrol("show", "job", job), said()
    assert jobs.restored(tmp_path), said()
    assert jobs.differences(tmp_path, jobs.undisturbed(zygote, references, 2), 2) == []


def test_tasks_of_an_array_share_storage_and_keep_apart(cluster: slurm.Cluster, tmp_path: Path) -> None:
    text = script("array.sbatch", tmp_path, "--every", 1, "--hold", jobs.HOLD)
    job = submit(cluster, tmp_path, text)
    tasks = [tmp_path / f"task-{number}" for number in (0, 1)]

    def said() -> str:
        return output(tmp_path) + cluster.logs()

    slurm.until(lambda: all(jobs.holds(task, 1) for task in tasks), said)
    cluster.scontrol("requeue", f"{job}_1")
    (tasks[1] / "go").touch()
    (tasks[0] / "go").touch()
    slurm.until(lambda: cluster.ended(job), said)
    assert jobs.restored(tasks[0]) == []
    assert len(jobs.restored(tasks[1])) == 1, said()
    assert len(list((tmp_path / "storage").iterdir())) == 2  # a job for each task

    again = tmp_path / "again"
    again.mkdir()
    other = submit(cluster, again, script("array.sbatch", again))
    slurm.until(lambda: cluster.ended(other), said)
    for task in (0, 1):
        assert jobs.differences(tmp_path / f"task-{task}", again / f"task-{task}", 1) == []
    assert jobs.differences(tasks[0], tasks[1], 1) != []
