"""A process that has imported everything once and forks the ranks of each run.

Protocol: one JSON line in (``{"specs": [...], "logs": [...], "envs": [...], "timeout_seconds": s}``, an item for each
rank), one JSON line out when all have ended (the fields of :class:`tests.runs.ranks.Ended`). A rank is a process of
its own with its own pid; killing it is a real SIGKILL. ``runner`` in a spec names the module whose ``run(spec)`` it is.
A process that is only started (``{"start": spec, "log": ..., "env": {...}}``) is answered with its pid at once; how it
ended (``{"reap": pid}``) with its exit status, or null while it runs.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import signal
import sys
from dataclasses import asdict
from typing import Any

from tests.runs.ranks import Group

_PR_SET_PDEATHSIG = 1


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    libc = ctypes.CDLL(None)
    import lightning.pytorch  # noqa: F401
    import numpy.ctypeslib  # noqa: F401
    import torch
    import torch.distributed.algorithms.ddp_comm_hooks
    import torch.distributed.fsdp

    import moetion_lightning.callbacks
    import moetion_lightning.commands.automatic  # what a replacement imports
    import moetion_lightning.distributed.launch  # noqa: F401
    from moetion_lightning.distributed import groups
    from tests.runs import scenario
    from tests.runs.forked import leave

    torch.set_num_threads(1)

    def fork(spec: dict[str, Any], log: str, environment: dict[str, str]) -> int:
        runner = importlib.import_module(spec.get("runner", scenario.__name__))
        gc.freeze()  # what is imported stays: a rank's collector need not look at it, nor copy its pages
        pid = os.fork()
        if pid:
            os.setpgid(pid, pid)
            return pid

        def work() -> None:
            os.setpgid(0, 0)
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # no rank outlives this process
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os.environ.update(environment)
            groups.install()
            runner.run(spec)

        leave(work)

    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            print(fork(request["start"], request["log"], request["env"]), file=answers, flush=True)
            continue
        if "reap" in request:
            pid, status = os.waitpid(request["reap"], os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if pid else None
            print(json.dumps(code), file=answers, flush=True)
            continue
        if "elastic" in request:
            from tests.runs.elastic import run_elastic

            ended, history = run_elastic(
                fork, request["elastic"], request["logs"], restarts=request["restarts"],
                timeout_seconds=request["timeout_seconds"], control=sys.stdin.fileno(),
            )  # fmt: skip
            print(json.dumps({**asdict(ended), "pids": history}), file=answers, flush=True)
            continue
        pids = [fork(*rank) for rank in zip(request["specs"], request["logs"], request["envs"], strict=True)]
        ended = Group(pids, sys.stdin.fileno()).wait(request["timeout_seconds"])
        print(json.dumps(asdict(ended)), file=answers, flush=True)


if __name__ == "__main__":
    main()
