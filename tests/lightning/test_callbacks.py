"""The callbacks inside one process: early errors, precedence, what a user sees. Kills are in ``tests/faults``."""

from __future__ import annotations

import contextlib
import csv
import functools
import json
import logging
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from moetion_lightning.callbacks import (
    DenseInMemoryCheckpoint,
    DenseReconstruction,
    FaultToleranceMonitor,
    PartialExpertsCheckpoint,
    SparseExpertCheckpoint,
    TwoPhaseCheckpoint,
    _fits,
)
from moetion_lightning.callbacks._base import EngineCallback
from moetion_lightning.commands import automatic
from moetion_lightning.errors import (
    ConfigurationError,
    ForeignWindowError,
    HostMemoryError,
    JobBusyError,
    OperatorError,
    StoreError,
    StrandedRankError,
    UnsupportedStateError,
)
from moetion_lightning.events import CaptureStarted, Event, WindowCommitted
from moetion_lightning.session import fits
from moetion_lightning.storage.host_memory import HostMemoryTier
from moetion_lightning.storage.jobs import find_jobs
from tests.runs.data import Samples
from tests.runs.models import Automatic
from tests.runs.scenario import DEFAULTS


def module(**spec: Any) -> Automatic:
    pl.seed_everything(1, verbose=False)
    return Automatic({**DEFAULTS, **spec})


def loader() -> DataLoader[Any]:
    return DataLoader(Samples(28, augment=False), batch_size=4, shuffle=True)


