"""Files that a script writes by itself while it comes to where it was."""

from __future__ import annotations

import functools
import io
import logging
import os
from collections.abc import Callable
from typing import Any

import safetensors.torch
import torch

__all__ = ["OwnSaves"]

_log = logging.getLogger(__name__)
#: What writes, and its parameter for the file. ``save_file`` may be known to the script by a name of its own, but it
#: writes by ``serialize_file``.
_WRITERS = ((torch, "save", "f"), (safetensors.torch, "serialize_file", "filename"))


class OwnSaves:
    """Lets ``torch.save`` and ``safetensors.torch.save_file`` write nothing while the state is not what it was.

    Args:
        aside: Whether files are put aside now. What is written to memory (``BytesIO``) is not.
    """

    def __init__(self, aside: Callable[[], bool]) -> None:
        self._aside = aside
        self._told = False
        self._made: list[tuple[Any, str, Any, Any]] = []

    def begin(self) -> None:
        """Replace the functions."""
        for module, name, parameter in _WRITERS:
            original = getattr(module, name)
            replacement = self._quiet(original, parameter)
            setattr(module, name, replacement)
            self._made.append((module, name, original, replacement))

    def end(self) -> None:
        """Put the functions back that nobody else has replaced meanwhile. Harmless if called again."""
        while self._made:
            module, name, original, replacement = self._made.pop()
            if getattr(module, name) is replacement:
                setattr(module, name, original)

    def _quiet(self, original: Callable[..., Any], parameter: str) -> Callable[..., Any]:
        @functools.wraps(original)
        def save(*args: Any, **kwargs: Any) -> Any:
            file = kwargs[parameter] if parameter in kwargs else args[1] if len(args) > 1 else None
            if file is None or isinstance(file, io.BytesIO) or not self._aside():
                return original(*args, **kwargs)
            self._tell(file if isinstance(file, (str, os.PathLike)) else getattr(file, "name", file))
            return None

        return save

    def _tell(self, path: Any) -> None:
        if not self._told:
            self._told = True
            _log.info(
                "%s is not written: what the script saves here was saved before the restart. The same holds for other "
                "files until the loop is where it was",
                path,
            )
