"""Jobs whose ranks are threads of this process, on nodes that are directories: what they find when they come back."""

from __future__ import annotations

import itertools
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moetion_lightning.config import EngineConfig
from moetion_lightning.distributed.control import StoreControl
from moetion_lightning.distributed.stable_store import connect_store, host_store
from moetion_lightning.engine.group_restore import LiveReport
from moetion_lightning.engine.ranks import Ranks
from moetion_lightning.engine.restore import RestorePoint
from moetion_lightning.engine.tiers import Tiers
from moetion_lightning.events import EventBus
from moetion_lightning.storage.manifest import Manifest
from tests.command import until
from tests.store_windows import commit_window

SECONDS = 60.0


class Rank:
    """One rank of a run.

    Args:
        job: What it belongs to.
        control: Reaches the others.
        node: Name of its node.
        settings: Of the engine.
    """

    def __init__(self, job: Job, control: StoreControl, node: str, **settings: Any) -> None:
        self.rank, self.node = control.rank, node
        self.events: list[Any] = []
        self.control = control
        self._is_fresh = True
        self.ranks = Ranks(control, domain=settings.pop("domain", node))
        for name, value in settings.items():
            if isinstance(value, dict):
                settings[name] = value[node]
            elif isinstance(value, str):
                settings[name] = value.format(rank=control.rank)
        config = EngineConfig(memory_dir=str(job.memory(node)), job_id="job", **settings)
        self.tiers = Tiers(config, "job", EventBus((self.events.append,)), self.ranks)

    def open(self, **settings: Any) -> RestorePoint | None:
        """Find what there is."""
        point = self.tiers.open(LiveReport, replay_stages=False, **settings)
        assert point is None or isinstance(point, RestorePoint)
        self._is_fresh = point is None
        return point

    def train(self, *iterations: int, shares: list[int] | None = None) -> None:
        """Commit windows, each when all have the one before and its copies."""
        if self._is_fresh:
            self.tiers.set_aside()
        self._is_fresh = False
        self.tiers.training_begins()
        for last in iterations:
            newest = commit_window(
                self.tiers.host,
                last,
                world_size=self.control.world_size,
                operators=[],
                extra={"shares": shares or [self.rank]},
            )
            self.tiers.on_commit(newest)
            self.wait_copied(newest)
            for older in self.tiers.host.windows()[1:]:
                self.tiers.host.drop(older)
            self.tiers.agreed(last, persist=False)

    def wait_copied(self, newest: Manifest) -> None:
        """Until all ranks have this window, and its copies."""
        last = newest.last_iteration
        until(lambda: self.agree(newest).newest == last, f"copies of window {last}")

    def agree(self, newest: Manifest) -> Any:
        """What all know at the boundary of a window."""
        facts = {
            "iteration": 0, "iteration_seconds": 1.0, "bytes_per_second": 1.0, "capacity_bytes": 1, "behind": False,
            "persist": None, "dense": "", "digest": "", "committed": self.tiers.committed(newest),
            "held": self.tiers.held(newest), "uncopied": self.tiers.uncopied(),
        }  # fmt: skip
        return self.ranks.agree_on_window(facts)


class Job:
    """Runs one after the other.

    Args:
        base: Folder; each node's memory is a folder in it.
    """

    def __init__(self, base: Path) -> None:
        base.mkdir(mode=0o700, exist_ok=True)
        self._base = base
        self._server = host_store("127.0.0.1")
        self._runs = itertools.count()

    def memory(self, node: str) -> Path:
        """Of a node."""
        path = self._base / node
        path.mkdir(mode=0o700, exist_ok=True)
        return path

    def lose(self, node: str) -> None:
        """A node's memory is gone."""
        shutil.rmtree(self._base / node)

    def directories(self, node: str) -> list[str]:
        """What is in a node's memory."""
        return sorted(path.name for path in (self._base / node / "job").glob("*"))

    def run(self, nodes: str, work: Callable[[Rank], Any], **settings: Any) -> list[Any]:
        """One run. Returns what ``work`` gave on each rank, or its error.

        Args:
            nodes: The node of each rank, a letter each.
            work: What a rank does.
            **settings: Of the engine.
        """
        scope, results = f"run{next(self._runs)}", [None] * len(nodes)

        def main(rank: int) -> None:
            store = connect_store("127.0.0.1", self._server.port, SECONDS)
            control = StoreControl(store, rank, len(nodes), scope=scope, timeout_seconds=SECONDS)
            mine = Rank(self, control, nodes[rank], **settings)
            try:
                results[rank] = work(mine)
                control.all_gather("done", None)
            except BaseException as error:
                results[rank] = error
            finally:
                mine.tiers.close(trained=False)

        threads = [threading.Thread(target=main, args=(rank,)) for rank in range(len(nodes))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results
