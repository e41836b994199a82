"""Runs a script that knows nothing of this package: as it is, or by ``moetion run``. Runs in a child process.

The process is killed from outside of the script and of the package: at an optimizer step, or at a forward in eval mode.
"""

from __future__ import annotations

import itertools
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
callbacks:
  - class_path: moetion_lightning.callbacks.SparseExpertCheckpoint
    init_args:
      window: {window}
      memory_dir: {memory_dir}
      job_id: job
      events_path: {out}/events.jsonl
"""


def _arm(kill: dict[str, Any]) -> None:
    counts = {name: itertools.count(1) for name in ("step", "eval")}

    def die(name: str) -> None:
        if next(counts[name]) == kill.get(name):
            os.kill(os.getpid(), signal.SIGKILL)

    def forwarded(module: torch.nn.Module, *args: Any) -> None:
        if not module.training and type(module).__name__.endswith("ByteModel"):
            die("eval")

    register_optimizer_step_post_hook(lambda *args: die("step"))
    torch.nn.modules.module.register_module_forward_hook(forwarded)


def run(spec: dict[str, Any]) -> None:
    """The script; rank 0 serves the store, and ends last: others may need it while they leave the group."""
    out, ranks = Path(spec["out"]), spec.get("ranks", 1)
    _run(spec, out)
    (out / f"ended-{os.environ.get('RANK', '0')}").touch()
    while os.environ.get("RANK") == "0" and len(list(out.glob("ended-*"))) < ranks:
        time.sleep(0.01)


def _run(spec: dict[str, Any], out: Path) -> None:
    script = str(ROOT / spec["script"])
    arguments = [*spec.get("arguments", ()), "--output_dir", str(out / "output")]
    kill = spec.get("kill")
    if kill and kill.get("rank", 0) == int(os.environ.get("RANK", "0")):
        _arm(kill)
    if not spec.get("capture", True):
        sys.argv = [script, *arguments]
        runpy.run_path(script, run_name="__main__")
        return
    from moetion_lightning.cli import main

    config = out / "moetion.yaml"
    own = out / f"{config.name}.{os.getpid()}"
    own.write_text(CONFIG.format(window=4, **spec))
    own.replace(config)  # other ranks read it
    if spec.get("by_environment"):
        os.environ["MOETION"] = str(config)
        sys.argv = [script, *arguments]
        runpy.run_path(script, run_name="__main__")
        return
    assert main(["run", "--config", str(config), script, *arguments]) == 0
