"""``moetion fit | validate | test | predict``: LightningCLI, with users' own classes or a recipe."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from moetion_lightning.config import launched_devices
from moetion_lightning.errors import ConfigurationError, MoEtionError

__all__ = ["OneLineCLI", "SaveConfig", "ignore_deprecations", "program_arguments", "told_errors", "train"]


class SaveConfig(SaveConfigCallback):
    """Saves the complete configuration beside the logs of a run.

    Only where the run has a log folder of its own: without one Lightning would write ``config.yaml`` into the current
    directory, perhaps over the user's own. In the run's folder it is written again at a restart.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save, if there is a folder for it."""
        if trainer.loggers and isinstance(trainer.loggers[0], (CSVLogger, TensorBoardLogger)):
            super().setup(trainer, pl_module, stage)


def train(args: Sequence[str]) -> int:
    """Run LightningCLI.

    Args:
        args: Subcommand and arguments, recipes already replaced by paths.

    Returns:
        0; LightningCLI itself leaves by ``SystemExit(2)`` for wrong arguments.
    """
    ignore_deprecations()
    with program_arguments([*args, *_devices(args)]), told_errors():
        OneLineCLI(save_config_callback=SaveConfig, save_config_kwargs={"overwrite": True})
    return 0


def ignore_deprecations() -> None:
    """Lightning's own calls of interfaces that others have deprecated: nothing that a user could change."""
    for module in (r"lightning\.pytorch\.cli", r"lightning\.pytorch\.utilities\._pytree"):
        warnings.filterwarnings("ignore", module=module)


@contextmanager
def told_errors() -> Iterator[None]:
    """What a user can put right becomes an error of ours, which the command tells in one line.

    Lightning's own exception for users is one, and an error of ours in which classes were made: jsonargparse gives it
    as the cause of what it raises about all forms that it tried.
    """
    try:
        yield
    except MoEtionError:
        raise
    except Exception as error:
        found: BaseException | None = error
        while found is not None and not isinstance(found, (MoEtionError, MisconfigurationException)):
            found = found.__cause__ or found.__context__
        if found is None:
            raise
        raise ConfigurationError(" ".join(str(found).split())) from error


class OneLineCLI(LightningCLI):
    """Tells a wrong argument in one line."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """See LightningCLI."""
        parser = super().init_parser(**kwargs)
        parser.error = functools.partial(_tell, parser)  # type: ignore[method-assign]
        return parser


def _tell(parser: LightningArgumentParser, message: str, ex: Exception | None = None) -> NoReturn:
    if not parser.exit_on_error:  # one of several forms that are tried
        type(parser).error(parser, message, ex)
    words = " ".join(message.split())
    print(f"moetion: error: {words}{'' if words.endswith('.') else '.'} See `moetion fit --help`.", file=sys.stderr)
    raise SystemExit(2)


def _devices(args: Sequence[str]) -> list[str]:
    """Under a launcher: as many devices as it started processes, unless the command line says something else."""
    launched = launched_devices()
    if launched is None or any(arg.startswith(("--trainer.devices", "--trainer.num_nodes")) for arg in args):
        return []
    return ["--trainer.devices", str(launched[0]), "--trainer.num_nodes", str(launched[1])]


@contextmanager
def program_arguments(args: Sequence[str]) -> Iterator[None]:
    """Make these the program's arguments for a while.

    LightningCLI warns when it gets ``args`` while the program has arguments of its own. Strategies that start their
    ranks themselves run the same program again: its path stays where it is the ``moetion`` command.
    """
    before = sys.argv
    sys.argv = [before[0] if Path(before[0]).name == "moetion" else "moetion", *args]
    try:
        yield
    finally:
        sys.argv = before
