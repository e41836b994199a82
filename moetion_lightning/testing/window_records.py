"""What windows say of the iterations that they are made of, as a recording: to compare runs that nobody recorded."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moetion_lightning.errors import ConfigurationError, MoEtionError
from moetion_lightning.storage.local import LocalPlace
from moetion_lightning.storage.tier import Tier
from moetion_lightning.testing.records import Execution, RankRecords, Recording, Start

__all__ = ["common_steps", "read_window_records"]


def read_window_records(target: str, memory_base: Path) -> Recording:
    """The records of all iterations of a job's committed windows; a step is an iteration there.

    Args:
        target: A job's name in this machine's memory, or its folder there or in its ``persist_dir``.
        memory_base: Base directory of the host-memory tier.

    Raises:
        ConfigurationError: There are no windows.
    """
    folder = Path(target) if Path(target).is_dir() else memory_base / target
    ranks = {}
    for path in sorted(folder.glob("rank-*")):
        records = RankRecords(starts=[Start(pid=0)], executions=_executions(Tier(LocalPlace(path))))
        if records.executions:
            ranks[int(path.name.removeprefix("rank-"))] = records
    if not ranks:
        raise ConfigurationError(
            f"{target}: neither records (rank-00000-*.jsonl) of `moetion run --record` or `moetion drill --keep`, "
            f"nor windows of a job; and no job of that name has windows in {memory_base}"
        )
    return Recording(ranks=ranks)


def common_steps(first: Recording, second: Recording) -> tuple[Recording, Recording]:
    """Both recordings without the steps that only one of them has: windows go when newer ones come."""
    pairs = {rank: (first.ranks[rank], second.ranks[rank]) for rank in first.ranks if rank in second.ranks}
    cut: tuple[dict[int, RankRecords], dict[int, RankRecords]] = {}, {}
    for rank, both in pairs.items():
        steps = set.intersection(*({execution.step for execution in records.executions} for records in both))
        for kept, records in zip(cut, both):
            executions = [execution for execution in records.executions if execution.step in steps]
            kept[rank] = RankRecords(starts=records.starts, executions=executions)
    return Recording(ranks=cut[0]), Recording(ranks=cut[1])


def _executions(tier: Tier) -> list[Execution]:
    found: dict[int, Execution] = {}
    for window in tier.windows():
        with contextlib.suppress(MoEtionError):  # a living run has just removed it
            for slot in tier.read_manifest(window).slots:
                if slot.get("record"):
                    found[slot["iteration"]] = _execution(slot["iteration"], slot["record"])
    return [found[iteration] for iteration in sorted(found)]


def _execution(iteration: int, record: Mapping[str, Any]) -> Execution:
    tensors = {f"gradient:{name}": str(digest) for name, digest in record.get("gradients", {}).items()}
    tensors |= {f"gradient:{name}": value for name, value in _numbered("norm", record.get("norms", ())).items()}
    tensors |= {f"parameter:{name}": str(digest) for name, digest in record.get("weights", {}).items()}
    return Execution(
        step=iteration,
        start=1,
        is_replay=False,
        is_undisturbed=True,
        quantities={
            "inputs": _numbered("micro-batch", record.get("batches", ())),
            "settings": _numbered("learning rate", record.get("lrs", ())),
            "losses": _numbered("micro-batch", record.get("losses", ())),
            "tensors": tensors,
            "rng": dict(record.get("rng", {})),
        },
    )


def _numbered(what: str, values: Sequence[str]) -> dict[str, str]:
    return {f"{what} {number}": str(value) for number, value in enumerate(values, start=1)}
