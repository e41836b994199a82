"""Writes down what every optimizer step of a process did, whatever trainer or loop makes it.

Nothing of the script is changed: losses are seen where ``backward`` is called, what the model is given at the first
call of a module, and the state behind each step of an optimizer. A step's number counts optimizer steps from the
beginning of training, also in a process that continues: it looks up where the restored iteration had been.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from moetion_lightning.core.digests import bytes_of, digest_of, rng_digests
from moetion_lightning.events import (
    Event,
    IterationFinished,
    LastIterationFinished,
    ProcessStarted,
    ReplayIteration,
    RestoreApplied,
    RestoreStarted,
    StateRebuilt,
    WindowCommitted,
    listen,
)
from moetion_lightning.pipeline.hollow import is_hollow
from moetion_lightning.testing.compare import flatten_state
from moetion_lightning.testing.records import read_recording, step_of_iteration

__all__ = ["StepRecorder"]

_WRAPPERS = ("DistributedDataParallel", "OptimizedModule")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class StepRecorder:
    """Records this process's training into a folder, a file a process.

    Args:
        folder: Where; several ranks, and all starts of a run, write into the same.
        rank: Global rank of this process.
        steps: End the process in good order behind so many optimizer steps; 0: it ends by itself.
        every: Record all tensors at each so many steps (losses, inputs and settings at each one).
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        rank: int = 0,
        steps: int = 0,
        every: int = 1,
    ) -> None:
        self._folder = Path(folder)
        self._rank = rank
        self._steps = steps
        self._every = every
        #: Called with the number of each step and its optimizer, before it is written.
        self.stepped: Callable[[int, Optimizer], None] = lambda step, optimizer: None
        self._fd = -1
        self._undo: list[Callable[[], None]] = []
        #: Optimizer steps of the training so far.
        self.step = 0
        #: Whether a state was committed to which a restart can go back.
        self.committed = False
        self._fit = 0  # of the script, from 1: each one counts its iterations anew
        self._restoring = False
        self._replay = 0  # iterations that are still to be replayed
        self._losses: list[str] = []
        self._inputs: list[str] = []
        self._wants_inputs = True
        self._backwards = 0  # since the state was restored
        self._counted: dict[int, int] = {}  # by optimizer, the backward behind which it stepped last
        self._optimizers: list[Optimizer] = []
        self._module: nn.Module | None = None
        self._is_stage = False

    def install(self) -> None:
        """Begin to record: before the script runs."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self.committed = any(rank.committed for rank in read_recording(self._folder).ranks.values())
        path = self._folder / f"rank-{self._rank:05d}-{time.time_ns()}.jsonl"
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._write("start", pid=os.getpid(), time=time.time())
        self._undo = [listen(self._heard), register_optimizer_step_post_hook(self._after_step).remove]
        self._put(torch.autograd, "backward", self._watched_backward)
        self._put(nn.Module, "__call__", self._watched_call)

    def remove(self) -> None:
        """Leave everything as it was."""
        while self._undo:
            self._undo.pop()()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    # --- what is watched -----------------------------------------------------------------------------------------

    def _put(self, owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
        original = getattr(owner, name)
        setattr(owner, name, functools.wraps(original)(wrap(original)))
        self._undo.append(lambda: setattr(owner, name, original))

    def _watched_backward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            roots = (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)  # of a stage: what it puts out
            if len(roots) == 1 and roots[0].numel() == 1:
                self._losses.append(float(roots[0].detach()).hex())
            tensors = roots
            self._wants_inputs = False
            self._backwards += 1
            try:
                return original(tensors, *args, **kwargs)
            finally:
                self._wants_inputs = True

        return backward

    def _watched_call(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def __call__(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self._wants_inputs and torch.is_grad_enabled():
                tensors = _tensors_in((args, kwargs))
                self._wants_inputs = not tensors
                self._inputs += [digest_of(tensors).read()] if tensors else []
            return original(module, *args, **kwargs)

        return __call__

    def _heard(self, event: Event) -> None:
        if isinstance(event, ProcessStarted):
            self._fit += 1
        elif isinstance(event, (IterationFinished, LastIterationFinished)):
            self._write("iteration", fit=self._fit, iteration=event.iteration, step=self.step)
        elif isinstance(event, (WindowCommitted, StateRebuilt)) and not self.committed:
            self.committed = True
            self._write("committed")
        if isinstance(event, RestoreStarted):
            self._restoring = True
            self._write("found", tier=event.tier)
        elif isinstance(event, (RestoreApplied, StateRebuilt)):
            self._continue_after(event.iteration, event.replay if isinstance(event, RestoreApplied) else 0)
        elif isinstance(event, ReplayIteration):
            self._replay = max(0, self._replay - 1)

    def _continue_after(self, iteration: int, replay: int) -> None:
        self._restoring, self._replay = False, replay
        self._backwards, self._counted = 0, {}
        self._losses, self._inputs, self._wants_inputs = [], [], True
        self.step = step_of_iteration(self._folder, self._rank, self._fit, iteration)
        self._write("restored", iteration=iteration, step=self.step, replay=replay)

    # --- a step --------------------------------------------------------------------------------------------------

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # Steps without a backward are none of the training: a gradient log is rebuilt by them.
        if self._restoring or self._counted.get(id(optimizer), 0) >= self._backwards:
            return
        self._counted[id(optimizer)] = self._backwards
        self.step += 1
        self.stepped(self.step, optimizer)
        if not any(optimizer is known for known in self._optimizers):
            self._optimizers.append(optimizer)
            if self._module is None or not _parameters_of([optimizer]) <= {id(p) for p in self._module.parameters()}:
                self._module = _module_of(self._optimizers)
            # What a stage of a pipeline calls first follows from the schedule, and is no batch.
            self._is_stage = any(is_hollow(parameter) for parameter in self._module.parameters())
        last = self._steps > 0 and self.step >= self._steps
        self._write(
            "step",
            step=self.step,
            replay=self._replay > 0,
            losses=self._losses,
            inputs=[] if self._is_stage else self._inputs,
            rng=rng_digests(),
            **self._state(whole=self._replay == 0 and (last or self.step % self._every == 0)),
        )
        self._losses, self._inputs, self._wants_inputs = [], [], True
        if last:
            self._write("end", step=self.step)
            raise SystemExit(0)

    def _state(self, *, whole: bool) -> dict[str, Any]:
        assert self._module is not None
        tensors, scalars = flatten_state(self._module, self._optimizers)
        settings = {name: value for name, value in scalars.items() if ":group" in name}
        if not whole:
            return {"settings": settings}
        values = {name: _describe(tensor) for name, tensor in tensors.items()}
        values |= {name: [str(value), ""] for name, value in scalars.items() if name not in settings}
        return {"settings": settings, "tensors": values}

    def _write(self, kind: str, **fields: Any) -> None:
        if self._fd >= 0:
            os.write(self._fd, (json.dumps({"kind": kind, **fields}) + "\n").encode())


def _tensors_in(value: Any) -> list[Tensor]:
    """Tensors in plain containers: objects beside them may hold anything, a process id too."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in items for tensor in _tensors_in(item)]


