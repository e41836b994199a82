"""A process that has imported everything once and forks a child for each run.

Protocol: one JSON line in (``{"spec": ..., "log": path}``), one JSON line out (the child's exit status; negative:
killed by that signal). A child is a process of its own with its own pid; killing it is a real SIGKILL.
"""

from __future__ import annotations

import json
import os
import sys
import traceback


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    import lightning.pytorch  # noqa: F401
    import torch

    import moetion_lightning.callbacks  # noqa: F401
    from tests.runs import scenario

    torch.set_num_threads(1)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(log, 1)
            os.dup2(log, 2)
            try:
                scenario.run(request["spec"])
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), file=answers, flush=True)


if __name__ == "__main__":
    main()
