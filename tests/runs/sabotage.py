"""Negative controls: one part of a restore is left out. The comparison must notice each of them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any


def apply(what: str) -> None:
    SABOTAGE[what]()


def _activation() -> None:
    from moetion_lightning.core import reconstruct

    original = reconstruct.write_active
    left_out: list[str] = []

    def write_active(live: Any, operators: Any, load: Any, scalars: Any) -> None:
        operators = list(operators)
        if operators and not left_out:
            left_out.append(operators[0].name)
        original(live, [op for op in operators if op.name not in left_out], load, scalars)

    reconstruct.write_active = write_active


def _adam_step() -> None:
    from moetion_lightning.core import reconstruct, slot_contents

    original = slot_contents.write_active

    def write_active(live: Any, operators: Any, load: Any, scalars: Any) -> None:
        operators = list(operators)
        original(live, operators, load, scalars)
        for op in operators:
            for piece in op.pieces:
                for _, entries in live.states(piece.parameter):
                    if "step" in entries:
                        entries["step"] += 1

    reconstruct.write_active = write_active


def _one_optimizer() -> None:
    """Only the first optimizer's state of a parameter comes back."""
    from moetion_lightning.core import slot_contents

    original = slot_contents.write_kept

    def write_kept(live: Any, piece: Any, load: Any, saved: Any) -> None:
        original(live, piece, load, {index: entry for index, entry in saved.items() if index == "0"})

    slot_contents.write_kept = write_kept


def _rng() -> None:
    from moetion_lightning.callbacks import _data_seam
    from moetion_lightning.data import passes, position
    from moetion_lightning.engine import run_state

    for module in (run_state, _data_seam, position, passes):  # fetching puts generators back, too
        module.set_rng = lambda *args, **kwargs: []


def _data_position() -> None:
    from moetion_lightning.callbacks import _data_seam

    _data_seam.DataSeam.restore = _data_seam.DataSeam.settle = lambda self, state: None


def _draws() -> None:
    """What draws begins anew: samplers, generators of objects, loaders of a validation."""
    from moetion_lightning.callbacks import _evaluation_loaders
    from moetion_lightning.core import generators
    from moetion_lightning.data import attributes

    attributes.Attributes.put_start = attributes.Attributes.put_now = lambda *args, **kwargs: None  # type: ignore[method-assign]
    generators.Generators.take = lambda self, states: []  # type: ignore[method-assign]
    _evaluation_loaders.EvaluationLoaders.settle = lambda self: None  # type: ignore[method-assign]


def _buffers() -> None:
    import torch

    from moetion_lightning.engine import run_state

    def write_buffers(module: Any, saved: Any) -> None:
        with torch.no_grad():
            for buffer in module.buffers():
                buffer.zero_()

    run_state.write_buffers = write_buffers


def _scheduler() -> None:
    from torch.optim.lr_scheduler import LambdaLR

    LambdaLR.load_state_dict = lambda self, state: None


def _buckets() -> None:
    """Ranks sum gradients in the order of a run that has just begun."""
    from moetion_lightning.callbacks import _run_state

    _run_state.set_bucket_order = lambda ddp, order: None


def _share() -> None:
    """Rank 1 restores only what it captured itself."""
    from moetion_lightning.engine import tiers

    class Alone(tiers.RestorePoint):
        def __init__(self, manifest: Any, tier: Any, shares: Any) -> None:
            super().__init__(manifest, tier, shares if _rank() != 1 else ())

    tiers.RestorePoint = Alone


def _window() -> None:
    """Rank 1 restores an older window than the others."""
    from moetion_lightning.engine import group_restore

    original = group_restore.GroupRestore._read

    def read(self: Any, choice: Any) -> Any:
        older = [last for last in self._host.windows() if last < choice.window.last]
        if _rank() == 1 and older:
            choice = dataclasses.replace(choice, window=dataclasses.replace(choice.window, first=0, last=older[0]))
        return original(self, choice)

    group_restore.GroupRestore._read = read


def _keep_older() -> None:
    """Older windows are never dropped."""
    from moetion_lightning.engine.writer import WindowWriter

    WindowWriter.drop_older = lambda self, iteration: None


def _rng_of_another_rank() -> None:
    """All ranks draw what rank 0 draws."""
    import torch.distributed as dist

    from moetion_lightning.engine import run_state

    original = run_state.set_rng

    def set_rng(saved: Any, generators: Any) -> Any:
        box = [saved]
        dist.broadcast_object_list(box, src=0)
        return original(box[0], generators)

    run_state.set_rng = set_rng


