"""Files and folders that are exported to: they appear under their names when they are complete."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import save

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.storage.posix import explain_os_errors, make_private_dir, remove_path, sync_dir

__all__ = ["NOTE", "check_target", "is_readable_without_code", "write_file", "write_safetensors", "write_sharded"]

#: In an exported folder: what it was made of.
NOTE = "moetion_export.json"
_MODEL = "model.safetensors"


def check_target(target: Path, *, folder: bool, force: bool) -> None:
    """Refuse what is there already.

    Args:
        target: What is to be written.
        folder: Whether it is a folder.
        force: Whether an earlier export may be replaced.

    Raises:
        ConfigurationError: There is something, and ``force`` was not given or does not cover it.
    """
    if not os.path.lexists(target):
        return
    if not force:
        raise ConfigurationError(f"{target}: exists already. Give another name, or --force to replace it.")
    if folder and not (target / NOTE).is_file():
        raise ConfigurationError(f"{target}: is no folder that was exported, and is not replaced. Give another name.")
    if not folder and not (target.is_file() or target.is_symlink()):
        raise ConfigurationError(f"{target}: is no file, and is not replaced. Give another name.")


def write_file(target: Path, checkpoint: dict[str, Any], *, force: bool) -> None:
    """Write a file as ``torch.save`` does, readable by this user only."""

    def write(temporary: Path) -> None:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())

    _publish(target, write, folder=False, force=force)


def write_safetensors(target: Path, model: dict[str, Any], note: dict[str, Any], *, force: bool) -> list[str]:
    """Write a folder with a module's tensors in one file.

    Returns:
        What was left out: names that share their values with another one, and entries that are no tensors.
    """
    kept: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    others = [name for name, value in model.items() if not isinstance(value, Tensor)]
    for name, value in model.items():
        if isinstance(value, Tensor):
            first = seen.setdefault((value.data_ptr(), value.shape, value.dtype) if value.numel() else (name,), name)
            if first == name:
                kept[name] = value.detach().contiguous()
            else:
                shared[name] = first

    def write(temporary: Path) -> None:
        save_file(kept, temporary / _MODEL, metadata={"format": "pt"})
        _write_note(temporary, {**note, "tied": shared, "left_out": others})

    _publish(target, write, folder=True, force=force)
    return [*(f"{name} (the same values as {first})" for name, first in shared.items()), *others]


def write_sharded(target: Path, state: dict[str, Any], note: dict[str, Any], *, force: bool) -> None:
    """Write a folder in the form of ``torch.distributed.checkpoint``, which any number of ranks can load."""

    def write(temporary: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that there is one process only
            save(state, checkpoint_id=temporary, no_dist=True)
        _write_note(temporary, note)

    _publish(target, write, folder=True, force=force)


def _write_note(folder: Path, note: dict[str, Any]) -> None:
    (folder / NOTE).write_text(json.dumps(note, indent=1) + "\n")


def _publish(target: Path, write: Callable[[Path], None], *, folder: bool, force: bool) -> None:
    """Write under a temporary name beside the target, and rename."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with explain_os_errors("write", target):
        if not target.parent.is_dir():
            make_private_dir(target.parent)
        remove_path(temporary)
        try:
            if folder:
                temporary.mkdir(mode=0o700)
            write(temporary)
            for path in temporary.rglob("*") if folder else ():
                path.chmod(0o700 if path.is_dir() else 0o600)
            check_target(target, folder=folder, force=force)
            if folder and target.is_dir():
                shutil.rmtree(target)
            os.replace(temporary, target)
            sync_dir(target.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                remove_path(temporary)
            raise


def is_readable_without_code(path: Path) -> bool:
    """Whether ``torch.load(path, weights_only=True)`` reads it, which builds no object of any class."""
    try:
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception:  # of any kind: the file itself was just written
        return False
    return True
