"""Calls of a module's layers are seen without changing the module: each layer gets a class with another `__call__`."""

from __future__ import annotations

import copyreg
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.pipeline.cut_plan import CutPlan
from moetion_lightning.pipeline.evaluation import EvalCalls, EvalMessage
from moetion_lightning.pipeline.layer_calls import Cut, LayerCalls
from moetion_lightning.pipeline.layer_list import LayerList
from moetion_lightning.pipeline.seeding import LayerSeeds
from moetion_lightning.pipeline.specs import LayerSpec
from moetion_lightning.pipeline.stage_run import StageCalls, StageRun
from moetion_lightning.pipeline.trace_free import buffers_aside

__all__ = ["EvalMessage", "Interceptor", "StageRun"]


class _Active(threading.local):
    """The run that layer calls of this thread belong to."""

    calls: LayerCalls | None = None
    indices: dict[int, int] = {}  # noqa: RUF012 - replaced as a whole, never changed


_ACTIVE = _Active()


class _Intercepted:
    """First base of a layer's class while it is intercepted; the second one is the layer's own class.

    Without ``__slots__``: only a class with the layout of a plain one can take a module's class's place.
    """

    def __init_subclass__(cls) -> None:
        """Keep the layer's own `__init_subclass__` (a registry, a wrapper of `forward`) from seeing another class."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward: Callable[..., Any] = super().__call__  # type: ignore[misc]
        calls = _ACTIVE.calls
        if calls is None:
            if torch._C._current_graph_task_id() != -1:
                raise ConfigurationError(
                    f"a {type(self).__name__}, a layer that a pipeline is cut between, was called in a backward pass: "
                    "torch.utils.checkpoint is applied around the layer, and would recompute it on stand-ins. "
                    "Checkpoint inside the layer's forward (transformers: gradient_checkpointing_enable())"
                )
            return forward(*args, **kwargs)
        index = _ACTIVE.indices.get(id(self))
        return forward(*args, **kwargs) if index is None else calls.on_call(index, forward, args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are of the layer's own class."""
        reduced = super().__reduce_ex__(protocol)
        if isinstance(reduced, tuple) and reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            _, *arguments = reduced[1]
            # Pickle takes `copyreg.__newobj__` for the object's own class only.
            return (object.__new__, (type(self).__bases__[1], *arguments), *reduced[2:])
        return reduced


