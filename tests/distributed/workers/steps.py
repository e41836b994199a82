"""A rank that counts steps together with the others, and rebuilds its group after a loss.

usage: steps.py FOLDER STEPS

Writes FOLDER/RANK.pids (one line for each process that had the rank) and FOLDER/RANK.step (`step pid`). The step
counter of the survivors goes on; a replacement takes theirs. The last step is counted when FOLDER/go exists.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from moetion_lightning.config import LaunchedProcess, launched_process
from moetion_lightning.distributed.control import StoreControl
from moetion_lightning.distributed.membership import Membership, StoreMembership
from moetion_lightning.errors import RankLostError

_TIMEOUT = timedelta(seconds=12)
_SECONDS = 0.02


def _write(path: Path, text: str) -> None:
    path.with_suffix(".tmp").write_text(text)
    path.with_suffix(".tmp").rename(path)


def _build(membership: Membership, process: LaunchedProcess) -> dist.ProcessGroup:
    prefix = f"moetion/pg/{membership.generation}"
    own = membership.store()
    # gloo would wait for a rank that is lost again; this looks.
    control = StoreControl(own, membership.rank, membership.world_size, scope=prefix, check=membership.check)
    membership.watch(lambda newest: control.interrupt())
    control.all_gather("build", membership.rank)
    store = dist.PrefixStore(prefix, own.torch_store(_TIMEOUT.total_seconds()))
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=process.local_address, lazy_init=False)]
    options._timeout = _TIMEOUT
    return dist.ProcessGroupGloo(store, membership.rank, membership.world_size, options)


def _together(group: dist.ProcessGroup, value: int, operation: dist.ReduceOp) -> int:
    options = dist.AllreduceOptions()
    options.reduceOp = operation
    tensor = torch.tensor([value])
    group.allreduce([tensor], options).wait()
    return int(tensor)


def _lightning_rank() -> int | None:
    """The rank that Lightning goes by, if it was imported."""
    module = sys.modules.get("lightning_utilities.core.rank_zero")
    return None if module is None else module.rank_zero_only.rank


def main() -> None:
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    process = launched_process()
    assert process is not None
    membership = StoreMembership(process)
    rank = membership.rank
    seen = {
        "pid": os.getpid(),
        "started_in": process.generation,
        "rng_untouched": torch.equal(
            torch.get_rng_state(), torch.Generator().manual_seed(torch.initial_seed()).get_state()
        ),
        "lightning_rank": _lightning_rank(),
        "cuda": torch.cuda.is_initialized(),
        "threads": torch.get_num_threads(),
        "env": {k: v for k, v in os.environ.items() if k.startswith(("MOETION", "TORCHELASTIC", "MASTER", "GROUP"))},
        "argv": sys.argv,
        "stdin": sys.stdin.read(),
        "losses": [rank for record in membership._records for rank in record.lost] or None,
    }
    with (folder / f"{rank}.pids").open("a") as file:
        file.write(json.dumps(seen) + "\n")
    step = 0
    group = None
    while step < steps:
        try:
            membership.check()
            if group is None:
                group = _build(membership, process)
                step = _together(group, step, dist.ReduceOp.MAX)
            membership.check()
            go = _together(group, int((folder / "go").exists()), dist.ReduceOp.MIN)
            time.sleep(_SECONDS)
            if go or step < steps - 1:
                step += 1
                _write(folder / f"{rank}.step", f"{step} {os.getpid()}")
        except (RankLostError, RuntimeError) as error:
            group = None
            if not membership.lost(15.0):
                raise
            try:
                membership.advance()
            except RankLostError:
                raise error from None
    membership.close()


if __name__ == "__main__":
    main()