def trainer(tmp_path: Path, *callbacks: pl.Callback, **kwargs: Any) -> pl.Trainer:
    options: dict[str, Any] = {
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "accelerator": "cpu",
        **kwargs,
    }
    return pl.Trainer(
        devices=1,
        callbacks=list(callbacks),
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


class StopAt(pl.Callback):
    """Ends training with an exception, as a bug of the user would."""

    def __init__(self, step: int, error: BaseException) -> None:
        self.step, self.error = step, error

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise self.error


@pytest.fixture(autouse=True)
def _fresh_identities(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test is a process of its own as far as identities go."""
    monkeypatch.setattr(fits, "_fits", {})


def interrupted(tmp_path: Path, memory_dir: Path, step: int = 11, **spec: Any) -> None:
    capture = SparseExpertCheckpoint(window=3, memory_dir=str(memory_dir), job_id="job")
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, capture, StopAt(step, ZeroDivisionError())).fit(module(**spec), loader())


# --- errors before the first step ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SparseExpertCheckpoint(window=0), r"window=0: expected a number of iterations >= 1, or \"auto\""),
        (lambda: SparseExpertCheckpoint(window="large"), "window='large'"),  # type: ignore[arg-type]
        (lambda: SparseExpertCheckpoint(overlap_target=1.5), r"overlap_target=1.5: expected a share in \(0, 1\]"),
        (lambda: SparseExpertCheckpoint(resume="yes"), "resume='yes'"),  # type: ignore[arg-type]
        (lambda: SparseExpertCheckpoint(job_id="../x"), "job_id="),
        (lambda: DenseInMemoryCheckpoint(every_n_steps=0), "every_n_steps=0"),
        (lambda: TwoPhaseCheckpoint(""), "persist_dir='': expected a directory or URL for the second phase"),
        (lambda: TwoPhaseCheckpoint("there", every_n_steps=0), "every_n_steps=0"),
        (lambda: TwoPhaseCheckpoint("there", overhead=1.5), "overhead=1.5: expected a share"),
        (lambda: PartialExpertsCheckpoint(0), "num_experts_per_checkpoint=0"),
        (lambda: PartialExpertsCheckpoint(1, selection="best"), "selection='best'"),  # type: ignore[arg-type]
        (lambda: PartialExpertsCheckpoint(1, plt_limit=2.0), "plt_limit=2.0"),
    ],
)
def test_wrong_settings_raise_at_construction(make: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_two_policies_in_one_trainer_are_refused(tmp_path: Path, memory_dir: Path) -> None:
    callbacks = [
        SparseExpertCheckpoint(memory_dir=str(memory_dir)),
        DenseInMemoryCheckpoint(memory_dir=str(memory_dir)),
    ]
    with pytest.raises(ConfigurationError, match="one run has one checkpoint policy"):
        trainer(tmp_path, *callbacks).fit(module(), loader())


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("make", [lambda: StochasticWeightAveraging(0.01), LearningRateFinder, BatchSizeFinder])
def test_callbacks_that_cannot_be_continued_are_refused(
    tmp_path: Path, memory_dir: Path, make: Any, ours_first: bool
) -> None:
    theirs, ours = make(), SparseExpertCheckpoint(memory_dir=str(memory_dir))
    stop = StopAt(0, AssertionError("trained"))
    callbacks = [ours, theirs, stop] if ours_first else [theirs, ours, stop]
    net = module()
    net.batch_size = net.lr = 4  # what the finders look for
    net.train_dataloader = loader
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ConfigurationError, match=f"{type(theirs).__name__} in Trainer"):
        trainer(tmp_path, *callbacks).fit(net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


class Unstorable(pl.Callback):
    trained = False

    def state_dict(self) -> dict[str, Any]:
        return {"thing": {"deep": object()}}

    def on_train_batch_end(self, *args: Any) -> None:
        type(self).trained = True


def test_state_that_cannot_be_stored_is_named_before_the_first_step(tmp_path: Path, memory_dir: Path) -> None:
    run = trainer(tmp_path, Unstorable(), SparseExpertCheckpoint(window=2, memory_dir=str(memory_dir)))
    with pytest.raises(UnsupportedStateError, match=r"callbacks/Unstorable/thing/deep.*object"):
        run.fit(module(), loader())
    assert not Unstorable.trained


def test_too_little_memory_is_refused_with_numbers(
    tmp_path: Path, memory_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HostMemoryTier, "free_bytes", lambda self: 1000)
    capture = SparseExpertCheckpoint(window=4, memory_dir=str(memory_dir))
    with pytest.raises(HostMemoryError, match=r"1\.0 kB for this job; 2 windows of .* Use a smaller window"):
        trainer(tmp_path, capture, StopAt(0, AssertionError("trained"))).fit(module(), loader())


def test_memory_dir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    capture = SparseExpertCheckpoint(memory_dir=str(tmp_path / "file"))
    with pytest.raises(StoreError, match="file"):
        trainer(tmp_path, capture).fit(module(), loader())


def test_job_of_a_live_process_is_not_taken_over(tmp_path: Path, memory_dir: Path) -> None:
    with HostMemoryTier(memory_dir, "job"):
        capture = SparseExpertCheckpoint(memory_dir=str(memory_dir), job_id="job")
        with pytest.raises(JobBusyError, match="job_id"):
            trainer(tmp_path, capture).fit(module(), loader())


def test_optimizer_of_a_foreign_parameter_is_refused(tmp_path: Path, memory_dir: Path) -> None:
    class Foreign(Automatic):
        def configure_optimizers(self) -> Any:
            self.hidden = [torch.nn.Parameter(torch.zeros(3))]  # a list hides it from the module
            return torch.optim.SGD([*self.parameters(), *self.hidden], lr=0.1)

    with pytest.raises(OperatorError, match="not a parameter of Foreign"):
        trainer(tmp_path, SparseExpertCheckpoint(memory_dir=str(memory_dir))).fit(Foreign(dict(DEFAULTS)), loader())


# --- precedence ------------------------------------------------------------------------------------------------------


def test_users_checkpoint_wins_with_a_notice(
    tmp_path: Path, memory_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "user.ckpt"
    first = trainer(tmp_path, max_steps=2, max_epochs=-1)
    first.fit(module(), loader())
    first.save_checkpoint(path)
    interrupted(tmp_path, memory_dir)
    steps: list[int] = []

    class Steps(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
            steps.append(trainer.global_step)

    capture = SparseExpertCheckpoint(window=3, memory_dir=str(memory_dir), job_id="job")
    with caplog.at_level(logging.INFO, logger="moetion_lightning"):
        trainer(tmp_path, capture, Steps()).fit(module(), loader(), ckpt_path=path)
    assert steps[0] == 2
    assert "it wins over the window" in caplog.text


def test_window_of_another_shape_is_refused_before_the_first_step(tmp_path: Path, memory_dir: Path) -> None:
    interrupted(tmp_path, memory_dir)
    capture = SparseExpertCheckpoint(window=3, memory_dir=str(memory_dir), job_id="job")
    with pytest.raises(ForeignWindowError, match="another model"):
        trainer(tmp_path, capture, StopAt(0, AssertionError("trained"))).fit(module(block="dense"), loader())


def test_reconstruction_settings_come_from_the_callback_beside_it(tmp_path: Path, memory_dir: Path) -> None:
    interrupted(tmp_path, memory_dir)
    steps: list[int] = []

    class Steps(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            steps.append(trainer.global_step)

    capture = SparseExpertCheckpoint(window=3, memory_dir=str(memory_dir), job_id="job")
    trainer(tmp_path, DenseReconstruction(resume="never"), capture, Steps()).fit(module(), loader())
    assert steps[0] == 1


def test_reconstruction_alone_continues_and_captures_nothing(tmp_path: Path, memory_dir: Path) -> None:
    interrupted(tmp_path, memory_dir)
    before = {info.windows for info in find_jobs(memory_dir)}
    events: list[Event] = []
    restore = DenseReconstruction(memory_dir=str(memory_dir), job_id="job", events_path=str(tmp_path / "e.jsonl"))
    stop = StopAt(13, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, restore, stop).fit(module(), loader())
    kinds = [json.loads(line)["event"] for line in (tmp_path / "e.jsonl").read_text().splitlines()]
    assert "ReplayFinished" in kinds
    assert "CaptureStarted" not in kinds
    assert {info.windows for info in find_jobs(memory_dir)} == before
    assert not events


# --- routing ---------------------------------------------------------------------------------------------------------


class Watcher(pl.Callback):
    """Names of the user's modules with forward hooks, and what the windows say of routing."""

    def __init__(self, memory_dir: Path) -> None:
        self.memory_dir = memory_dir
        self.hooked: set[str] = set()
        self.manifests: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        modules = dict(pl_module.named_modules()).items()
        self.hooked |= {name for name, m in modules if m._forward_hooks or m._forward_pre_hooks}
        for path in self.memory_dir.glob("*/rank-*/windows/*.json"):
            with contextlib.suppress(FileNotFoundError):  # dropped meanwhile
                self.manifests.append(json.loads(path.read_bytes()))


EXPERTS = {"body.blocks.0.experts", "body.blocks.1.experts"}
USERS_OF_ROUTING: dict[str, tuple[Callable[..., EngineCallback], list[Callable[[], pl.Callback]], bool]] = {
    "default": (SparseExpertCheckpoint, [], False),
    "dense": (DenseInMemoryCheckpoint, [], False),
    "dense-skip": (functools.partial(DenseInMemoryCheckpoint, skip_frozen_gradients=True), [], False),
    "monitor": (SparseExpertCheckpoint, [FaultToleranceMonitor], True),
    "skip": (functools.partial(SparseExpertCheckpoint, skip_frozen_gradients=True), [], True),
    "partial": (functools.partial(PartialExpertsCheckpoint, 1), [], True),
}


@pytest.mark.parametrize("case", USERS_OF_ROUTING)
def test_routing_is_counted_only_where_it_is_used(tmp_path: Path, memory_dir: Path, case: str) -> None:
    make, others, counts = USERS_OF_ROUTING[case]
    kinds: list[str] = []
    capture = make(memory_dir=str(memory_dir), job_id="job", sinks=[lambda event: kinds.append(event.kind)])
    watcher = Watcher(memory_dir)
    trainer(tmp_path, capture, watcher, *(other() for other in others)).fit(module(block="fused"), loader())
    assert watcher.hooked == (EXPERTS if counts else set())
    assert ("TokensCounted" in kinds) == counts
    assert watcher.manifests
    assert all(("routing" in manifest["extra"]) == counts for manifest in watcher.manifests)


@pytest.mark.parametrize("counted", [True, False])
def test_windows_with_and_without_counts_are_continued_by_the_other(
    tmp_path: Path, memory_dir: Path, counted: bool
) -> None:
    def capture(skip: bool) -> SparseExpertCheckpoint:
        return SparseExpertCheckpoint(
            window=3, memory_dir=str(memory_dir), job_id="job", skip_frozen_gradients=skip, on_mismatch="raise"
        )

    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, capture(counted), StopAt(11, ZeroDivisionError())).fit(module(), loader())
    resumed = module()
    trainer(tmp_path, capture(not counted)).fit(resumed, loader())
    whole = module()
    trainer(tmp_path).fit(whole, loader())
    assert states_differ(whole, resumed) == []


def states_differ(one: pl.LightningModule, other: pl.LightningModule) -> list[str]:
    values = other.state_dict()
    return [name for name, value in one.state_dict().items() if not torch.equal(value, values[name])]


# --- ends ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("bug")])
def test_interrupted_run_keeps_its_window_and_continues(tmp_path: Path, memory_dir: Path, error: BaseException) -> None:
    def capture(sinks: tuple[Any, ...] = ()) -> SparseExpertCheckpoint:
        return SparseExpertCheckpoint(window=3, memory_dir=str(memory_dir), job_id="job", sinks=sinks)

    with pytest.raises((SystemExit, KeyboardInterrupt, RuntimeError)):
        trainer(tmp_path, capture(), StopAt(11, error)).fit(module(), loader())
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning ignores it after the first one
    assert [info.alive for info in find_jobs(memory_dir)] == [False]
    seen: list[str] = []
    resumed = module()
    trainer(tmp_path, capture((lambda event: seen.append(event.kind),))).fit(resumed, loader())
    assert "ReplayFinished" in seen
    whole = module()
    trainer(tmp_path).fit(whole, loader())
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_second_fit_of_a_process_is_another_job(tmp_path: Path, memory_dir: Path) -> None:
    for _ in range(2):
        seen: list[str] = []
        capture = SparseExpertCheckpoint(
            window=2,
            memory_dir=str(memory_dir),
            job_id="twice",
            sinks=(lambda event, seen=seen: seen.append(event.kind),),
        )
        trainer(tmp_path, capture).fit(module(), loader())
        assert "RestoreStarted" not in seen
        assert "WindowCommitted" in seen
    # Both are kept until the process ends well: what fails after training continues at its end.
    assert [(job.name, job.alive) for job in find_jobs(memory_dir)] == [("twice", False), ("twice-fit2", False)]


# --- what must not end training --------------------------------------------------------------------------------------


def commits(tmp_path: Path, memory_dir: Path, *callbacks: pl.Callback, sinks: tuple[Any, ...] = ()) -> list[int]:
    """Last iterations of the committed windows of a whole run; it ends as a run without our callback does."""
    found: list[int] = []

    def note(event: Event) -> None:
        if isinstance(event, WindowCommitted):
            found.append(event.last_iteration)

    capture = SparseExpertCheckpoint(window=3, memory_dir=str(memory_dir), sinks=(*sinks, note))
    watched = module()
    trainer(tmp_path, capture, *callbacks, max_epochs=3).fit(watched, loader())
    plain = module()
    trainer(tmp_path, max_epochs=3).fit(plain, loader())
    assert all(torch.equal(value, watched.state_dict()[name]) for name, value in plain.state_dict().items())
    return found


@pytest.mark.parametrize("kind", ["CaptureStarted", "CaptureFinished", "WindowCommitted", "IterationFinished"])
def test_sink_that_raises_is_dropped_and_training_goes_on(
    tmp_path: Path, memory_dir: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[str] = []

    def broken(event: Event) -> None:
        if event.kind == kind:
            calls.append(kind)
            raise ValueError("a bug of the sink")

    assert commits(tmp_path, memory_dir, sinks=(broken,)) == [3, 6, 9, 12, 15, 18]
    assert calls == [kind]
    assert "gets no more events" in caplog.text


def test_host_memory_that_is_full_for_a_while_gives_windows_up_and_training_goes_on(
    tmp_path: Path, memory_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    acquire = HostMemoryTier.acquire

    def full_for_a_while(self: HostMemoryTier, uid: str, nbytes: int) -> Any:
        if 5 <= int(uid.partition("-")[0]) < 9:  # a file's name begins with its iteration
            raise HostMemoryError("no room left")
        return acquire(self, uid, nbytes)

    monkeypatch.setattr(HostMemoryTier, "acquire", full_for_a_while)
    with caplog.at_level(logging.INFO, logger="moetion_lightning"):
        found = commits(tmp_path, memory_dir)
    assert found[0] == 3
    assert not set(range(4, 11)) & set(found)
    assert len(found) >= 3
    assert "TRAINING IS NOT PROTECTED" in caplog.text
    assert "HostMemoryError: no room left" in caplog.text
    assert "training is protected from here on" in caplog.text


class UnstorableFrom(pl.Callback):
    """A state that cannot be stored, from some step to another."""

    step = 0

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.step = trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        return {"thing": object() if self.first <= self.step <= self.last else None}


@pytest.mark.parametrize(("last", "expected"), [(15, [3, 6, 9, 20]), (99, [3, 6, 9])])
def test_callback_state_that_cannot_be_stored_any_more_does_not_end_training(
    tmp_path: Path, memory_dir: Path, last: int, expected: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    assert commits(tmp_path, memory_dir, UnstorableFrom(10, last)) == expected
    assert "no window begins at iteration 10" in caplog.text
    assert "callbacks/UnstorableFrom/thing" in caplog.text


def test_validate_test_and_predict_are_left_alone(tmp_path: Path, memory_dir: Path) -> None:
    capture = SparseExpertCheckpoint(memory_dir=str(memory_dir / "never"))
    trainer(tmp_path, capture, limit_val_batches=1).validate(module(), loader(), verbose=False)
    assert not (memory_dir / "never").exists()


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("generation", [0, 1])
def test_a_process_that_replaces_a_lost_one_does_nothing_alone(
    tmp_path: Path, memory_dir: Path, monkeypatch: pytest.MonkeyPatch, generation: int, ours: bool
) -> None:
    """Its collectives would do nothing: what it evaluated or trained would be of its own data alone."""
    for name, value in {"STORE": "127.0.0.1:1", "GENERATION": str(generation)}.items():
        monkeypatch.setenv(f"MOETION_{name}", value)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "job.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(_fits, "current_groups", lambda: SimpleNamespace(alone=generation > 0))
    callbacks = [SparseExpertCheckpoint(memory_dir=str(memory_dir))] if ours else []
    run = trainer(tmp_path, *callbacks, limit_val_batches=1)
    assert sum(isinstance(c, automatic.OnlyAsOthersDo) for c in run.callbacks) == generation
    refused = pytest.raises(StrandedRankError, match="all ranks have to begin again")
    with refused if generation else contextlib.nullcontext():
        run.validate(module(), loader(), verbose=False)
    if not ours:
        with refused if generation else contextlib.nullcontext():
            run.fit(module(), loader())


def test_adding_the_callback_changes_no_number(tmp_path: Path, memory_dir: Path) -> None:
    results = []
    for callbacks in ([], [SparseExpertCheckpoint(window=3, memory_dir=str(memory_dir))]):
        net = module()
        run = trainer(tmp_path, *callbacks, limit_val_batches=2, val_check_interval=3)
        run.fit(net, loader(), DataLoader(Samples(8, augment=False), batch_size=4))
        results.append((net.state_dict(), run.optimizers[0].state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(results[0][0].values(), results[1][0].values()))
    for a, b in zip(results[0][1]["state"].values(), results[1][1]["state"].values()):
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_fused", "sgd", "adafactor"])
def test_capture_goes_on_behind_forward_and_backward(tmp_path: Path, memory_dir: Path, optimizer: str) -> None:
    backward_done = threading.Event()
    overlapped: list[bool] = []

    class Backward(pl.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            backward_done.clear()

        def on_after_backward(self, *args: Any) -> None:
            backward_done.set()

    def slow_copy(event: Event) -> None:  # on the capture thread: its copies are not done before the backward is
        if isinstance(event, CaptureStarted):
            overlapped.append(backward_done.wait(timeout=20))

    capture = SparseExpertCheckpoint(window=3, memory_dir=str(memory_dir), sinks=(slow_copy,))
    run = trainer(tmp_path, capture, Backward(), max_epochs=1, gradient_clip_val=0)
    run.fit(module(optimizer=optimizer), loader())
    assert overlapped
    assert all(overlapped)


def test_compute_weights_of_autocast_are_captured_in_16_bits(tmp_path: Path, memory_dir: Path) -> None:
    found: dict[str, torch.dtype] = {}

    class Look(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            assert capture._session is not None
            found.update(capture._session.engine.precision.compute_dtype)

    capture = SparseExpertCheckpoint(window=3, memory_dir=str(memory_dir))
    trainer(tmp_path, capture, Look(), max_epochs=1, precision="bf16-mixed").fit(module(block="fused"), loader())
    assert found["body.blocks.0.experts.up"] == torch.bfloat16
    assert found["body.blocks.0.gate.weight"] == torch.bfloat16
    assert not {"body.embed.weight", "body.norms.0.weight"} & set(found)


def test_buffers_are_recycled_over_many_windows(tmp_path: Path, memory_dir: Path) -> None:
    sizes: list[int] = []

    def measure(event: Event) -> None:
        if isinstance(event, WindowCommitted):
            sizes.append(sum(f.stat().st_size for f in memory_dir.rglob("*") if f.is_file()))

    capture = SparseExpertCheckpoint(window=3, memory_dir=str(memory_dir), sinks=(measure,))
    trainer(tmp_path, capture, max_epochs=20).fit(module(), loader())
    assert len(sizes) > 30
    assert max(sizes[10:]) <= 1.2 * max(sizes[:10])


# --- what a user sees ------------------------------------------------------------------------------------------------


def test_numbers_reach_the_logger_and_the_events_file(tmp_path: Path, memory_dir: Path) -> None:
    logger = CSVLogger(tmp_path, name="csv")
    capture = SparseExpertCheckpoint(window=2, memory_dir=str(memory_dir), events_path=str(tmp_path / "events.jsonl"))
    run = trainer(tmp_path, capture, logger=logger, log_every_n_steps=1)
    run.fit(module(), loader())
    header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0]
    for name in ("committed_step", "stall_ms", "captured_mb", "window_progress", "protected", "checkpoint_stall"):
        assert f"moetion/{name}" in header
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        first, *_, last = [row for row in csv.DictReader(file) if row["moetion/protected"]]
    assert (first["step"], float(first["moetion/protected"]), float(first["moetion/committed_step"])) == ("0", 0, -1)
    assert float(last["moetion/protected"]) == 1
    in_bar = {name: value for name, value in run.progress_bar_metrics.items() if "moetion" in name or name == "ckpt"}
    assert in_bar == {"ckpt": str(int(float(last["moetion/committed_step"])))}, "one short item"
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    committed = [e for e in events if e["event"] == "WindowCommitted"]
    assert [e["last_iteration"] - e["first_iteration"] for e in committed] == [1] * len(committed)


def test_restart_says_what_was_found_and_done(
    tmp_path: Path, memory_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="moetion_lightning"):
        interrupted(tmp_path, memory_dir)
        assert f"is kept in {memory_dir}/job/rank-00000: the same command continues there" in caplog.text
        capture = SparseExpertCheckpoint(window=3, memory_dir=str(memory_dir), job_id="job")
        trainer(tmp_path, capture).fit(module(), loader())
    assert "found the window of iterations" in caplog.text
    assert "in host memory" in caplog.text
    assert "checksums verified" in caplog.text
    assert (
        "compared and equal in each: losses, learning rates, RNG, batches, sampler indices, weights of " in caplog.text
    )
    assert "; the next batch agrees, and the RNG there" in caplog.text


def test_ordinary_checkpoints_load_without_us(tmp_path: Path, memory_dir: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=3, save_top_k=-1)
    trainer(tmp_path, SparseExpertCheckpoint(window=2, memory_dir=str(memory_dir)), saver).fit(module(), loader())
    net = module()
    path = sorted((tmp_path / "ckpt").glob("*step=6*"))[0]
    trainer(tmp_path).fit(net, loader(), ckpt_path=path)


@pytest.mark.parametrize("stage", ["converting", "dense"])
def test_no_checkpoint_is_written_from_a_state_that_is_not_dense(tmp_path: Path, memory_dir: Path, stage: str) -> None:
    interrupted(tmp_path, memory_dir)  # window 7..9: iterations 8 and 9 are replayed
    saved: list[int] = []

    class Saver(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            path = tmp_path / f"{trainer.global_step}.ckpt"
            trainer.save_checkpoint(path)
            if path.exists():
                saved.append(trainer.global_step)

    capture = SparseExpertCheckpoint(window=3, memory_dir=str(memory_dir), job_id="job")
    trainer(tmp_path, Saver(), capture).fit(module(), loader())
    if stage == "converting":
        assert not {8, 9} & set(saved)
    else:
        assert set(saved) == {10, 11, 12, 13, 14}
