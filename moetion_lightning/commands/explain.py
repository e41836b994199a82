"""``moetion explain``: the table of operators of a recipe, a YAML file, or any importable module.

A recipe or YAML file is really run for a few optimizer steps, without any of its callbacks and loggers, so that tokens,
optimizer state, the dtypes that the forward consumes and the time of an iteration are observed; the window is the one
that its callback's policy begins with here. Of a pipeline the table shows the whole module, and which stage would hold
what. A bare module is looked at as it is.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moetion_lightning.commands.explain_tables import explanation_as_json, explanation_tables
from moetion_lightning.commands.tables import add_json, print_json, show
from moetion_lightning.config import OF_THE_WINDOW, EngineConfig
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.recipes import PREFIX, recipe_path

if TYPE_CHECKING:
    from torch import nn

    from moetion_lightning.commands.stages import StageTable
    from moetion_lightning.core.explain import Explanation
    from moetion_lightning.core.policy import SparsePolicy

__all__ = ["explain", "load_module", "observe_recipe"]

_LEFT_OUT = (
    *("strategy", "num_nodes", "callbacks", "logger", "profiler"),
    *("limit_val_batches", "max_epochs", "max_time", "val_check_interval"),
)


def explain(args: Sequence[str]) -> int:
    """Print the table.

    Args:
        args: Arguments after ``moetion explain``.
    """
    parser = argparse.ArgumentParser(
        prog="moetion explain",
        description="Table of operators: kind, bytes in full and compute-only, tokens, slot of the window.",
        epilog="Further arguments override fields of a recipe or file, e.g. --model.init_args.num_experts 16",
    )
    parser.add_argument("target", help="recipe:NAME, FILE.yaml, or package.module:ClassOrFactory")
    parser.add_argument("--init", metavar="JSON", help="arguments of an importable class or factory")
    parser.add_argument("--meta", action="store_true", help="build an importable module without memory (meta device)")
    parser.add_argument(
        "--window", type=_window, help='iterations of a window, or "auto" (else: the callback\'s; or 4)'
    )
    parser.add_argument("--mtbf", type=float, help="seconds between two failures, for auto (else: the callback's)")
    parser.add_argument("--iteration-seconds", type=float, help="of an importable module, for auto")
    parser.add_argument("--all", action="store_true", help="one line for each operator, however many there are")
    add_json(parser)
    options, overrides = parser.parse_known_args(args)

    target: str = options.target
    stages: StageTable | None = None
    if target.startswith(PREFIX) or target.endswith((".yaml", ".yml")):
        if options.init is not None or options.meta or options.iteration_seconds is not None:
            parser.error(
                "--init, --meta and --iteration-seconds are for an importable class or factory; override a field of a "
                "recipe or file by its name, e.g. --model.init_args.num_experts 16"
            )
        path = recipe_path(target) if target.startswith(PREFIX) else Path(target)
        if not path.is_file():
            raise ConfigurationError(f"no such file: {path}")
        result, module, pipeline = observe_recipe(path, overrides, window=options.window, mtbf=options.mtbf)
        if pipeline is not None:
            from moetion_lightning.commands.stages import describe_stages

            stages = describe_stages(module, pipeline, result.rows)
    else:
        if overrides:
            parser.error(f"unrecognized arguments: {' '.join(overrides)} (arguments of a class go into --init)")
        if options.window == "auto" and options.iteration_seconds is None:
            parser.error("--window auto needs --iteration-seconds: an importable module is not trained here")
        init = "{}" if options.init is None else options.init
        module = load_module(target, init, meta=options.meta)
        result = _explain_module(module, options.window or 4, options.mtbf, options.iteration_seconds or 0.0)
    if options.json:
        print_json({**explanation_as_json(result), **({"pipeline": stages.as_json()} if stages else {})})
        return 0
    show(*explanation_tables(result, max_rows=None if options.all else 60), *(stages.parts() if stages else ()))
    return 0


def _window(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r}: expected a number of iterations >= 1, or "auto"')
    return int(text)


def _policy(given: Mapping[str, Any], window: int | Literal["auto"] | None, mtbf: float | None) -> SparsePolicy:
    """The policy of a callback's settings, but for what the command line says."""
    from moetion_lightning.core.policy import SparsePolicy

    said = {"window": window, "mtbf": mtbf}
    config = EngineConfig(**{**given, **{name: value for name, value in said.items() if value is not None}})
    return SparsePolicy(config.window, config.max_window, config.overlap_target, config.mtbf)


def _explain_module(
    module: nn.Module, window: int | Literal["auto"], mtbf: float | None, iteration_seconds: float
) -> Explanation:
    import torch

    from moetion_lightning.capture.thread import measure_bandwidth
    from moetion_lightning.core.explain import explain as explain_module

    return explain_module(
        module,
        policy=_policy({}, window, mtbf),
        iteration_seconds=iteration_seconds,
        bytes_per_second=measure_bandwidth(torch.device("cpu")),
    )


