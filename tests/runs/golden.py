"""Losses of the recipes that are kept in ``tests/assets/losses``: what a change of the package may not change.

A file begins with what the numbers depend on beside this repository. On another machine they are not compared.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

__all__ = ["RECORD_VARIABLE", "check_losses", "conditions"]

#: Set to anything, the losses of this machine are written instead of compared.
RECORD_VARIABLE = "RECORD_LOSSES"
_FOLDER = Path(__file__).resolve().parents[1] / "assets" / "losses"


def conditions(*, with_transformers: bool) -> list[str]:
    """What the losses of a recipe depend on: one comment line for each.

    The training text is the standard library's own source, so Python's version counts.
    """
    lines = [
        f"# torch {torch.__version__}, {torch.get_num_threads()} thread(s)",
        f"# cpu {torch.backends.cpu.get_cpu_capability()}, {_processor()}",
        f"# python {platform.python_version()}",
    ]
    return [*lines, f"# transformers {version('transformers')}"] if with_transformers else lines


def check_losses(name: str, losses: Sequence[str], *, with_transformers: bool) -> str:
    """Compare the losses of a recipe with those that are kept.

    Args:
        name: The recipe.
        losses: Of its first micro-batches, as hexadecimal text.
        with_transformers: Whether the model is of transformers.

    Returns:
        Why they were not compared; "" if they were.
    """
    path = _FOLDER / f"{name}.txt"
    here = conditions(with_transformers=with_transformers)
    if os.environ.get(RECORD_VARIABLE):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([*here, *losses]) + "\n", encoding="utf-8")
        return f"{path.name} was written"
    assert path.exists(), f"a recipe has its losses in {path}: write them with {RECORD_VARIABLE}=1"
    kept = path.read_text(encoding="utf-8").splitlines()
    there = [line for line in kept if line.startswith("#")]
    if there != here:
        other = [line.removeprefix("# ") for line in there if line not in here]
        return f"{path.name} was written with {'; '.join(other)}"
    assert list(losses) == [line for line in kept if not line.startswith("#")], (
        f"the losses of recipe:{name} are others than those in {path}: training has changed. If that is meant, write "
        f"them anew with {RECORD_VARIABLE}=1 and say so in CHANGELOG.md"
    )
    return ""


def _processor() -> str:
    """The kind of processor: kernels are chosen by it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
