"""What a process says of itself when it takes part in a run: when it was made, what it runs on, and with what."""

from __future__ import annotations

import dataclasses
import os
import platform
import shlex
import sys
import time
from pathlib import Path

import psutil
import torch

from moetion_lightning import __version__
from moetion_lightning.config import EngineConfig, predecessor_from_environment
from moetion_lightning.engine import Ranks
from moetion_lightning.events import ProcessStarted
from moetion_lightning.session.settings import SessionSettings

__all__ = ["commit_of", "describe_process"]

_seen = False  # whether this process has taken part in a run before


def describe_process(
    settings: SessionSettings, where: str, job: str, ranks: Ranks, groups_seconds: float
) -> ProcessStarted:
    """The event.

    Args:
        settings: The user's.
        where: The user's call.
        job: The job's identity.
        ranks: Its ranks.
        groups_seconds: What forming process groups took in this process.
    """
    global _seen
    created = time.time() if _seen else _created()
    again, _seen = _seen, True
    return ProcessStarted(
        created_at=created,
        groups_seconds=0.0 if again else groups_seconds,
        predecessor="" if again else predecessor_from_environment(),
        environment={
            "job": job,
            "command": shlex.join(sys.orig_argv)[:1000],
            "commit": commit_of(Path.cwd()),
            "host": platform.node(),
            "devices": _devices(),
            "ranks": str(ranks.control.world_size),
            "moetion_lightning": __version__,
            "torch": torch.__version__,
            **_lightning(),
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.release()}",
        },
        settings={"callback": where, "policy": settings.policy.name, **_given(settings.config)},
    )


def _created() -> float:
    """When this process was made, to a hundredth of a second where the kernel says so (psutil: to one or two)."""
    try:
        ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return psutil.Process().create_time()


def commit_of(folder: Path) -> str:
    """The git commit that is checked out there; "" if there is none. No program is run for it."""
    try:
        root = next((parent for parent in (folder, *folder.parents) if (parent / ".git").exists()), None)
        if root is None:
            return ""
        git = root / ".git"
        if git.is_file():  # a worktree
            git = root / git.read_text(encoding="utf-8").partition("gitdir: ")[2].strip()
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref: "):
            return head[:40]
        common = git / "commondir"
        places = [git, git / common.read_text(encoding="utf-8").strip()] if common.exists() else [git]
        for place in places:
            if (place / head[5:]).exists():
                return (place / head[5:]).read_text(encoding="utf-8").strip()[:40]
            packed = place / "packed-refs"
            for line in packed.read_text(encoding="utf-8").splitlines() if packed.exists() else ():
                if line.endswith(f" {head[5:]}"):
                    return line[:40]
    except (OSError, UnicodeDecodeError):
        pass
    return ""


def _devices() -> str:
    cpu = f"{os.cpu_count()} CPUs ({platform.machine()})"
    if not torch.cuda.is_available():
        return cpu
    count = torch.cuda.device_count()
    name = torch.cuda.get_device_name() if torch.cuda.is_initialized() else "CUDA"  # nothing is set up for this
    return f"{count} x {name}, {cpu}"


def _lightning() -> dict[str, str]:
    """Of the adapter's library, as far as it is in use."""
    names = ("lightning", "pytorch_lightning", "transformers", "accelerate")
    return {name: str(sys.modules[name].__version__) for name in names if hasattr(sys.modules.get(name), "__version__")}


def _given(config: EngineConfig) -> dict[str, str]:
    """The settings that are not as they are by themselves."""
    values = {field.name: (getattr(config, field.name), field.default) for field in dataclasses.fields(config)}
    return {name: str(value) for name, (value, default) in values.items() if value != default}
