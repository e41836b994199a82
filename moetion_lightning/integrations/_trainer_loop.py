"""The loop of a Hugging Face ``Trainer``: counters, data position, and where they are put back.

Private names of transformers are used only here, those of 5.3 and later, and in :mod:`._older_trainer_loop`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import transformers.trainer
from torch import Tensor
from transformers.trainer_callback import ExportableState

from moetion_lightning.core.instance_patches import InstancePatches
from moetion_lightning.core.run_state import get_rng, set_rng
from moetion_lightning.engine.replay_record import BatchDigest, describe_batch
from moetion_lightning.errors import ConfigurationError, UnsupportedStateError
from moetion_lightning.integrations._loaders import Followed, follow
from moetion_lightning.integrations._other_loaders import OtherLoader, OtherLoaders

__all__ = ["NEEDED", "FollowedLoader", "LoaderInPlace", "TrainerLoop", "step_of"]

_log = logging.getLogger(__name__)

#: Fields of ``TrainerState`` that training changes; the others follow from the arguments.
_STATE = (
    *("epoch", "global_step", "num_input_tokens_seen", "total_flos", "log_history"),
    *("best_metric", "best_global_step", "best_model_checkpoint", "stateful_callbacks"),
)
#: The loop's own counters.
_COUNTERS = (
    *("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged"),
    *("_initial_global_step", "_initial_num_input_tokens_seen", "current_flos"),
)
#: Methods of every Trainer whose loop can be followed.
NEEDED = ("get_batch_samples", "training_step", "_save_checkpoint", "_evaluate", "_get_dataloader")
_INCOMPLETE = "checkpoint-is-incomplete.txt"  # which the Trainer's checkpoint at SIGTERM leaves in the folder


class TrainerLoop:
    """Where the loop of one trainer stands; a :class:`~._state.LoopPosition`.

    An update's batches are drawn before ``on_step_begin``, where the state is captured: the data position is noted
    before they are drawn, and a restarted loop draws them again before everything else is put back.

    Args:
        trainer: The trainer.

    Raises:
        ConfigurationError: This version of transformers has another loop.
    """

    needed: ClassVar[tuple[str, ...]] = (*NEEDED, "_init_training_state", "_run_epoch")

    def __init__(self, trainer: Any) -> None:
        absent = [name for name in self.needed if not hasattr(trainer, name)]
        if absent:
            raise ConfigurationError(
                f"MoEtionTrainerCallback in {type(trainer).__name__}: it has no {absent[0]}(); expected the Trainer of "
                "transformers 4.57 or later. Upgrade transformers."
            )
        self._trainer = trainer
        self._patches = InstancePatches()
        self._evaluation = _Evaluation(trainer, self._patches)
        self._until_restored: list[Callable[[], None]] = []
        self._followed: Followed | None = None
        self._source: Any = None
        self._to_come: Mapping[str, Any] | None = None
        self._epoch = 0
        self._drawn = 0  # batches of the present epoch
        self._before_update: dict[str, Any] = {}
        #: The batches of the update that begins.
        self.drawn: list[BatchDigest] = []

    def remove(self) -> None:
        """Leave the trainer as it was."""
        self._patches.undo()
        self._evaluation.release()
        if self._followed is not None:
            self._followed.release()
            self._followed = None

    def _patch(self, name: str, replacement: Any) -> Callable[[], None]:
        return self._patches.put(self._trainer, name, replacement)

    # --- while it runs -------------------------------------------------------------------------------------------

    def follow(self, record_loss: Callable[[Tensor], None], replaying: Callable[[], bool]) -> None:
        """Note data positions and losses from now on; write no checkpoint while the state is not whole.

        Args:
            record_loss: Gets the loss of each micro-batch.
            replaying: Whether the state is not whole.
        """
        trainer = self._trainer
        draw, train, save = trainer.get_batch_samples, trainer.training_step, trainer._save_checkpoint

        def noting_get_batch_samples(*args: Any, **kwargs: Any) -> Any:
            assert self._followed is not None
            self._before_update = {"epoch": self._epoch, "batches": self._drawn, "data": self._followed.snapshot()}
            self.drawn = []
            batches, *rest = draw(*args, **kwargs)
            self._drawn += len(batches)
            return (batches, *rest)

        def recording_training_step(*args: Any, **kwargs: Any) -> Any:
            loss = train(*args, **kwargs)
            record_loss(loss)
            self._trained(loss)
            return loss

        def whole_save_checkpoint(model: Any, trial: Any) -> None:
            if replaying():
                self._skip_checkpoint(trial)
            else:
                save(model, trial)

        self._follow_passes()
        self._patch("get_batch_samples", noting_get_batch_samples)
        self._patch("training_step", recording_training_step)
        self._patch("_save_checkpoint", whole_save_checkpoint)

    def _drew(self, batch: object) -> None:
        self.drawn.append(describe_batch(batch, [self._followed]))

    def _trained(self, loss: Tensor) -> None:
        """A micro-batch is done."""

    def _follow_passes(self) -> None:
        original = self._trainer._run_epoch

        def following_run_epoch(**kwargs: Any) -> Any:
            return self._run_epoch(original, kwargs)

        self._patch("_run_epoch", following_run_epoch)

    def _begin_pass(self, loader: Any, epoch: int) -> Mapping[str, Any] | None:
        """Returns the position that the pass continues from; None if it begins."""
        if self._source is not loader:
            if self._followed is not None:
                self._followed.release()
            self._followed, self._source = follow(loader), loader
        assert self._followed is not None
        self._epoch, self._drawn = epoch, 0
        to_come, self._to_come = self._to_come, None
        if to_come is not None:
            self._followed.restore(to_come["data"])
            self._drawn = to_come["batches"]
        return to_come

    def _run_epoch(self, original: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        loader = kwargs["train_dataloader"]
        to_come = self._begin_pass(loader, kwargs["epoch"])
        assert self._followed is not None
        undo: Callable[[], None] = lambda: None  # noqa: E731
        skipped = 0
        if (
            to_come is None
            and kwargs["resume_from_checkpoint"] is not None
            and kwargs["epoch"] == kwargs["epochs_trained"]
        ):
            # The Trainer would go on with another loader, of which no window could know where it stands.
            skipped = 0 if self._trainer.args.ignore_data_skip else kwargs["steps_trained_in_current_epoch"]
            if skipped:
                self._drawn = skipped
                undo = self._skip_nothing()
        if to_come is not None:
            # Anything but None: the Trainer then counts from the batches that are done.
            kwargs = {**kwargs, "resume_from_checkpoint": "", "steps_trained_in_current_epoch": self._drawn}
            undo = self._skip_nothing()
        try:
            following = FollowedLoader(loader, self._followed, undo, skipped, self._drew)
            return original(**{**kwargs, "train_dataloader": following})
        finally:
            undo()
            self._followed.finish()

    def _skip_nothing(self) -> Callable[[], None]:
        """Let the Trainer not skip batches itself: the loader continues by itself. Returns what undoes it."""
        args, names = self._trainer.args, vars(transformers.trainer)
        original, ignore = names["skip_first_batches"], args.ignore_data_skip
        names["skip_first_batches"] = lambda loader, num_batches=0: loader
        args.ignore_data_skip = False

        def undo() -> None:
            names["skip_first_batches"] = original
            args.ignore_data_skip = ignore

        return undo

    def _skip_checkpoint(self, trial: Any) -> None:
        """The checkpoint of a step that is done again was written before; what else saving does is done again."""
        trainer, state = self._trainer, self._trainer.state
        if trainer.hp_search_backend is None and trial is None:
            trainer.store_flos()
        run_dir = Path(trainer._get_output_dir(trial=trial))
        folder = run_dir / f"checkpoint-{state.global_step}"
        _log.info("%s is not written: this step is being replayed, and was saved before", folder)
        if state.best_global_step:
            best = run_dir / f"checkpoint-{state.best_global_step}"
            if best.exists():
                state.best_model_checkpoint = str(best)
        for callback in [*self._exportable(), trainer.control]:
            name, known = type(callback).__name__, state.stateful_callbacks
            if isinstance(known.get(name), list):
                known[name].append(callback.state())
            else:
                known[name] = callback.state()
        if (folder / _INCOMPLETE).exists() and not (folder / "trainer_state.json").exists():
            shutil.rmtree(folder)  # begun for SIGTERM: as a checkpoint it would be found, and be empty

    # --- where it stands -----------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """As of ``on_step_begin``; the data position is that before the update's batches were drawn."""
        trainer = self._trainer
        return {
            **self._before_update,
            "state": self._to_json({name: getattr(trainer.state, name) for name in _STATE}, "TrainerState"),
            "control": dataclasses.asdict(trainer.control),
            "evaluation": self._evaluation.snapshot(),
            "counters": {name: getattr(trainer, name) for name in _COUNTERS if hasattr(trainer, name)},
            "callbacks": [
                [type(callback).__name__, self._to_json(callback.state()["attributes"], type(callback).__name__)]
                for callback in self._exportable()
            ],
        }

    @staticmethod
    def step_of(position: Mapping[str, Any]) -> int:
        """Updates that are done at a position."""
        return int(json.loads(position["state"])["global_step"])

    def continue_at(self, position: Mapping[str, Any], shown: str) -> str | None:
        """Begin the loop there: before the Trainer makes its state.

        Args:
            position: What :meth:`snapshot` gave.
            shown: Where it comes from, for messages.

        Returns:
            The checkpoint that the loop is to be told to resume from.
        """

        def evaluate(*args: Any, **kwargs: Any) -> None:
            _log.info("eval_on_start=True: not done again, training continues from %s", shown)

        self._to_come = position
        self._until_restored = [
            self._patch("_load_rng_state", lambda checkpoint: None),
            self._patch("_evaluate", evaluate),
        ]
        return self._begin_there(position)

    def _begin_there(self, position: Mapping[str, Any]) -> str | None:
        original = self._trainer._init_training_state

        def init_training_state(max_steps: int, per_epoch: int, num_epochs: int, *args: Any) -> tuple[int, int]:
            original(max_steps, per_epoch, num_epochs, None, *args[1:])
            self._restore_state(position)
            undo()
            return position["epoch"], position["batches"]

        undo = self._patch("_init_training_state", init_training_state)
        return None

    def restore(self, state: Mapping[str, Any]) -> None:
        """At the first ``on_step_begin``: the same batches are drawn, and the Trainer has begun all that begins."""
        trainer = self._trainer
        for undo in self._until_restored:
            undo()
        self._restore_state(state)
        self._evaluation.restore(state["evaluation"])
        for name, value in state["counters"].items():
            setattr(trainer, name, value.to(trainer.args.device) if isinstance(value, Tensor) else value)
        for name, value in state["control"].items():
            setattr(trainer.control, name, value)
        saved: dict[str, list[str]] = {}
        for name, attributes in state["callbacks"]:
            saved.setdefault(name, []).append(attributes)
        for callback in self._exportable():
            of_kind = saved.get(type(callback).__name__)
            for name, value in (json.loads(of_kind.pop(0)) if of_kind else {}).items():
                setattr(callback, name, value)

    def sources(self) -> list[Any]:
        """The training loaders."""
        return [] if self._source is None else [self._source]

    def parts(self) -> dict[str, object]:
        """Objects that may hold generators."""
        trainer = self._trainer
        found: dict[str, object] = {"trainer": trainer}
        found |= {f"callback{i}": callback for i, callback in enumerate(trainer.callback_handler.callbacks)}
        if self._followed is not None:
            found |= {f"loader.{role}": part for role, part in self._followed.parts().items()}
        return found

    def _restore_state(self, position: Mapping[str, Any]) -> None:
        for name, value in json.loads(position["state"]).items():
            setattr(self._trainer.state, name, value)

    def _exportable(self) -> list[Any]:
        """Callbacks that say what their state is."""
        return [c for c in self._trainer.callback_handler.callbacks if isinstance(c, ExportableState)]

    @staticmethod
    def _to_json(value: object, owner: str) -> str:
        try:
            return json.dumps(value)
        except (TypeError, ValueError) as error:
            raise UnsupportedStateError(
                f"{owner} holds a value that is no plain number, text, list or mapping ({error}); the Trainer could "
                "not write it into trainer_state.json either. Log and keep plain values."
            ) from error


