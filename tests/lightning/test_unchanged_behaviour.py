"""A trainer with our callback does what it does without: everything that a user can see in it is compared."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner.tuning import Tuner
from torch import Tensor
from torch.utils.data import DataLoader

from moetion_lightning import SparseExpertCheckpoint
from moetion_lightning.config import OTHER_LIGHTNING
from moetion_lightning.entry_points import pytorch_lightning_callbacks
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.storage.jobs import find_jobs
from tests.runs.data import Samples
from tests.runs.models import Automatic, Manual
from tests.runs.scenario import DEFAULTS

_HOOKS = [name for name in dir(pl.Callback) if name.startswith("on_") or name in ("setup", "teardown")]
#: A window asks for these, too.
_OF_WINDOWS = ("on_save_checkpoint",)


def loader(batch_size: int = 4) -> DataLoader[Any]:
    return DataLoader(Samples(20, augment=False), batch_size=batch_size, shuffle=True)


class Noted(pl.Callback):
    """Writes down every hook, and what can be seen there."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        for name in set(_HOOKS) - {*_OF_WINDOWS, "on_load_checkpoint"}:
            setattr(self, name, self._noting(name))

    def _noting(self, name: str) -> Any:
        def hook(trainer: pl.Trainer, module: pl.LightningModule, *args: Any, **kwargs: Any) -> None:
            others = [type(c).__name__ for c in trainer.callbacks if type(c) is not SparseExpertCheckpoint]
            metrics = {k: float(v).hex() for k, v in trainer.callback_metrics.items()}
            logged = {k: float(v).hex() for k, v in trainer.logged_metrics.items()}
            place = (trainer.global_step, trainer.current_epoch, trainer.is_last_batch, trainer.should_stop)
            self.seen.append((name, others, metrics, logged, place, module._current_fx_name))

        return hook


