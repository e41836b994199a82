"""The parts of a drill: its plan, its folder, what it records of a process, and where it makes one fail."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from moetion_lightning.cli import main
from moetion_lightning.commands import drill, recorded
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.events import (
    CaptureStarted,
    Event,
    EventBus,
    IterationFinished,
    LastIterationFinished,
    ManifestWritten,
    ProcessStarted,
    ReplayIteration,
    RestoreApplied,
    RestoreStarted,
    WindowCommitted,
)
from moetion_lightning.testing import fault_injection
from moetion_lightning.testing.drill_plan import ANYTIME, PHASES, DrillPlan, Kill, Kills
from moetion_lightning.testing.fault_injection import FaultInjection, InjectedFaultError
from moetion_lightning.testing.fault_points import EVENT_POINTS, POINTS
from moetion_lightning.testing.order import Order
from moetion_lightning.testing.records import read_recording
from moetion_lightning.testing.scratch import copy_folder
from moetion_lightning.testing.step_recorder import StepRecorder

# --- the plan --------------------------------------------------------------------------------------------------------


def test_plan_follows_from_its_seed_and_spreads_over_the_run() -> None:
    plan = DrillPlan.drawn(seed=3, kills=5, steps=52, ranks=4)
    assert plan == DrillPlan.drawn(seed=3, kills=5, steps=52, ranks=4)
    assert plan != DrillPlan.drawn(seed=4, kills=5, steps=52, ranks=4)
    steps = [kill.step for kill in plan.kills]
    assert all(2 + 8.4 * index - 1 < step < 2 + 8.4 * (index + 1) for index, step in enumerate(steps))
    assert [kill.phase for kill in plan.kills] == list(PHASES[:5])


@pytest.mark.parametrize("seed", range(5))
def test_all_kills_are_due_before_the_end_of_a_short_run(seed: int) -> None:
    plan = DrillPlan.drawn(seed=seed, kills=4, steps=20)
    assert max(kill.step for kill in plan.kills) <= 16
    assert all(kill.point(20) == "optimizer_step" for kill in plan.kills), "in the last step whatever comes"


def test_nothing_is_restored_before_the_first_kill() -> None:
    plan = DrillPlan.drawn(seed=0, kills=3, steps=20, phases=("replay",))
    assert [kill.phase for kill in plan.kills] == [ANYTIME, "replay", "replay"]


@pytest.mark.parametrize("wrong", [{"phases": ("lunch",)}, {"kills": 0}, {"kills": 9, "steps": 10}])
def test_impossible_plan_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="expected"):
        DrillPlan.drawn(**{"seed": 0, "kills": 1, "steps": 10, **wrong})


def test_each_kill_is_done_once_by_whichever_process(tmp_path: Path) -> None:
    plan = DrillPlan.drawn(seed=0, kills=2, steps=10)
    plan.write(tmp_path)
    one, other = Kills(tmp_path), Kills(tmp_path)
    assert one.take(plan.kills[0], ANYTIME)
    assert not other.take(plan.kills[0], ANYTIME)
    assert other.next() == plan.kills[1]
    assert other.take(plan.kills[1], "optimizer_step")
    assert one.next() is None
    assert [kill.phase for kill in one.taken()] == [ANYTIME, "optimizer_step"]


def test_a_phase_that_does_not_come_keeps_no_later_kill_away() -> None:
    replay, capture = Kill(step=9, phase="replay"), Kill(step=9, phase="capture")
    assert [replay.point(step) for step in (3, 9, 10)] == ["replay", "replay", "optimizer_step"]
    assert [capture.point(step) for step in (8, 9, 17, 18)] == [None, "capture", "capture", "optimizer_step"]
    assert Kill(step=9, phase=ANYTIME).point(9) is None


def test_script_works_in_a_copy_that_leaves_the_folder_as_it_is(tmp_path: Path) -> None:
    source = tmp_path / "mine"
    (source / "data").mkdir(parents=True)
    (source / ".git").mkdir()
    (source / "train.py").write_text("mine")
    (source / "data" / "large.bin").write_bytes(b"")
    os.truncate(source / "data" / "large.bin", 33 << 20)
    (source / "link").symlink_to("train.py")
    scratch = copy_folder(source, tmp_path / "copy")
    (scratch.folder / "train.py").write_text("changed")
    assert (source / "train.py").read_text() == "mine"
    assert scratch.linked == ["data/large.bin"]
    assert (scratch.folder / "data" / "large.bin").stat().st_size == 33 << 20
    assert (scratch.folder / "link").exists()
    assert not (scratch.folder / ".git").exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--", "no_such.py"], "no_such.py' is no file"),
        (["--steps", "3", "--", __file__], "at least 1 kill, and 2 steps more"),
        (["--phase", "lunch", "--", __file__], "--phase lunch: expected one of anytime, capture"),
        (["--out", "page.pdf", "--", __file__], "ends in .md or .html"),
        (["--out", "no/such/page.md", "--", __file__], "expected a file in a folder that is there"),
        (["--every", "0", "--", __file__], "expected positive numbers"),
    ],
)
def test_wrong_use_is_told_at_once(args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drill", *args]) == 2
    assert said in capsys.readouterr().err


def test_what_lies_beside_the_folder_is_reached_from_its_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    for name in ("train.py", "here/conf.yaml"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path / "here")
    given = ["../train.py", "--data=../train.py", "--config", "conf.yaml", "../none", "--name=", "x", "/tmp"]
    outside = str(tmp_path / "train.py")
    program = drill._options(drill._parser().parse_args(["--", *given])).program
    assert list(program) == [outside, f"--data={outside}", *given[2:]]


def test_memory_of_a_drill_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOETION_MEMORY_DIR", str(tmp_path))
    with drill._folders(tmp_path / "kept") as (_, memory):
        assert memory.parent == tmp_path
    assert not memory.exists()
    monkeypatch.setenv("MOETION_MEMORY_DIR", str(tmp_path / "none"))
    with pytest.raises(ConfigurationError, match="MOETION_MEMORY_DIR"), drill._folders(None):
        pass


def test_what_is_written_beside_the_folder_of_the_drill_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also among temporary files, and in a folder whose name only begins as the drill's."""
    hooks: list[Any] = []
    monkeypatch.setattr(recorded.sys, "addaudithook", hooks.append)
    own, beside = tmp_path / "drill", tmp_path / "drill-of-mine"
    names = {"records": "", "steps": 1, "memory_dir": str(tmp_path / "memory"), "job_id": "", "persist_dir": ""}
    recorded._note_writes(Order(**names, writes=str(tmp_path / "writes.txt"), folder=str(own)))
    hooks[0]("tempfile.mkdtemp", (str(tmp_path / "tmp1"),))
    for path in (own / "work" / "a", beside / "b", tmp_path / "memory" / "c", tmp_path / "tmp1" / "d", tmp_path):
        hooks[0]("open", (str(path), "w", os.O_WRONLY))
    hooks[0]("open", (str(tmp_path / "read"), "r", os.O_RDONLY))
    assert (tmp_path / "writes.txt").read_text() == f"{beside / 'b'}\n"


