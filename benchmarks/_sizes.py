"""Command-line arguments of the model's sizes. Imports nothing heavy, so that ``--help`` is quick."""

from __future__ import annotations

import argparse

__all__ = ["add_model_arguments", "fill_medium", "model_argv", "sizes"]

_SIZES = {"d_model": 512, "d_expert": 1600, "num_layers": 4, "num_experts": 8, "top_k": 2, "seq_len": 64, "batch": 8}
_MEDIUM = {"d_model": 256, "d_expert": 800}
_SMALL = {"d_model": 128, "d_expert": 256, "num_layers": 2, "num_experts": 8, "top_k": 2, "seq_len": 32, "batch": 4}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes as arguments; those not given come from the default (about 57 M parameters) or from ``--small``."""
    group = parser.add_argument_group("model")
    group.add_argument("--small", action="store_true", help="a 1.3 M parameter model for a quick look")
    group.add_argument(
        "--experts", choices=("list", "fused"), default="list", help="ModuleList, or Qwen3-MoE's fused 3-D parameters"
    )
    for name, value in _SIZES.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"default {value}; --small: {_SMALL[name]}")
    group.add_argument(
        "--threads", type=int, default=1, help="torch's intra-op threads (1 leaves the other cores to the background)"
    )


def fill_medium(args: argparse.Namespace) -> argparse.Namespace:
    """For benchmarks with several ranks on one machine: about 14 M parameters where nothing else was asked for."""
    for name, value in _MEDIUM.items():
        if not args.small and getattr(args, name) is None:
            setattr(args, name, value)
    return args


def model_argv(args: argparse.Namespace) -> list[str]:
    """The same choice as command-line arguments, for a child process."""
    argv = ["--experts", args.experts, "--threads", str(args.threads), *(["--small"] if args.small else [])]
    for name in _SIZES:
        if getattr(args, name) is not None:
            argv += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    return argv


def sizes(args: argparse.Namespace) -> dict[str, int]:
    """The sizes in force."""
    default = _SMALL if args.small else _SIZES
    return {name: default[name] if getattr(args, name) is None else getattr(args, name) for name in default}