class Watched(Automatic):
    """Logs from many hooks."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.log("start", float(batch_idx), on_step=True, on_epoch=True)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("end", outputs["loss"], prog_bar=True)

    def on_train_epoch_start(self) -> None:
        self.log("epoch_start", 1.0)


def fit(tmp_path: Path, memory: Path | None, options: dict[str, Any], fits: int = 1) -> dict[str, Any]:
    """What is there after ``fits`` calls of ``fit``; with our callback if it has memory."""
    pl.seed_everything(1, verbose=False)
    options = dict(options)
    kind = options.pop("module", Watched)
    noted = Noted()
    callbacks: list[pl.Callback] = [noted, *(make() for make in options.pop("callbacks", []))]
    if memory is not None:
        callbacks.append(SparseExpertCheckpoint(window=2, memory_dir=str(memory), job_id="job"))
    trainer = pl.Trainer(
        **{
            "max_epochs": 2,
            "accelerator": "cpu",
            "devices": 1,
            "callbacks": callbacks,
            "default_root_dir": tmp_path,
            "logger": CSVLogger(tmp_path),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            **options,
        }
    )
    net = kind(dict(DEFAULTS))
    val = DataLoader(Samples(8, augment=False), batch_size=4)
    for _ in range(fits):
        trainer.fit(net, loader(), val)
    files = {}
    for path in sorted(tmp_path.rglob("*.ckpt")):
        found = torch.load(path, weights_only=False)
        states = {name: value.tolist() for name, value in found.pop("state_dict").items()}
        files[str(path.relative_to(tmp_path))] = (repr(found).replace(str(tmp_path), ""), states)
    return {
        "seen": noted.seen,
        "weights": {name: value.tolist() for name, value in net.state_dict().items()},
        "attributes": sorted(set(vars(net)) | {f"trainer.{name}" for name in vars(trainer)}),
        "loop": trainer.fit_loop.state_dict(),
        "random": torch.rand(()).item(),
        "files": files,
        "written": sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()),
        "finished": trainer.state.finished,
    }


TRAININGS: dict[str, dict[str, Any]] = {
    "default": {},
    "checkpoints": {"callbacks": [lambda: ModelCheckpoint(monitor="end", save_top_k=2, save_last=True)]},
    "steps": {"max_epochs": -1, "max_steps": 7, "val_check_interval": 2},
    "accumulate": {"accumulate_grad_batches": 2},
    "no-steps": {"max_steps": 0},
    "no-batches": {"limit_train_batches": 0},
    "reloads-loaders": {"reload_dataloaders_every_n_epochs": 1},
    "overfits": {"overfit_batches": 2},
    "manual": {"module": Manual},
    "no-logger": {"logger": False, "enable_checkpointing": False},
    "fast-dev-run": {"fast_dev_run": 3},
    "barebones": {"barebones": True, "logger": None, "log_every_n_steps": None},
    "rates": {"callbacks": [LearningRateMonitor]},
}


@pytest.mark.parametrize("fits", [1, 2])
@pytest.mark.parametrize("name", TRAININGS)
def test_what_a_user_sees_is_the_same(tmp_path: Path, memory_dir: Path, name: str, fits: int) -> None:
    options = TRAININGS[name]
    if name == "barebones":
        options = {**options, "callbacks": []}
    without = fit(tmp_path / "a", None, _placed(options, tmp_path / "a"), fits)
    ours = fit(tmp_path / "b", memory_dir, _placed(options, tmp_path / "b"), fits)
    for what, expected in without.items():
        assert ours[what] == expected, what


def _placed(options: dict[str, Any], path: Path) -> dict[str, Any]:
    path.mkdir(exist_ok=True)
    return options


def test_module_and_trainer_are_given_up_after_the_fit(tmp_path: Path, memory_dir: Path) -> None:
    net = Watched(dict(DEFAULTS))
    capture = SparseExpertCheckpoint(window=2, memory_dir=str(memory_dir), job_id="job")
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[capture], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(net, loader())
    gone = [weakref.ref(net), weakref.ref(trainer), weakref.ref(trainer.optimizers[0])]
    del net, trainer, capture  # Lightning gives callbacks the module's `log`
    gc.collect()
    assert [reference() for reference in gone] == [None, None, None]


def test_attributes_that_users_set_on_instances_survive(tmp_path: Path, memory_dir: Path) -> None:
    saved: list[str] = []
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, num_sanity_val_steps=0,
        callbacks=[SparseExpertCheckpoint(window=2, memory_dir=str(memory_dir)), ModelCheckpoint(tmp_path / "c")],
    )  # fmt: skip
    original = trainer.save_checkpoint

    def save_checkpoint(path: Any, *args: Any, **kwargs: Any) -> None:
        saved.append(str(path))
        original(path, *args, **kwargs)

    trainer.save_checkpoint = save_checkpoint  # type: ignore[method-assign]
    module = Watched(dict(DEFAULTS))
    started: list[int] = []
    module.on_train_epoch_start = lambda: started.append(1)  # type: ignore[method-assign]
    trainer.fit(module, loader())
    assert trainer.save_checkpoint is save_checkpoint
    assert len(saved) == len(started) == 1


# --- trials ----------------------------------------------------------------------------------------------------------


class Tuned(Automatic):
    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        self.lr = 0.02
        self.batch_size = 2

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def train_dataloader(self) -> Any:
        return loader(self.batch_size)

    def val_dataloader(self) -> Any:
        return loader(self.batch_size)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def tune(tmp_path: Path, memory: Path | None) -> tuple[Any, ...]:
    pl.seed_everything(1, verbose=False)
    net = Tuned(dict(DEFAULTS))
    callbacks = [] if memory is None else [SparseExpertCheckpoint(window=2, memory_dir=str(memory), job_id="job")]
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", callbacks=callbacks, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    tuner = Tuner(trainer)
    tuner.scale_batch_size(net, max_trials=2, steps_per_trial=1)
    found = tuner.lr_find(net, num_training=8, min_lr=1e-4, max_lr=0.1)
    assert found is not None
    in_trials = [] if memory is None else find_jobs(memory)
    trainer.fit(net)
    return in_trials, net.batch_size, net.lr, {name: value.tolist() for name, value in net.state_dict().items()}


def test_tuner_is_left_alone_and_the_fit_after_it_is_captured(
    tmp_path: Path, memory_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    without = tune(tmp_path, None)
    caplog.set_level("INFO", "moetion_lightning")
    assert tune(tmp_path, memory_dir) == without
    assert [r.message for r in caplog.records if "trial" in r.message] == [
        "a Tuner trains for a trial: SparseExpertCheckpoint is idle in it"
    ] * 2
    assert "committed window" in caplog.text


def test_fast_dev_run_is_left_alone(tmp_path: Path, memory_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "moetion_lightning")
    fit(tmp_path, memory_dir, {"fast_dev_run": True})
    assert find_jobs(memory_dir) == []
    messages = [r.message for r in caplog.records if r.name.startswith("moetion_lightning")]
    assert messages == ["fast_dev_run tries a few batches: SparseExpertCheckpoint is idle in it"]


# --- the package's other name ----------------------------------------------------------------------------------------


def test_trainer_of_the_other_package_is_told_what_to_import(tmp_path: Path, memory_dir: Path) -> None:
    other = pytest.importorskip("pytorch_lightning")

    class Other(other.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise AssertionError("trained")

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = other.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        default_root_dir=tmp_path, callbacks=[SparseExpertCheckpoint(memory_dir=str(memory_dir))],
    )  # fmt: skip
    with pytest.raises(ConfigurationError, match="import lightning.pytorch as pl"):
        trainer.fit(Other(), loader())


def test_setting_of_the_environment_is_refused_for_the_other_package(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pytorch_lightning_callbacks() == []
    monkeypatch.setenv("MOETION", "1")
    with pytest.raises(ConfigurationError) as error:
        pytorch_lightning_callbacks()
    assert OTHER_LIGHTNING in str(error.value)
    monkeypatch.delenv("MOETION")


def test_progress_bar_shows_ours_beside_the_users(tmp_path: Path, memory_dir: Path) -> None:
    shown: list[dict[str, Any]] = []

    class Bar(TQDMProgressBar):
        def get_metrics(self, trainer: Any, module: Any) -> dict[str, Any]:
            found = dict(super().get_metrics(trainer, module))
            shown.append(found)
            return found

    fit(tmp_path, memory_dir, {"callbacks": [Bar], "enable_progress_bar": True})
    assert "end" in shown[-1]
    assert int(shown[-1]["ckpt"]) > 0
