"""``moetion run``: a script that knows nothing of this package, captured and recovered."""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from moetion_lightning.config import AUTOMATIC_VARIABLE, automatic_setting, update_environment
from moetion_lightning.errors import ConfigurationError

__all__ = ["run"]

_DESCRIPTION = """\
Run a training script without changing a line of it. After a failure, the same command continues it.

  Lightning      every Trainer gets the callbacks, as with MOETION=... set for the script
  Hugging Face   every Trainer gets MoEtionTrainerCallback
  Accelerate     the loop over the prepared dataloader in which the optimizer steps is captured

Models, optimizers, schedulers, random numbers and data come back bit for bit. The variables of a hand-written loop do
not: a loop that decides by counters of its own continues exactly only with moetion_lightning.integrations.attach().
Several processes: torchrun --nproc-per-node 2 -m moetion_lightning run train.py, or accelerate launch -m likewise.
"""


def run(args: Sequence[str]) -> int:
    """Run a script, or a module, as Python would.

    Args:
        args: Arguments after ``moetion run``.

    Returns:
        0; what the script raises, ``SystemExit`` too, goes on.
    """
    options = _parser().parse_args(args)
    setting = options.config or automatic_setting() or "default"
    if Path(setting).is_file():
        setting = str(Path(setting).resolve())  # the script may change the directory
    from moetion_lightning.commands.automatic import loop_settings
    from moetion_lightning.integrations.zero_lines import ZeroLines

    try:
        settings = loop_settings(setting)
        if not options.module and not Path(options.script).is_file():
            raise ConfigurationError(f"{options.script!r} is no file; for a module write `moetion run -m MODULE`")
    except ConfigurationError as error:
        print(f"moetion run: error: {error}", file=sys.stderr)
        return 2
    update_environment({AUTOMATIC_VARIABLE: setting})
    zero_lines = ZeroLines(settings)
    zero_lines.install()
    completed = False
    try:
        _execute(options.script, options.arguments, is_module=options.module)
        completed = True
    except SystemExit as end:
        completed = end.code in (None, 0)
        raise
    finally:
        zero_lines.finish(completed=completed)
    return 0


def _execute(script: str, arguments: Sequence[str], *, is_module: bool) -> None:
    sys.argv = [script, *arguments]
    if is_module:
        sys.path[0] = str(Path.cwd())
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(script).resolve().parent)
        runpy.run_path(script, run_name="__main__")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moetion run",
        usage="moetion run [--config NAME] SCRIPT [ARGUMENTS]\n"
        "       moetion run [--config NAME] -m MODULE [ARGUMENTS]",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        metavar="NAME",
        help="a recipe, or a YAML file with trainer.callbacks or callbacks (default: MOETION, else default settings)",
    )
    parser.add_argument("-m", "--module", action="store_true", help="SCRIPT is a module, as for python -m")
    parser.add_argument("script", metavar="SCRIPT", help="what to run")
    parser.add_argument("arguments", metavar="ARGUMENTS", nargs=argparse.REMAINDER, help="its arguments")
    return parser
