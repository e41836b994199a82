"""From a job's restore point to a checkpoint on disk."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.export.contents import contents_of, sharded_form
from moetion_lightning.export.source import Source, find_source
from moetion_lightning.export.targets import (
    check_target,
    is_readable_without_code,
    write_file,
    write_safetensors,
    write_sharded,
)
from moetion_lightning.export.whole import WholeState, whole_state

__all__ = ["Exported", "export"]

_FILES = (".ckpt", ".pt", ".pth")
_INSIDE = (".safetensors", ".bin", ".distcp")


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written.

    Args:
        path: Where.
        form: What it is, in words.
        source: The restore point.
        state: What was put together.
        kept: What is in it, in words.
        left_out: What of the training state is not.
        notes: What else there is to know.
    """

    path: Path
    form: str
    source: Source
    state: WholeState
    kept: list[str]
    left_out: list[str]
    notes: list[str] = field(default_factory=list)


def export(
    job_or_path: str,
    to: Path,
    *,
    memory_base: Path,
    iteration: int | None = None,
    form: Literal["dcp", "safetensors"] | None = None,
    allowed: Collection[str] = (),
    device: str = "auto",
    force: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Exported:
    """Write an ordinary checkpoint of one iteration.

    Args:
        job_or_path: A job's name in memory, or a path or URL; see :func:`~.source.find_source`.
        to: A file ``.ckpt``, ``.pt`` or ``.pth``, or a folder.
        memory_base: Base directory of the host-memory tier.
        iteration: None for the newest that all ranks have.
        form: Of a folder; None for safetensors.
        allowed: Classes of optimizers besides torch's own that may be imported, as ``module.Class``.
        device: Where optimizers step; ``"auto"``: on a device as in training if there is one, else on the CPU.
        force: Replace an earlier export.
        say: Gets progress.

    Raises:
        MoEtionError: There is nothing to export, or it is not whole; nothing was written.
    """
    is_file = to.suffix in _FILES
    if is_file and form is not None:
        raise ConfigurationError(f"--format {form} is of folders, {to} is a file. Give a folder, or no format.")
    if to.suffix in _INSIDE:
        raise ConfigurationError(
            f"{to}: files of weights are written into a folder. Give the folder's name, or a file ending in "
            f"{', '.join(_FILES)}."
        )
    check_target(to, folder=not is_file, force=force)
    source = find_source(job_or_path, memory_base, iteration, say)
    try:
        where = _device(device, source)
        state = whole_state(source, allowed, where, say)
        contents = contents_of(source, state)
        source.check_dead()  # what was read is what was verified
        say(f"writing {to}")
        notes, left_out = list(state.notes), list(contents.left_out)
        note = {"job": source.first.job, "iteration": source.iteration, "world_size": source.first.world_size}
        kept = contents.kept
        if is_file:
            words = "a Lightning checkpoint" if contents.is_lightning else "a plain checkpoint (not of Lightning)"
            write_file(to, contents.checkpoint, force=force)
            if not is_readable_without_code(to):
                notes.append("torch.load needs weights_only=False: callbacks or hooks keep values of other classes")
        elif form == "dcp":
            words = "a checkpoint of torch.distributed.checkpoint"
            write_sharded(to, sharded_form(source, state, contents), note, force=force)
            left_out += kept[3:]
            kept = kept[:3]
        else:
            words = "model.safetensors, the weights alone"
            shared = write_safetensors(to, contents.model, note, force=force)
            left_out = ["the optimizers' state, and all else that only training needs"]
            left_out += shared
            kept = kept[:2]
        if not source.first.finite:
            notes.append("a loss, a gradient norm or a weight of it is not finite")
        return Exported(path=to, form=words, source=source, state=state, kept=kept, left_out=left_out, notes=notes)
    finally:
        source.close()


def _device(given: str, source: Source) -> torch.device:
    if given == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("--device cuda: this machine has no CUDA device that torch can use. Give cpu or auto.")
    if given != "auto":
        return torch.device(given)
    layout: dict[str, Any] = source.first.extra.get("layout", {})
    is_there = layout.get("device") == "cuda" and torch.cuda.is_available()
    return torch.device("cuda" if is_there else "cpu")