def load_module(target: str, init: str = "{}", *, meta: bool = False) -> nn.Module:
    """Import and build a module.

    Args:
        target: ``"package.module:Name"``; the name is a class, a factory, or a module that exists already. The current
            directory is searched too.
        init: Keyword arguments as JSON.
        meta: Build on the meta device, without memory.

    Raises:
        ConfigurationError: It cannot be imported, built, or is no ``torch.nn.Module``.
    """
    import torch
    from torch import nn

    module_name, colon, attribute = target.partition(":")
    if not colon or not module_name or not attribute:
        raise ConfigurationError(f"{target!r}: expected recipe:NAME, FILE.yaml or package.module:ClassOrFactory")
    try:
        arguments = json.loads(init)
    except json.JSONDecodeError as error:
        raise ConfigurationError(f"--init {init!r} is no JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise ConfigurationError(f"--init {init!r}: expected a JSON object of keyword arguments")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"cannot import {target!r}: {error}") from error
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise ConfigurationError(f"{target!r} is a {type(found).__name__}; expected a module or a factory")
        with torch.device("meta" if meta else "cpu"):
            try:
                found = found(**arguments)
            except TypeError as error:
                raise ConfigurationError(f"{target}(**{init}) failed: {error}; give --init") from error
    if not isinstance(found, nn.Module):
        raise ConfigurationError(f"{target!r} made a {type(found).__name__}; expected a torch.nn.Module")
    return found


def observe_recipe(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    window: int | Literal["auto"] | None = None,
    mtbf: float | None = None,
) -> tuple[Explanation, nn.Module, Mapping[str, Any] | None]:
    """Run a few optimizer steps of a configuration and explain the model that it trained.

    Args:
        path: A LightningCLI configuration of ``fit``. Its strategy, callbacks, loggers and limits are left out: it runs
            in this process alone.
        overrides: Further command-line arguments.
        window: Iterations of the window; None: as its SparseExpertCheckpoint says.
        mtbf: Seconds between two failures; None: the same.

    Returns:
        Its operators, the module that was trained, and the arguments of its strategy, if that is a pipeline.

    Raises:
        ConfigurationError: It cannot be read, or configures no model.
    """
    import yaml

    from moetion_lightning.commands.observer import OperatorObserver
    from moetion_lightning.commands.train import OneLineCLI, ignore_deprecations, program_arguments, told_errors

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(
            f"{path} cannot be read as YAML: {error}. Correct it, or give another file."
        ) from error
    if not isinstance(config, dict) or "model" not in config:
        raise ConfigurationError(f"{path} has no `model:`; expected a configuration of `moetion fit`")
    config.pop("ckpt_path", None)
    trainer = config["trainer"] = dict(config.get("trainer") or {})
    strategy = trainer.get("strategy")
    policy = _policy(_window_settings(trainer.get("callbacks")), window, mtbf)
    for key in _LEFT_OUT:
        trainer.pop(key, None)
    observer = OperatorObserver(policy)
    with tempfile.TemporaryDirectory(prefix="moetion-explain-") as folder:
        trainer.update(
            max_steps=OperatorObserver.STEPS,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            default_root_dir=folder,
            logger=False,
        )
        trainer.update(devices=1, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
        stripped = Path(folder, "config.yaml")
        stripped.write_text(yaml.safe_dump(config), encoding="utf-8")
        ignore_deprecations()
        with _quiet(), program_arguments(["--config", str(stripped), *overrides]), told_errors():
            cli = OneLineCLI(run=False, save_config_callback=None, trainer_defaults={"callbacks": [observer]})
            cli.trainer.fit(cli.model, cli.datamodule)
    return observer.explanation, cli.model, _pipeline(strategy)


def _window_settings(callbacks: Any) -> Mapping[str, Any]:
    """Settings of the window, as a configuration's callback has them."""
    kinds = ("SparseExpertCheckpoint", "GradientLogCheckpoint")
    for entry in callbacks if isinstance(callbacks, list) else [callbacks]:
        if isinstance(entry, Mapping) and str(entry.get("class_path", "")).endswith(kinds):
            given = entry.get("init_args") or {}
            return {name: given[name] for name in OF_THE_WINDOW if name in given}
    return {}


def _pipeline(strategy: Any) -> Mapping[str, Any] | None:
    """Arguments of a strategy, as a configuration names it, if it is a pipeline."""
    if not isinstance(strategy, Mapping):
        return None
    given = strategy.get("init_args") or {}
    return given if given.get("pipeline_parallel_size", 1) > 1 else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning's announcements of a run would only hide the table."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