def _flipped_record() -> None:
    """One bit of one value that a neighbour has logged is another one."""
    import torch

    from moetion_lightning.pipeline.stage_replay import Source

    original, flipped = Source.tensors, []

    def tensors(self: Any, iteration: int, rank: int) -> Any:
        found = original(self, iteration, rank)
        position = next(i for i, tensor in enumerate(found) if tensor.is_floating_point())
        if not flipped:
            flipped.append(iteration)
            found[position] = found[position].clone()
            found[position].view(-1)[:1].view(torch.int32)[0] ^= 1 << 20
        return found

    Source.tensors = tensors


def _unseen_record() -> None:
    """A neighbour's log lacks a record."""
    from moetion_lightning.pipeline.stage_replay import Source

    original = Source.describe

    def describe(self: Any, rank: int) -> Any:
        headers = original(self, rank)
        headers[-1]["records"] = headers[-1]["records"][1:]
        return headers

    Source.describe = describe


def _unverified() -> None:
    from moetion_lightning.strategies.pipeline_link import PipelineLink

    original = PipelineLink._replay_iteration

    def replay(self: Any, *args: Any) -> list[str]:
        original(self, *args)
        return []

    PipelineLink._replay_iteration = replay


def _flipped_record_unverified() -> None:
    _flipped_record()
    _unverified()


def _missing_micro_batch() -> None:
    """The records of one micro-batch are missing, and another one's are taken for them."""
    from moetion_lightning.pipeline.stage_replay import Announced

    _unverified()
    original = Announced.receive

    def receive(self: Any, iteration: int, device: Any) -> Any:
        found = original(self, iteration, device)
        swapped = {
            (key, source): found.records[key._replace(micro_batch=0), source] if key.micro_batch == 1 else tensors
            for (key, source), tensors in found.records.items()
        }
        return dataclasses.replace(found, records=swapped)

    Announced.receive = receive


def _log_changed(change: Callable[[list[Any]], None]) -> None:
    """What a restore reads of a gradient log is changed first."""
    from moetion_lightning.engine.restore import RestorePoint

    original = RestorePoint.logged

    def logged(self: Any) -> Any:
        found = list(original(self))
        change(found)
        return tuple(found)

    RestorePoint.logged = logged


def _log_dropped() -> None:
    _log_changed(lambda found: found.pop())


def _log_swapped() -> None:
    def swap(found: list[Any]) -> None:
        last, before = found[-1], found[-2]
        found[-2] = dataclasses.replace(before, calls=last.calls)
        found[-1] = dataclasses.replace(last, calls=before.calls)

    _log_changed(swap)


def _log_settings() -> None:
    """Optimizers step with the settings that they happen to have."""
    from moetion_lightning.gradient_log.steps import Settings

    Settings.apply = lambda self, optimizer, parameters: None


def _log_full() -> None:
    """The memory of rank 1 is full from an iteration on."""
    from moetion_lightning.engine.log_writer import LogWriter
    from moetion_lightning.errors import HostMemoryError

    original = LogWriter.commit

    def commit(self: Any, behind: Any, *args: Any) -> None:
        if _rank() == 1 and behind.iteration >= 4:
            raise HostMemoryError("no room")
        original(self, behind, *args)

    LogWriter.commit = commit


def _attributes() -> None:
    from moetion_lightning.engine.plain_attributes import PlainAttributes

    PlainAttributes.restore = lambda self, saved, parameters: None


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


SABOTAGE = {
    "log_dropped": _log_dropped,
    "log_swapped": _log_swapped,
    "log_settings": _log_settings,
    "log_full": _log_full,
    "activation": _activation,
    "adam_step": _adam_step,
    "one_optimizer": _one_optimizer,
    "rng": _rng,
    "data_position": _data_position,
    "draws": _draws,
    "buffers": _buffers,
    "attributes": _attributes,
    "scheduler": _scheduler,
    "buckets": _buckets,
    "share": _share,
    "window": _window,
    "keep_older": _keep_older,
    "rng_of_another_rank": _rng_of_another_rank,
    "flipped_record": _flipped_record,
    "unseen_record": _unseen_record,
    "flipped_record_unverified": _flipped_record_unverified,
    "missing_micro_batch": _missing_micro_batch,
}
