"""The ``moetion`` command: LightningCLI's own subcommands, and a few of ours.

Nothing heavy is imported here, so that ``moetion --help`` and ``moetion recipes`` answer at once.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from moetion_lightning import __version__
from moetion_lightning.config import report_channel
from moetion_lightning.errors import MoEtionError

__all__ = ["main"]

HELP = """\
usage: moetion COMMAND [ARGUMENTS]

Exact sparse checkpointing and recovery of Mixture-of-Experts training.

training (LightningCLI; every field of trainer, model and data can be given, e.g. --trainer.max_steps 20)
  fit         train; run the same command again after a failure, and it continues
  validate    run the validation loop       test        run the test loop       predict     run prediction
      --config FILE | recipe:NAME           a YAML file, or a packaged recipe; may be given several times
      --print_config                        print the complete configuration and stop
      --trainer.callbacks+=CLASS            add a callback
  Fields of all classes: moetion fit --help; of one: moetion fit --model.help ByteMoE's full class path

any script
  run         a script or module without a change: Lightning, Hugging Face Trainer, Accelerate loops

several processes
  launch      start ranks of a script; a dead one alone is started again, the others keep running
  rendezvous  serve the store of a job of several nodes on a host that does not train

looking
  recipes     list the packaged recipes; `recipes NAME` prints one, `recipes NAME --copy DIR` copies it
  explain     table of operators of recipe:NAME, FILE.yaml or package.module:Class (bytes, tokens, slot)
  plan, simulate  each policy for a model, hardware and failures: bytes, memory, effective training time
  inspect     windows, slots, operators, sizes and ages under a path; verifies checksums
  jobs        jobs whose state is in this machine's memory
  clean       remove what dead jobs left there
  export      an ordinary checkpoint of a restore point, without the training script
  report      one HTML page about a run from its events: time line, failures, effective training time
  demo        train, kill, restart, compare bit for bit; `demo ranks`, `demo pipeline`: one rank, one stage
  drill       the same with your script: does it recover exactly, what differs first, what to change
  diff        the step and tensor in which two recorded runs part; `punish JOB`: kill ranks of a live job

examples
  moetion fit --config recipe:tiny_moe_cpu --trainer.max_steps 20
  moetion fit --config recipe:tiny_moe_cpu --model.init_args.num_experts 16 --print_config > mine.yaml
  moetion explain recipe:qwen3_moe_tiny
  moetion run train.py --my-argument 1
  moetion launch --nproc-per-node 4 --standby 1 train.py --my-argument 1

Each command has its own --help.  moetion --version; moetion completion bash (or zsh, fish) for the shell
"""

TRAINING = ("fit", "validate", "test", "predict")
_OWN = {
    "recipes": ("moetion_lightning.commands.recipes", "recipes"),
    "explain": ("moetion_lightning.commands.explain", "explain"),
    "plan": ("moetion_lightning.commands.plan", "plan"),
    "simulate": ("moetion_lightning.commands.simulate", "simulate"),
    "inspect": ("moetion_lightning.commands.state", "inspect"),
    "jobs": ("moetion_lightning.commands.state", "jobs"),
    "clean": ("moetion_lightning.commands.state", "clean"),
    "export": ("moetion_lightning.commands.export", "export"),
    "report": ("moetion_lightning.commands.report", "report"),
    "demo": ("moetion_lightning.demo", "main"),
    "diff": ("moetion_lightning.commands.diff", "diff"),
    "punish": ("moetion_lightning.commands.punish", "punish"),
    "drill": ("moetion_lightning.commands.drill", "drill"),
    "run": ("moetion_lightning.commands.run", "run"),
    "launch": ("moetion_lightning.commands.launch", "launch"),
    "rendezvous": ("moetion_lightning.commands.launch", "rendezvous"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``moetion``.

    Args:
        argv: Arguments after the program's name; None takes them from ``sys.argv``.

    Returns:
        The exit status: 0 for success, 1 when a command found something wrong, 2 for wrong usage.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if args[0] in ("-V", "--version"):
        print(f"moetion-lightning {__version__}")
        return 0
    command = args[0]
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())  # the user's own modules, as with `python -m`
    try:
        if command == "completion":
            return _complete(args[1:])
        if command in TRAINING or (command.startswith("-") and any(word in TRAINING for word in args)):
            return _train(args)
        if command in _OWN:
            return _own(command)(args[1:])
    except MoEtionError as error:
        if report_channel() is not None:  # a rank: its launcher reads the error, and its exit status
            raise
        print(f"moetion {command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before training, and outside of it; Lightning takes it while it trains
        if report_channel() is not None:
            raise
        print(f"moetion {command}: stopped", file=sys.stderr)
        return 130
    near = difflib.get_close_matches(command, [*TRAINING, *_OWN, "completion"], n=1)
    hint = f" Did you mean `moetion {near[0]}`?" if near else ""
    print(f"moetion: error: unknown command {command!r}.{hint} See moetion --help.", file=sys.stderr)
    return 2


def _own(command: str) -> Callable[[Sequence[str]], int]:
    module, function = _OWN[command]
    found: Callable[[Sequence[str]], int] = getattr(import_module(module), function)
    return found


def _complete(args: list[str]) -> int:
    from moetion_lightning.commands.completion import completion

    return completion(args, {**dict.fromkeys(TRAINING), **{name: _own(name) for name in _OWN}, "completion": None})


def _train(args: list[str]) -> int:
    from moetion_lightning.commands.arguments import expand_recipes

    expanded = expand_recipes(args)  # before the heavy imports: a misspelt recipe is told at once
    from moetion_lightning.commands.train import train

    return train(expanded)