def _describe(tensor: Tensor) -> list[str]:
    """A digest of all its bytes, and its norm for the eye."""
    tensor = tensor.detach()
    digest = xxhash.xxh3_64(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    if tensor.numel():
        digest.update(bytes_of(tensor))
    norm = f"{float(torch.linalg.vector_norm(tensor, dtype=torch.float64)):.12g}" if tensor.dtype in _FLOATS else ""
    return [digest.hexdigest(), norm]


def _parameters_of(optimizers: list[Optimizer]) -> set[int]:
    return {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def _module_of(optimizers: list[Optimizer]) -> nn.Module:
    """The outermost module that holds what the optimizers change, without wrappers; its names are the user's."""
    wanted = _parameters_of(optimizers)
    best: tuple[int, int] = (0, 0)
    found: nn.Module | None = None
    for candidate in gc.get_objects():
        kind = type(candidate)
        if not issubclass(kind, nn.Module) or kind.__name__ in _WRAPPERS or "_modules" not in vars(candidate):
            continue
        held = sum(id(p) in wanted for p in candidate.parameters())
        size = (held, sum(1 for _ in candidate.modules()))
        if held and size > best:
            best, found = size, candidate
    if found is None or best[0] < len(wanted):
        return _nameless(optimizers)
    return found


def _nameless(optimizers: list[Optimizer]) -> nn.Module:
    """A stand-in where no module holds them all: parameters are named by their place."""
    module = nn.Module()
    for index, optimizer in enumerate(optimizers):
        for number, group in enumerate(optimizer.param_groups):
            for place, parameter in enumerate(group["params"]):
                module.register_parameter(f"{index}_{number}_{place}", parameter)
    return module