# --- recording -------------------------------------------------------------------------------------------------------


class Net(LightningModule):
    """A linear layer with a buffer, which is told what to fail at."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        result: torch.Tensor = self.layer(x)
        return result

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self(batch[0]).square().mean()

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


@pytest.fixture
def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(32.0).reshape(8, 4)), batch_size=2)


def train(recorder: StepRecorder, net: nn.Module, steps: int) -> None:
    """A loop with two optimizers, of which the second one steps behind a loss of its own."""
    both = [torch.optim.AdamW(net.parameters()), torch.optim.SGD(net.parameters(), lr=0.5)]
    for number in range(steps):
        for optimizer in both:
            optimizer.zero_grad()
            net(torch.full((2, 4), float(number))).mean().backward()
            optimizer.step()


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[StepRecorder]:
    made = StepRecorder(tmp_path / "records", every=2)
    made.install()
    yield made
    made.remove()


def test_every_step_of_every_optimizer_is_recorded_by_names(tmp_path: Path, recorder: StepRecorder) -> None:
    torch.manual_seed(1)
    train(recorder, Net(), 2)
    executions = read_recording(tmp_path / "records").ranks[0].executions
    assert [execution.step for execution in executions] == [1, 2, 3, 4]
    last = executions[-1].quantities
    assert len(last["losses"]) == len(last["inputs"]) == 1
    assert {"parameter:layer.weight", "buffer:seen", "optimizer:0:layer.bias:exp_avg"} <= last["tensors"].keys()
    assert float.fromhex(last["settings"]["optimizer:1:group0:lr"]) == 0.5
    assert last["rng"].keys() >= {"torch", "numpy", "python"}
    assert executions[0].quantities["tensors"] == {}, "tensors at each second step"
    assert executions[0].quantities["inputs"] != executions[2].quantities["inputs"]


def test_recording_changes_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    ends = []
    for records in (None, tmp_path / "records"):
        torch.manual_seed(1)
        net = Net()
        recorder = StepRecorder(records or tmp_path)
        if records is not None:
            recorder.install()
        call = nn.Module.__call__
        train(recorder, net, 3)
        recorder.remove()
        assert (call is nn.Module.__call__) == (records is None)
        ends.append(([p.detach().clone() for p in net.parameters()], torch.get_rng_state()))
    assert all(torch.equal(a, b) for a, b in zip(ends[0][0], ends[1][0]))
    assert torch.equal(ends[0][1], ends[1][1])


def test_a_process_that_continues_counts_on_from_the_restored_iteration(tmp_path: Path, recorder: StepRecorder) -> None:
    """Iterations have two steps each. What is restored is made by steps without a backward, which do not count."""
    bus, net = EventBus(), Net()
    train(recorder, net, 2)
    bus.emit(IterationFinished(iteration=1, seconds=0.1, stall_seconds=0.0))
    bus.emit(WindowCommitted(first_iteration=1, last_iteration=1, nbytes=1, seconds=0.1))
    recorder.remove()
    later = StepRecorder(tmp_path / "records", rank=0)
    later.install()
    assert later.committed
    bus.emit(RestoreStarted(first_iteration=1, last_iteration=2, tier="host memory", nbytes=1))
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    bus.emit(RestoreApplied(iteration=1, replay=1, seconds=0.1))
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    train(later, net, 1)
    bus.emit(ReplayIteration(iteration=2, slot=1, num_slots=2, verified=True))
    train(later, net, 1)
    later.remove()
    records = read_recording(tmp_path / "records").ranks[0]
    assert records.starts[1].found == "host memory"
    assert records.starts[1].began_at == 4
    again = [(e.step, e.is_replay, bool(e.quantities["tensors"])) for e in records.executions if e.start == 2]
    assert again == [(5, True, False), (6, True, False), (7, False, True), (8, False, True)]


def test_iterations_are_written_by_the_fit_of_the_script(tmp_path: Path, recorder: StepRecorder) -> None:
    """Each fit opens a session, which counts its iterations anew; its last one is told in another way."""
    bus, net = EventBus(), Net()
    told = {"seconds": 0.1, "stall_seconds": 0.0}
    for _ in range(2):
        bus.emit(ProcessStarted(created_at=0.0, groups_seconds=0.0, predecessor="", environment={}, settings={}))
        train(recorder, net, 1)
        bus.emit(IterationFinished(iteration=1, **told))
        train(recorder, net, 1)
        bus.emit(LastIterationFinished(iteration=2, **told))
    known = read_recording(tmp_path / "records").ranks[0].iterations
    assert known == {(1, 1): 2, (1, 2): 4, (2, 1): 6, (2, 2): 8}


def test_process_ends_in_good_order_behind_the_last_step(tmp_path: Path) -> None:
    recorder = StepRecorder(tmp_path, steps=3)
    recorder.install()
    with pytest.raises(SystemExit) as end:
        train(recorder, Net(), 9)
    recorder.remove()
    assert end.value.code == 0
    assert read_recording(tmp_path).ranks[0].last_step == 3


# --- faults ----------------------------------------------------------------------------------------------------------


def fit(folder: Path, loader: DataLoader[Any], fault: FaultInjection) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=2, default_root_dir=folder, callbacks=[fault], **quiet)  # type: ignore[arg-type]
    trainer.fit(Net(), loader, loader)
    return trainer


@pytest.mark.parametrize("point", [point for point in POINTS if point not in EVENT_POINTS])
def test_process_fails_at_the_point_of_the_step_and_never_again(
    tmp_path: Path, loader: DataLoader[Any], point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[int] = []

    class Watched(FaultInjection):
        def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
            super().on_exception(trainer, pl_module, exception)
            seen.append(trainer.global_step)

    with pytest.raises(InjectedFaultError, match=f"injected at {point} of step 3"):
        fit(tmp_path, loader, Watched(at=3, point=point, action="raise"))
    # An epoch has 4 steps: its validation and its checkpoint come behind them.
    assert seen == [{"validation": 4, "save": 4}.get(point, 2)]
    assert fit(tmp_path, loader, FaultInjection(at=3, point=point, action="raise")).global_step == 8


EVENTS: dict[str, Event] = {
    "capture": CaptureStarted(iteration=3, slot=0, num_slots=2),
    "commit": ManifestWritten(iteration=3, committed=False),
    "restore": RestoreStarted(first_iteration=1, last_iteration=2, tier="host memory", nbytes=1),
    "replay": ReplayIteration(iteration=2, slot=1, num_slots=2, verified=True),
}


@pytest.mark.parametrize("point", EVENT_POINTS)
def test_points_of_the_engine_are_told_by_its_events(
    tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    monkeypatch.setattr(fault_injection.os, "kill", lambda pid, number: sent.append(number))
    bus = EventBus((FaultInjection(at=3, point=point, marker=str(tmp_path / "marker")),))
    bus.emit(CaptureStarted(iteration=2, slot=0, num_slots=2))
    bus.emit(ManifestWritten(iteration=3, committed=True))
    assert sent == []
    for event in [*EVENTS.values(), *EVENTS.values()]:
        bus.emit(event)
    assert sent == [signal.SIGKILL], "once"
    assert (tmp_path / "marker").exists()


def test_a_hang_stops_the_thread_that_came_to_the_point(tmp_path: Path) -> None:
    fault = FaultInjection(at=1, point="capture", action="hang", marker=str(tmp_path / "marker"))
    thread = threading.Thread(target=fault, args=(EVENTS["capture"],), daemon=True)
    thread.start()
    while not (tmp_path / "marker").exists():
        assert thread.is_alive()
    thread.join(timeout=0.05)
    assert thread.is_alive()
    fault._never.set()
    thread.join()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"point": "lunch"}, "expected one of data, forward, backward"),
        ({"action": "explode"}, "expected one of kill, raise, hang"),
        *(({"at": at}, f"at={at!r}: expected an integer") for at in (0, "3", 2.5, True)),
        *(({"rank": rank}, f"rank={rank!r}: expected a global rank") for rank in (-1, "0", False)),
        *(({"marker": marker}, "expected the path of a file") for marker in ("", 3)),
        ({"point": "commit", "action": "raise"}, 'expected "kill" or "hang"'),
    ],
)
def test_impossible_fault_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        FaultInjection(**{"at": 1, **wrong})