def step_of(checkpoint: Path) -> int:
    """Updates that are done in a checkpoint of the Trainer; -1 where it does not say."""
    try:
        return int(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1


class _Evaluation(OtherLoaders):
    """Evaluation loaders: the Trainer keeps those whose workers live on, and makes others anew.

    Args:
        trainer: The trainer.
        patches: Where its method is replaced.
    """

    def __init__(self, trainer: Any, patches: InstancePatches) -> None:
        self._trainer = trainer
        super().__init__("MoEtionTrainerCallback", self._kept)
        original = trainer._get_dataloader

        def get_dataloader(*args: Any, **kwargs: Any) -> Any:
            loader = original(*args, **kwargs)
            self.look()
            return loader

        patches.put(trainer, "_get_dataloader", get_dataloader)

    def _kept(self) -> dict[str, OtherLoader]:
        kept: Mapping[str, Any] = getattr(self._trainer, "_eval_dataloaders", {})
        return {
            key: OtherLoader(loader, loader.base_dataloader, counter="iteration")
            for key, loader in kept.items()
            if hasattr(loader, "base_dataloader")
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Continue there; loaders that were there are made."""
        several = isinstance(self._trainer.eval_dataset, dict)
        for key in saved.keys() - self._kept().keys():
            self._trainer.get_eval_dataloader(key if several else None)
        super().restore(saved)


class LoaderInPlace:
    """Is the loader for all that is asked of it, but for what a subclass has of its own.

    Args:
        loader: The loader.
    """

    def __init__(self, loader: Any) -> None:
        self._moetion_loader = loader

    def __len__(self) -> int:
        return len(self._moetion_loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_moetion_loader"], name)


class FollowedLoader(LoaderInPlace):
    """Stands for the training loader while the Trainer runs an epoch.

    Args:
        loader: The loader.
        followed: Its position.
        begun: Called when it is iterated.
        skipped: Batches to pass over, which a checkpoint has behind it.
        drew: Called with each batch.
    """

    def __init__(
        self,
        loader: Any,
        followed: Followed,
        begun: Callable[[], None],
        skipped: int,
        drew: Callable[[object], None],
    ) -> None:
        super().__init__(loader)
        self._moetion = (followed, begun, skipped, drew)

    def __iter__(self) -> Iterator[Any]:
        followed, begun, skipped, drew = self._moetion
        begun()
        batches = followed.iterate()
        generators = get_rng()
        for _ in itertools.islice(batches, skipped):
            pass
        if skipped:
            set_rng(generators)
        return self._tell(batches, drew)

    @staticmethod
    def _tell(batches: Iterator[Any], drew: Callable[[object], None]) -> Iterator[Any]:
        for batch in batches:
            drew(batch)
            yield batch