class Interceptor:
    """Runs a user's step on one stage of a pipeline, by intercepting the calls of the layers.

    Between runs the module is unchanged to all appearances: layers are of a subclass of their class with the same name,
    and a call costs about a microsecond more.

    Args:
        layers: The layers, from ``find_layers``.
    """

    def __init__(self, layers: LayerList) -> None:
        self.layers = layers
        self._indices = {id(layer): index for index, layer in enumerate(layers.modules)}
        self._installed = False

    def install(self) -> None:
        """Give all layers their intercepting class.

        Raises:
            ConfigurationError: A layer is intercepted already, or its class cannot be replaced.
        """
        if self._installed:
            return
        for name, layer in zip(self.layers.names, self.layers.modules):
            if isinstance(layer, _Intercepted):
                raise ConfigurationError(f"layer {name!r} is intercepted already; remove() the other Interceptor first")
        classes: dict[type, type] = {}
        done: list[nn.Module] = []
        for name, layer in zip(self.layers.names, self.layers.modules):
            own = type(layer)
            try:
                if own not in classes:
                    classes[own] = _intercepting(own)
                layer.__class__ = classes[own]
            except TypeError as error:
                for changed in done:
                    changed.__class__ = type(changed).__bases__[1]
                raise ConfigurationError(
                    f"layer {name!r} is a {own.__name__}, whose class cannot be replaced ({error}); expected a module "
                    "written in Python. Wrap the layer in an nn.Module of your own"
                ) from error
            done.append(layer)
        self._installed = True

    def remove(self) -> None:
        """Give all layers their own class back.

        Raises:
            ConfigurationError: Something else replaced a layer's class meanwhile and must be undone first.
        """
        if not self._installed:
            return
        for name, layer in zip(self.layers.names, self.layers.modules):
            if type(layer).__bases__[:1] != (_Intercepted,):
                raise ConfigurationError(
                    f"layer {name!r} got another class ({type(layer).__mro__[1].__name__}) after install(); undo that "
                    "before remove(), or apply it before install()"
                )
        for layer in self.layers.modules:
            layer.__class__ = type(layer).__bases__[1]
        self._installed = False

    def run(
        self,
        plan: CutPlan,
        stage: int,
        call: Callable[[], Any],
        *,
        received: Sequence[Tensor] = (),
        stubs: Sequence[LayerSpec] = (),
        seed: int,
    ) -> StageRun:
        """Run the step for one micro-batch on one stage.

        The caller's modes hold: grad, no_grad, inference_mode, autocast. Random numbers depend on ``seed`` and on the
        layer, not on the stage, and no global generator has moved afterwards.

        Args:
            plan: The plan.
            stage: Which stage.
            call: Runs the user's step once, on the whole module and this micro-batch.
            received: Payload of the stage before, for the same micro-batch; empty for the first one.
            stubs: Specs of all layers before the stage: the earlier stages' ``layer_specs``, in order.
            seed: The micro-batch's seed, the same on all stages.

        Raises:
            ConfigurationError: The step called the layers otherwise than in the plan.
        """
        calls = StageCalls(self.layers, plan, stage, received, stubs)
        with buffers_aside(self.layers.root, plan.junk_buffers[stage]):
            result = self.execute(calls, call, seed)
        return StageRun(calls.payload(), result, tuple(calls.specs))

    def run_eval(
        self, plan: CutPlan, stage: int, call: Callable[[], Any], message: EvalMessage | None = None
    ) -> EvalMessage | Any:
        """Run another step than the one that the plan was made from, forward only, for one batch on one stage.

        Nothing is known about that step, so everything crosses: all tensors that the next stage's first layer is called
        with, and all outputs of the layers before it that are not merely the next layer's input.

        Args:
            plan: The plan, for its bounds and taps.
            stage: Which stage.
            call: Runs the user's step once.
            message: What the stage before returned; None for the first one.

        Returns:
            The message for the next stage; on the last one, what the step returned.

        Raises:
            ConfigurationError: The layers are called otherwise than the stage before called them.
        """
        calls = EvalCalls(self.layers, plan, stage, message)
        with torch.no_grad(), buffers_aside(self.layers.root, plan.junk_buffers[stage]):
            result = self.execute(calls, call, None)
            return result if calls.stop == len(self.layers) else calls.message()

    def execute(self, calls: LayerCalls, call: Callable[[], Any], seed: int | None) -> Any:
        """Run the step once with its layer calls handled; what it returned, or None if it was cut.

        Args:
            calls: Handles the layer calls.
            call: The step.
            seed: Seeds all generators for this run; None: leaves them alone.

        Raises:
            ConfigurationError: Not installed, or called from within another run.
        """
        if not self._installed:
            raise ConfigurationError(
                "Interceptor.run() before install(): the layers' calls cannot be seen. install() it"
            )
        if _ACTIVE.calls is not None:
            raise ConfigurationError(
                "a pipelined step was started within another one; expected one at a time in each thread. Do not call "
                "run() from a layer or a hook"
            )
        calls.seeds = None if seed is None else LayerSeeds(seed, self._devices())
        result, returned = None, False
        _ACTIVE.indices, _ACTIVE.calls = self._indices, calls
        try:
            with calls.seeds or nullcontext():
                result, returned = call(), True
        except Cut as cut:
            cut.__traceback__ = None  # its frames hold the activations of the whole step
        finally:
            _ACTIVE.calls = None
            calls.finish()
        calls.check_end(returned)
        return result

    def _devices(self) -> list[torch.device]:
        """Where layers may draw random numbers: one process computes on one device, so two layers will do."""
        ends = (self.layers.modules[0], self.layers.modules[-1])
        return [
            parameter.device
            for layer in ends
            for parameter in [next(layer.parameters(), None)]
            if parameter is not None
        ]


def _intercepting(own: type) -> type:
    names = {key: getattr(own, key) for key in ("__module__", "__qualname__", "__doc__")}
    return type(own)(own.__name__, (_Intercepted, own), names)
