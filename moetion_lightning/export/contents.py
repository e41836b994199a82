"""What is in an exported checkpoint: Lightning's form, a plain one, and torch's sharded form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from moetion_lightning.core.kept_values import ClassFinder, MissingClassError, Reviver
from moetion_lightning.core.state import state_of
from moetion_lightning.errors import UnsupportedStateError
from moetion_lightning.export.source import Source
from moetion_lightning.export.whole import WholeState
from moetion_lightning.storage.tree import load_tree

__all__ = ["Contents", "contents_of", "sharded_form"]

#: Lightning's loops besides the one that trains: none of them moves meanwhile.
_OTHER_LOOPS = ("validate_loop", "test_loop", "predict_loop")
_REBUILT = ("state_dict", "optimizer_states", "loops")


@dataclass(frozen=True, kw_only=True)
class Contents:
    """A checkpoint that can be written.

    Args:
        checkpoint: What ``torch.save`` writes.
        model: The module's ``state_dict()``.
        optimizers: The optimizers' ``state_dict()``.
        is_lightning: Whether it is in Lightning's form.
        kept: What is in it, in words.
        left_out: What of the training state is not, in words.
    """

    checkpoint: dict[str, Any]
    model: dict[str, Any]
    optimizers: list[dict[str, Any]]
    is_lightning: bool
    kept: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def contents_of(source: Source, state: WholeState) -> Contents:
    """Put the checkpoint together.

    Args:
        source: The restore point.
        state: Its state.

    Raises:
        UnsupportedStateError: A learning-rate scheduler's state cannot be read without the training script.
    """
    adapter = _adapter(source, state)
    model = _state_dict(state, adapter)
    optimizers = [optimizer.state_dict() for optimizer in state.optimizers]
    buffers = sum(name in model for name, _ in state.module.named_buffers())
    names = ", ".join(type(optimizer).__name__ for optimizer in state.optimizers)
    parameters = sum(1 for _ in state.module.parameters())
    kept = [_count(parameters, "parameter"), _count(buffers, "buffer"), f"optimizer state ({names})"]
    left_out = ["the states of random number generators"]
    if "checkpoint" in adapter:
        checkpoint = _lightning(adapter["checkpoint"], model, optimizers, kept, left_out)
        left_out.append(f"where the data loaders stood ({_consumed(source, adapter['data'].get('fetched', 0))})")
        left_out.append("hyper-parameters (give them to load_from_checkpoint)")
        return Contents(
            checkpoint=checkpoint,
            model=checkpoint["state_dict"],
            optimizers=optimizers,
            is_lightning=True,
            kept=kept,
            left_out=left_out,
        )
    plain: dict[str, Any] = {"model": model, "optimizers": optimizers, "iteration": source.iteration}
    stateful = _without_lost(adapter.get("stateful", {}), "the state of", left_out)
    if stateful:
        plain["stateful"] = stateful
        kept.append(f"the state of {', '.join(stateful)}")
    left_out.append("the loop's position in its data")
    return Contents(
        checkpoint=plain, model=model, optimizers=optimizers, is_lightning=False, kept=kept, left_out=left_out
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _consumed(source: Source, fetched: int) -> str:
    """How far training was in its data, in words: whoever begins the epoch anew sees these samples again."""
    ranks = source.first.world_size
    words = f"{fetched} batch{'' if fetched == 1 else 'es'} of the epoch consumed"
    settings = source.first.extra.get("lineage", {}).get("beginning", {}).get("settings", {})
    sizes, batches = settings.get("batch size"), settings.get("batches an epoch")
    if type(sizes) is list and len(sizes) == 1 and type(sizes[0]) is int and batches and fetched != batches[0]:
        words += f", {fetched * sizes[0]} samples"
    return words if ranks == 1 else f"{words} on each of {ranks} ranks"


def _adapter(source: Source, state: WholeState) -> dict[str, Any]:
    """The adapter's part of rank 0's run state; parameters in it are those of the iteration."""
    part = source.parts[0]
    parameters = dict(state.module.named_parameters())
    assert part.manifest.rest is not None  # every restore point has one
    path = part.tier.local_path(part.manifest.file(part.manifest.rest))
    tree = load_tree(path, resolve=lambda reference: parameters[reference[1]].detach())
    adapter: dict[str, Any] = tree["tree"]["adapter"] if part.manifest.policy == "gradient_log" else tree["adapter"]
    return adapter


def _state_dict(state: WholeState, adapter: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(state.module.state_dict())
    for name, value in adapter.get("extra_states", {}).items():
        found[f"{name}._extra_state" if name else "_extra_state"] = _revived(value, f"the extra state of {name!r}")
    return found


def _lightning(
    saved: Mapping[str, Any],
    model: dict[str, Any],
    optimizers: list[dict[str, Any]],
    kept: list[str],
    left_out: list[str],
) -> dict[str, Any]:
    own, shown = dict(saved["own"]), saved["shown"]
    # Where hooks have looked at weights, or a callback has put others in their place: as they have left them.
    given = shown.get("state_dict") or {**model, **own.pop("entries", {})}
    own.pop("entries", None)
    schedulers = _revived(own.pop("lr_schedulers", []), "the state of a learning-rate scheduler")
    callbacks = _without_lost(own.pop("callbacks", {}), "the state of the callback", left_out)
    loops = {**{name: {} for name in _OTHER_LOOPS}, **own.pop("loops")}
    own = _without_lost(own, "the checkpoint's entry", left_out)
    others = {key: value for key, value in shown.items() if key not in (*own, *_REBUILT, "callbacks", "lr_schedulers")}
    others = _without_lost(others, "the checkpoint's entry", left_out)
    kept += [_count(len(schedulers), "learning-rate scheduler"), _count(len(callbacks), "callback")]
    kept.append(f"the loops (epoch {own['epoch']}, global step {own['global_step']})")
    return {
        **others,
        **own,
        "callbacks": callbacks,
        "lr_schedulers": schedulers,
        "loops": loops,
        "state_dict": _revived(given, "the module's state"),
        "optimizer_states": optimizers,
    }


def _revived(value: Any, what: str) -> Any:
    try:
        return Reviver(ClassFinder([])).revive(value)
    except MissingClassError as error:
        raise UnsupportedStateError(
            f"{what} is of a class of the training script ({error}), which an ordinary checkpoint cannot hold. Save "
            "one from the training script."
        ) from error


def _without_lost(values: Mapping[str, Any], what: str, left_out: list[str]) -> dict[str, Any]:
    """The values but for those of users' own classes, which are listed."""
    found = {}
    for key, value in values.items():
        try:
            found[key] = _revived(value, what)
        except UnsupportedStateError:
            left_out.append(f"{what} {key} (of a class of the training script)")
    return found


def sharded_form(source: Source, state: WholeState, contents: Contents) -> dict[str, Any]:
    """Full tensors under the names of parameters, as ``torch.distributed.checkpoint.state_dict`` gives and takes them.

    Args:
        source: The restore point.
        state: Its state.
        contents: What :func:`contents_of` gave.
    """
    names = {id(parameter): name for name, parameter in state.module.named_parameters()}
    kept: dict[str, Any] = {}
    groups = []
    for optimizer in state.optimizers:
        kept |= {names[id(p)]: dict(value) for p, value in state_of(optimizer).items() if isinstance(p, Tensor)}
        for group in optimizer.param_groups:
            groups.append({**group, "params": [names[id(parameter)] for parameter in group["params"]]})
    return {
        "model": contents.model,
        "optimizer": {"state": kept, "param_groups": groups},
        "iteration": source.iteration,
    }
