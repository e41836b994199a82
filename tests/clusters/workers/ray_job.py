"""Ray Train's TorchTrainer around an ordinary Lightning script, on a local Ray cluster whose node of rank 1 is killed.

usage: ray_job.py FOLDER

FOLDER/places gets a file for each process: its rank, and the node that it is on. Storage is shared; each node has host
memory of its own, and what is in it dies with the node. RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 has Ray use loopback only.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.train import FailureConfig, RunConfig, ScalingConfig, get_context
from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment, prepare_trainer
from ray.train.torch import TorchTrainer

from tests.clusters import jobs
from tests.clusters.workers import lightning_job

NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "node_ip_address": "127.0.0.1"}


def train(config: dict[str, Any]) -> None:
    """What a rank does: the Lightning script, with Ray's strategy and environment."""
    folder = Path(config["folder"])
    node = ray.get_runtime_context().get_node_id()
    (folder / "places").mkdir(exist_ok=True)
    (folder / "places" / f"{get_context().get_world_rank()}-{time.time_ns()}").write_text(node)
    lightning_job.pl.seed_everything(7)
    trainer = lightning_job.trainer(
        folder,
        jobs.STEPS,
        root=folder,
        memory_dir=folder / f"memory-{node}",
        persist_dir=folder / "storage",
        persist_every=1,
        devices="auto",
        strategy=RayDDPStrategy(),
        plugins=[RayLightningEnvironment()],
    )
    trainer = prepare_trainer(trainer)
    trainer.fit(lightning_job.Module(jobs.HOLD, folder / "go"), lightning_job.loader())


def lose_rank_1(folder: Path, cluster: Cluster, nodes: list[Any]) -> None:
    """When all ranks are inside of a step, the node of rank 1 goes with its memory; the spare one takes its place."""
    while not jobs.holds(folder, 2):
        time.sleep(0.05)
    place = next((folder / "places").glob("1-*")).read_text()
    cluster.remove_node(next(node for node in nodes if node.node_id == place), allow_graceful=False)
    shutil.rmtree(folder / f"memory-{place}")
    (folder / "go").touch()


def main(folder: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(**NODE) for _ in range(3)]
        ray.init(address=cluster.address)
        threading.Thread(target=lose_rank_1, args=(folder, cluster, nodes), daemon=True).start()
        trainer = TorchTrainer(
            train,
            train_loop_config={"folder": str(folder)},
            scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(
                name="tiny-moe", storage_path=str(folder / "ray"), failure_config=FailureConfig(max_failures=3)
            ),
        )
        trainer.fit()
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
