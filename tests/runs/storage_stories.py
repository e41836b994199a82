"""What happens to jobs on a cluster: two at one place on storage, frozen, told to end, poisoned, short of memory."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from moetion_lightning.errors import JobBusyError
from moetion_lightning.events import Event
from tests.runs.stories import Net, Script, loader

JOB = "shared"


class Hooked(Net):
    """Calls a function at the beginning of the step with that number."""

    def __init__(self, script: Script, hooks: dict[int, Callable[[], None]], **options: Any) -> None:
        super().__init__(script, **options)
        self.hooks = hooks

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        hook = self.hooks.get(self.trainer.global_step)
        if hook is not None:
            hook()
        return super().training_step(batch, index)


def fit(script: Script, module: Net, *sinks: Callable[[Event], None], **options: Any) -> None:
    settings = {"job_id": JOB, "events_path": str(script.out / f"events{os.environ.get('RANK', '')}.jsonl")}
    if "persist" in script.spec:
        settings["persist_dir"] = str(script.out / "persist")
    if sinks:
        settings["sinks"] = list(sinks)
    trainer = script.trainer(settings=settings, **options)
    trainer.fit(module, loader())
    if trainer.global_rank == 0:
        script.finish(module, trainer)


class LongStep:
    """A step that lasts until something was persisted. The signal does not interrupt it, as it interrupts no kernel."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        self._is_armed = False

    def __call__(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        self._is_armed = True
        os.kill(os.getpid(), signal.SIGTERM)
        os.read(self._read, 1)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])

    def sink(self, event: Event) -> None:
        if self._is_armed and event.kind == "WindowPersisted":
            os.write(self._write, b"x")


def terminated(script: Script) -> None:
    """SIGTERM in the middle of a step, from the scheduler to every rank."""
    pl.seed_everything(1, verbose=False)
    options: dict[str, Any] = {}
    if "RANK" in os.environ:
        strategy = DDPStrategy(find_unused_parameters=True, process_group_backend="gloo")
        options = {"devices": int(os.environ["WORLD_SIZE"]), "strategy": strategy, "use_distributed_sampler": False}
    step = LongStep()
    module = Hooked(script, {} if script.start or not script.spec.get("capture", True) else {14: step})
    fit(script, module, step.sink, **options)


def terminated_loop(script: Script) -> None:
    """The same in a plain loop, where nobody handles the signal."""
    from moetion_lightning.integrations import SparseCheckpointing

    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    places = {"memory_dir": script.spec["memory_dir"], "persist_dir": str(script.out / "persist")}
    given = {"window": 2, "job_id": JOB, "persist_every_n_windows": 100}
    with SparseCheckpointing(model, optimizer, **places, **given) as run:
        for step, batch in run.steps(loader(), epochs=3):
            if step == 14 and not script.start:
                os.kill(os.getpid(), signal.SIGTERM)
                signal.pause()  # a step that never ends
            loss = (model(batch["x"]) - batch["x"].flip(-1)).pow(2).mean()
            run.record_loss(loss)
            script.note(str(step), loss, batch["id"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def _meet(script: Script, name: str) -> None:
    """Both processes come here before either goes on."""
    path = script.out / name
    if script.spec["role"] == "first":
        path.open("w").close()
    else:
        path.open().close()


def second_writer(script: Script) -> None:
    """While one process persists, another one is started for the same job and place, with a memory of its own."""
    pl.seed_everything(1, verbose=False)
    if script.spec["role"] == "second":
        _meet(script, "runs")
        try:
            fit(script, Hooked(script, {}))
        except JobBusyError as error:
            print("REFUSED", error)
        _meet(script, "refused")
        return
    (script.out / "pid").write_text(str(os.getpid()))
    fit(script, Hooked(script, {9: lambda: _meet(script, "runs"), 12: lambda: _meet(script, "refused")}))


def frozen(script: Script) -> None:
    """A process is frozen, another one takes its place and ends; then the first one comes back."""
    from moetion_lightning.engine import persist
    from moetion_lightning.storage import owner

    persist.RENEW_SECONDS, owner.LEASE_SECONDS = 0.05, 0.5  # type: ignore[misc]
    pl.seed_everything(1, verbose=False)
    if script.spec["role"] == "first":

        def freeze() -> None:
            (script.out / "pid").write_text(str(os.getpid()))
            while not any((script.out / "persist").glob("*/rank-00000/windows/[0-9]*")):  # another thread persists
                time.sleep(0.01)
            _meet(script, "freezes")
            os.kill(os.getpid(), signal.SIGSTOP)

        fit(script, Hooked(script, {9: freeze}))
        return
    _meet(script, "freezes")
    pid = int((script.out / "pid").read_text())
    while owner._process(pid)[1] != "T":
        os.sched_yield()
    module = Hooked(script, {})
    fit(script, module)
    (script.out / "listing").write_text("\n".join(listing(script.out / "persist")))
    os.kill(pid, signal.SIGCONT)


def listing(persist: Path) -> list[str]:
    """Windows and files on storage."""
    return sorted(
        f"{path.relative_to(persist)} {path.stat().st_size}"
        for kind in ("windows/[0-9]*", "files/*")
        for path in persist.glob(f"*/rank-00000/{kind}")
    )


class Poisoned(Net):
    """From step 8 on the loss is not a number, which the script notices at step 14; until the script is mended."""

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss = super().training_step(batch, index)
        if self.script.spec.get("mended"):
            return loss
        if self.trainer.global_step >= 14 and not torch.isfinite(loss):
            raise RuntimeError(f"loss is not finite at step {self.trainer.global_step}")
        return loss * float("nan") if self.trainer.global_step == 8 else loss


def poisoned(script: Script) -> None:
    pl.seed_everything(1, verbose=False)
    fit(script, Poisoned(script))


def held_memory(directory: str) -> int:
    """Bytes of files below a directory, and of removed ones that this process still maps."""
    total = sum(path.stat().st_size for path in Path(directory).rglob("files/*"))
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith("(deleted)") and directory in line:
            first, last = line.split()[0].split("-")
            total += int(last, 16) - int(first, 16)
    return total


def just_fits(script: Script) -> None:
    """A job whose two windows just fit into memory; garbage is never collected."""
    from moetion_lightning.storage import buffers, host_memory

    directory, capacity = script.spec["memory_dir"], script.spec["capacity"]
    for room in (buffers, host_memory):
        room.free_bytes_at = lambda path: max(0, capacity - held_memory(directory))  # type: ignore[attr-defined]
    gc.collect()
    gc.disable()

    def committed(event: Event) -> None:
        if event.kind == "WindowCommitted":
            deleted = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("(deleted)")]
            left = [line for line in deleted if directory in line]
            print(
                f"COMMITTED in start {script.start}: {held_memory(directory)} bytes, {len(left)} removed files mapped"
            )

    written = []

    def torn(event: Event) -> None:
        """Dies when the second window is committed, before the first one is removed."""
        if event.kind == "ManifestWritten" and event.committed:  # type: ignore[attr-defined]
            written.append(event)
            if script.spec.get("torn") and len(written) == 2:
                os.kill(os.getpid(), signal.SIGKILL)

    pl.seed_everything(1, verbose=False)
    module = Hooked(script, {}, width=256)
    fit(script, module, torn, committed, max_epochs=6)


STORIES: dict[str, Callable[[Script], None]] = {
    story.__name__: story for story in (terminated, terminated_loop, second_writer, frozen, poisoned, just_fits)
}


def run(spec: dict[str, Any]) -> None:
    script = Script(spec)
    os.chdir(script.out)
    STORIES[spec["story"]](script)
