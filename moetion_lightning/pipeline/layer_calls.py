"""What a run of the step does at each layer call: the order is checked; a layer runs, is a stub, or cuts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.pipeline.cut_plan import TapForm
from moetion_lightning.pipeline.layer_list import LayerList
from moetion_lightning.pipeline.seeding import LayerSeeds
from moetion_lightning.pipeline.specs import flatten

__all__ = ["ALTERNATIVES", "Cut", "LayerCalls", "device_of", "fire_hooks", "replace_leaves"]

ALTERNATIVES = (
    "Declare the stages with configure_pipeline(), choose other layers (layers=...), or use fewer stages so that the "
    "layers in question share one"
)


_ABSENT = object()


class Cut(BaseException):
    """Ends the step at the entry of the next stage's first layer. No Exception: user code must not handle it."""


class LayerCalls:
    """The layer calls of one run of the step.

    Args:
        layers: All layers, in call order.
        start: The first layer that really runs.
        stop: The first layer that does not run again, at whose entry the step is cut; the number of layers: none.
    """

    def __init__(self, layers: LayerList, start: int, stop: int) -> None:
        self.layers = layers
        self.start = start
        self.stop = stop
        self.next = 0
        self.cut_reached = False
        self.seeds: LayerSeeds | None = None
        self._attributes: list[tuple[nn.Module, str, Any]] = []  # set by stand-ins, with what was there

    def on_call(self, index: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Handle the call of a layer.

        Args:
            index: Which layer.
            forward: The layer's own call.
            args: Positional arguments.
            kwargs: Keyword arguments.
        """
        if self.cut_reached:  # user code caught the cut and goes on
            raise Cut
        if index != self.next:
            raise ConfigurationError(self._order_message(index))
        self.next = index + 1
        if index < self.start:
            output = self.stub(index, args, kwargs)
        elif index >= self.stop:
            self.cut_reached = True
            self.cut(args, kwargs)
            raise Cut
        else:
            if self.seeds is not None:
                self.seeds.before(index)
            output = self.compute(index, forward, args, kwargs)
        if self.seeds is not None:
            self.seeds.after(index)
        return output

    def compute(self, index: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a layer of this stage."""
        return forward(*args, **kwargs)

    def stub(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stand in for a layer of an earlier stage."""
        raise NotImplementedError

    def cut(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take what the next stage's first layer was called with."""
        raise NotImplementedError

    def put_out(self, layer: nn.Module, tap: TapForm, value: Any) -> None:
        """Show the step the value of a tap of a layer that does not run here, as the layer would."""
        owner = layer.get_submodule(tap.module)
        if tap.attribute is None:
            fire_hooks(owner, (), {}, value)
        else:
            self._attributes.append((owner, tap.attribute, owner.__dict__.get(tap.attribute, _ABSENT)))
            owner.__dict__[tap.attribute] = value

    def finish(self) -> None:
        """After the step, however it ended: take back what stand-ins have set."""
        for owner, name, before in reversed(self._attributes):
            if before is _ABSENT:
                owner.__dict__.pop(name, None)
            else:
                owner.__dict__[name] = before
        self._attributes = []

    def check_end(self, returned: bool) -> None:
        """After the step: every layer up to the cut was called, and the cut ended the step."""
        if self.cut_reached and returned:
            raise ConfigurationError(
                f"the step caught the exception that ends it on this pipeline stage, at layer "
                f"{self.layers.names[self.stop]!r}: it has an `except:` or `except BaseException:` around its layers, "
                "or a `return` in a `finally:`. Catch `Exception` instead"
            )
        expected = min(self.stop + 1, len(self.layers))
        if self.next < expected:
            called = f"the last one called was {self.layers.names[self.next - 1]!r}" if self.next else "none was called"
            raise ConfigurationError(
                f"layer {self.layers.names[self.next]!r} was never called by the step ({called}); expected every layer "
                f"to be called exactly once, in the order of the list. {ALTERNATIVES}"
            )

    def _order_message(self, index: int) -> str:
        name = self.layers.names[index]
        if index < self.next:
            said = f"layer {name!r} was called twice in one step"
            hint = "Layers that share weights in a loop, or two forward passes in one step, cannot be cut between"
        else:
            said = f"layer {name!r} was called before layer {self.layers.names[self.next]!r}"
            hint = "Layers that are skipped, or called in another order than in the list, cannot be cut between"
        return (
            f"{said}; expected every layer to be called exactly once, in the order of the list. {hint}. If the order "
            f"is the same in every step, name the layers in that order (layers=[...]). {ALTERNATIVES}"
        )


def fire_hooks(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Run a module's forward hooks on an output that it did not compute here; what they return is not used."""
    for key, hook in list(module._forward_hooks.items()):
        if key in module._forward_hooks_with_kwargs:
            hook(module, args, kwargs, output)
        else:
            hook(module, args, output)


def replace_leaves(args: tuple[Any, ...], kwargs: dict[str, Any], table: Mapping[int, Tensor]) -> Any:
    """``(args, kwargs)`` with the very objects whose ``id()`` is in the table replaced."""
    leaves, structure = flatten((args, kwargs))
    if not any(id(leaf) in table for leaf in leaves):
        return args, kwargs
    return structure.unflatten([table.get(id(leaf), leaf) for leaf in leaves])


def device_of(*values: Any) -> torch.device:
    """The device of the first tensor among the leaves of the values; the CPU if there is none."""
    for leaf in flatten(values)[0]:
        if isinstance(leaf, Tensor):
            return leaf.device
    return torch.device("cpu")
