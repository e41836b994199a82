"""Under what circumstances a trainer's loaders were made, and how they are made again under the same ones.

A user's ``train_dataloader()`` looks at the epoch, at the step, at attributes of the module or DataModule; it draws
random numbers. A restarted trainer would call it at another point. Attributes that training has changed, or that the
user's own hooks have changed in restoring a checkpoint, are those of then while the loaders are made: who moves a
loader to its place by such hooks finds it moved once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sized
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from moetion_lightning.core.generators import Generators
from moetion_lightning.core.instance_patches import InstancePatches
from moetion_lightning.core.reachable import attributes_of
from moetion_lightning.core.run_state import Rng, set_rng
from moetion_lightning.data.attributes import Seen, copied, equal, is_plain

__all__ = ["LoaderSource"]

_ABSENT = object()
_THEIRS = frozenset({*vars(LightningModule()), *vars(LightningDataModule()), "trainer"})


class LoaderSource:
    """Stands between one loop of a trainer and the hook that makes its loaders.

    Args:
        trainer: The trainer.
        loop: The fit loop, or its validation loop.
        seen: What attributes were before anything was restored.
    """

    def __init__(self, trainer: Trainer, loop: Any, seen: Seen) -> None:
        self._trainer = trainer
        self._source = loop._data_source
        self._seen = seen
        self._makers: dict[str, Any] = {}
        if isinstance(self._source.instance, (LightningModule, LightningDataModule)):
            datamodule = getattr(trainer, "datamodule", None)
            self._makers = {"module": trainer.lightning_module}
            self._makers |= {} if datamodule is None else {"datamodule": datamodule}
        for maker in self._makers.values():
            seen.of(maker)
        self._generators = Generators(lambda: self._makers)
        self._made: Mapping[str, Any] | None = None
        self._pending: Mapping[str, Any] | None = None
        original = self._source.dataloader

        def dataloader() -> Any:
            pending, self._pending = self._pending, None
            if pending is not None:
                return self._make_again(pending, original)
            self._made = self._circumstances()
            return original()

        self._patches = InstancePatches()
        self._patches.put(self._source, "dataloader", dataloader)

    def remove(self) -> None:
        """Leave the loop as it was."""
        self._patches.undo()

    # --- noting --------------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any] | None:
        """The circumstances under which the present loaders were made; None if none were."""
        if self._made is None:
            return None
        return {**self._made, "now": {name: self._read_now(maker) for name, maker in self._makers.items()}}

    def _circumstances(self) -> dict[str, Any]:
        return {
            "epoch": self._trainer.current_epoch,
            "global_step": self._trainer.global_step,
            "rng": Rng().packed(self._generators.states()) if self._makers else None,
            "attributes": {name: self._read(maker) for name, maker in self._makers.items()},
        }

    def _read(self, maker: object) -> dict[str, Any]:
        base, _ = self._seen.of(maker)
        table = {key: value for key, value in attributes_of(maker).items() if key not in _THEIRS}
        plain = {key: copied(value) for key, value in table.items() if is_plain(value)}
        changed = [key for key, value in table.items() if not _is_same(base.get(key, _ABSENT), value)]
        return {
            "plain": plain,
            "changed": [*changed, *(key for key in base if key not in table and key not in _THEIRS)],
            "other": {key: _looks(value) for key, value in table.items() if key not in plain},
        }

    def _read_now(self, maker: object) -> dict[str, Any]:
        """What has changed since the beginning."""
        base, _ = self._seen.of(maker)
        found: dict[str, Any] = {"plain": {}, "other": []}
        for key, value in attributes_of(maker).items():
            if key in _THEIRS or _is_same(base.get(key, _ABSENT), value):
                continue
            if is_plain(value):
                found["plain"][key] = copied(value)
            else:
                found["other"].append(key)
        return found

    # --- making again --------------------------------------------------------------------------------------------

    def restore(self, made: Mapping[str, Any] | None) -> None:
        """The loaders that are made next are those that were made then; None: they are new ones."""
        self._pending = made

    def _make_again(self, made: Mapping[str, Any], original: Callable[[], Any]) -> Any:
        rng, states = Rng(), self._generators.states()
        moved = {name: self._put(maker, made["attributes"].get(name)) for name, maker in self._makers.items()}
        if made["rng"] is not None:
            set_rng(made["rng"], self._generators)
        with self._counters(made["epoch"], made["global_step"]):
            loaders = original()
        set_rng(rng.packed(states), self._generators)
        for name, maker in self._makers.items():
            self._leave(maker, made["now"].get(name), moved[name])
        self._made = {key: value for key, value in made.items() if key != "now"}
        return loaders

    def _put(self, maker: object, saved: Mapping[str, Any] | None) -> dict[str, tuple[Any, Any]]:
        """Put attributes in place; returns what was there, and what is now."""
        moved: dict[str, tuple[Any, Any]] = {}
        if saved is None:
            return moved
        base, _ = self._seen.of(maker)
        table = attributes_of(maker)
        here = {k for k in {*table, *base} - _THEIRS if not _is_same(base.get(k, _ABSENT), table.get(k, _ABSENT))}
        for key in sorted({*here, *saved["changed"]}):
            before = table.get(key, _ABSENT)
            if key in saved["plain"]:
                value = copied(saved["plain"][key])
            elif key in saved["other"]:  # a dataset, say, which the user's hook has cut, or has not
                fits = [v for v in (before, base.get(key, _ABSENT)) if v is not _ABSENT]
                value = next((v for v in fits if _looks(v) == saved["other"][key]), before)
            else:
                value = _ABSENT
            if not _is_same(before, value):
                moved[key] = before, value
                _set(table, key, value)
        return moved

    def _leave(self, maker: object, saved: Mapping[str, Any] | None, moved: Mapping[str, tuple[Any, Any]]) -> None:
        """Attributes after the loaders were made: as they are at the position, or as the user's hooks left them."""
        base, _ = self._seen.of(maker)
        table = attributes_of(maker)
        for key, (before, put) in moved.items():
            if saved is not None and key in saved["plain"]:
                _set(table, key, copied(saved["plain"][key]))
            elif saved is not None and key not in saved["other"] and (key not in base or is_plain(base[key])):
                _set(table, key, copied(base[key]) if key in base else _ABSENT)  # nothing had changed it
            elif _is_same(table.get(key, _ABSENT), put):
                _set(table, key, before)

    @contextlib.contextmanager
    def _counters(self, epoch: int, global_step: int) -> Iterator[None]:
        """The trainer's epoch and step are those of then."""
        loop = self._trainer.fit_loop
        epochs: Any = loop.epoch_progress.current
        steps = (
            loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total,
            loop.epoch_loop.manual_optimization.optim_step_progress.total,
        )
        before = (epochs.completed, epochs.processed), [counter.completed for counter in steps]
        epochs.completed = epochs.processed = epoch
        for counter in steps:
            counter.completed = global_step
        try:
            yield
        finally:
            epochs.completed, epochs.processed = before[0]
            for counter, completed in zip(steps, before[1]):
                counter.completed = completed


def _is_same(a: object, b: object) -> bool:
    return a is b or (type(a) is type(b) and is_plain(a) and is_plain(b) and equal(a, b))


def _set(table: dict[str, Any], key: str, value: object) -> None:
    if value is _ABSENT:
        table.pop(key, None)
    else:
        table[key] = value


def _looks(value: Any) -> list[Any]:
    """By what two objects can be told apart that cannot be stored."""
    length = None
    if isinstance(value, Sized):
        with contextlib.suppress(Exception):  # of something that is not set up
            length = len(value)
    return [f"{type(value).__module__}.{type(value).__qualname__}", length]
