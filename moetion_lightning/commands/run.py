"""``moetion run``: a script that knows nothing of this package, captured and recovered."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from moetion_lightning.commands.arguments import add_program
from moetion_lightning.config import AUTOMATIC_VARIABLE, automatic_setting, started_rank, update_environment
from moetion_lightning.distributed.rank import execute, frames_of_program
from moetion_lightning.errors import ConfigurationError, MoEtionError

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
_DONE_BEFORE = """\
moetion run: this error came in a part of the script that was done before the restart: its passes over the training
dataloader gave no batches, so code that uses values of their batches (loss.item(), total / n) cannot be repeated. The
windows are kept: without that code the same command continues. Or start anew, with another MOETION_JOB_ID and a loop
over run.steps(...) of run = moetion_lightning.attach(accelerator), which enters no pass that is done.
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

    settings = loop_settings(setting, "--config" if options.config else AUTOMATIC_VARIABLE)
    _check_program(options.script, is_module=options.module)
    if options.record:
        from moetion_lightning.testing.step_recorder import StepRecorder

        StepRecorder(Path(options.record).resolve(), rank=started_rank()).install()
    update_environment({AUTOMATIC_VARIABLE: setting})
    zero_lines = ZeroLines(settings)
    zero_lines.install()
    completed = False
    try:
        execute([options.script, *options.arguments], is_module=options.module)
        completed = True
    except SystemExit as end:
        completed = end.code in (None, 0)
        raise
    except MoEtionError:
        raise
    except Exception:
        _show_as_of_script(_DONE_BEFORE if zero_lines.on_the_way else "")
        raise
    finally:
        zero_lines.finish(completed=completed)
    return 0


def _check_program(script: str, *, is_module: bool) -> None:
    if not is_module:
        if not Path(script).is_file():
            raise ConfigurationError(f"{script!r} is no file; for a module write `moetion run -m MODULE`")
        return
    try:
        found = importlib.util.find_spec(script)
    except (ImportError, ValueError) as error:
        raise ConfigurationError(f"-m {script}: {error}. Give a module that `python -m` runs here.") from error
    if found is None:
        raise ConfigurationError(f"-m {script}: there is no such module. Give one that `python -m` runs here.")


def _show_as_of_script(text: str) -> None:
    """Let the traceback of the error that ends the process begin in the script, and say something after it."""
    show = sys.excepthook

    def show_and_say(kind: type[BaseException], error: BaseException, frames: TracebackType | None) -> None:
        sys.excepthook = show
        # Of a script that cannot be parsed no line has run.
        error.__traceback__ = None if isinstance(error, SyntaxError) else frames_of_program(frames)
        show(kind, error, error.__traceback__)
        sys.stderr.write(text)

    sys.excepthook = show_and_say


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moetion run",
        usage="moetion run [--config NAME] [--record DIR] SCRIPT [ARGUMENTS]\n"
        "       moetion run [--config NAME] [--record DIR] -m MODULE [ARGUMENTS]",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        metavar="NAME",
        help="a recipe, or a YAML file with trainer.callbacks or callbacks (default: MOETION, else default settings)",
    )
    parser.add_argument(
        "--record",
        metavar="DIR",
        help="write down losses, inputs and digests of all tensors of every step, for `moetion diff`",
    )
    add_program(parser, "what to run")
    return parser
