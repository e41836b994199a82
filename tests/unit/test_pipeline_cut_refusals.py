"""What cannot be cut is refused with the reason and the remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moetion_lightning.errors import ConfigurationError
from tests.runs.pipeline_models import (
    Body,
    Decoder,
    Mixer,
    ReadsLayer,
    VirtualPipeline,
    check_pipeline,
    ids_of,
    next_token_loss,
    plain_step,
)

IDS = ids_of(6, 6, 6)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _refuse(module: nn.Module, match: str, num_stages: int = 2, **options: Any) -> None:
    with pytest.raises(ConfigurationError, match=match):
        VirtualPipeline(module, plain_step, IDS[0], num_stages, **options)


class Skips(Body):
    def middle(self, hidden: Tensor) -> Tensor:
        down = []
        for layer in self.layers[:2]:
            hidden = layer(hidden)
            down.append(hidden)
        for layer in self.layers[2:]:
            hidden = layer(hidden + down.pop())
        return hidden


class Twice(Body):
    def middle(self, hidden: Tensor) -> Tensor:
        return super().middle(super().middle(hidden))


class Reordered(Body):
    def middle(self, hidden: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            hidden = layer(hidden)
        return hidden


class Skipped(Body):
    def middle(self, hidden: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            hidden = layer(hidden)
        return hidden


class BorrowsParameter(Body):
    def middle(self, hidden: Tensor) -> Tensor:
        return super().middle(hidden) @ self.layers[0].linear.weight


class PassesNumber(Body):
    class Layer(Mixer):
        def forward(self, hidden: Tensor, scale: float) -> Tensor:
            return super().forward(hidden) * scale

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Layer() for _ in range(4))

    def middle(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden, float(hidden.detach().abs().max()))
        return hidden


class SharedList(Body):
    def middle(self, hidden: Tensor) -> Tensor:
        found: list[Tensor] = []
        for layer in self.layers:
            layer.found = found
        hidden = super().middle(hidden)
        return hidden + sum(found)  # type: ignore[return-value]

    class Layer(Mixer):
        def forward(self, hidden: Tensor) -> Tensor:
            self.found.append(hidden.mean())
            return super().forward(hidden)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Layer() for _ in range(4))


class CheckpointsLayers(Body):
    def middle(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = checkpoint(layer, hidden, use_reentrant=False)
        return hidden


class CatchesAll(Body):
    def forward(self, ids: Tensor) -> Tensor:
        try:
            return super().forward(ids)
        except:  # noqa: E722
            return torch.zeros(())


class NoLoss(Body):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).detach()


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (Skips, "layers 'layers.0' of earlier stages.*skip connection.*configure_pipeline"),
        (ReadsLayer, "the loss depends on what layers 'layers.1'.*intermediate hidden states"),
        (Twice, "'layers.0' was called twice"),
        (Reordered, "'layers.3' was called before layer 'layers.0'"),
        (Skipped, "'layers.3' was never called"),
        (BorrowsParameter, "'layers.0.linear.weight' belongs to a layer .* used outside"),
        (PassesNumber, "python value"),
        (SharedList, "a list or another object that layers fill"),
        (CheckpointsLayers, "checkpoint is applied around the layer"),
        (CatchesAll, "caught the exception"),
        (NoLoss, "without gradient"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_what_cannot_be_cut_is_refused_with_the_reason(kind: type[nn.Module], match: str) -> None:
    _refuse(kind(), match)


def test_skip_inside_of_one_stage_is_no_obstacle() -> None:
    check_pipeline(Skips(), 2, bounds=(0, 3))
    check_pipeline(ReadsLayer(6), 2, bounds=(0, 1))


def test_lazy_parameters_are_refused() -> None:
    module = Body()
    module.head = nn.LazyLinear(19)
    _refuse(module, "not initialized")


class Varying(Decoder):
    """Calls its layers otherwise for micro-batches that begin with a zero."""

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        for block in self.blocks:
            hidden = block(hidden, mask=ids != 1)[0] if ids[0, 0] else block(hidden)[0]
        return next_token_loss(self.head(self.norm(hidden)), ids)


def test_micro_batches_that_call_layers_otherwise_are_refused() -> None:
    pipeline = VirtualPipeline(Varying(), plain_step, torch.ones_like(IDS[0]), 2)
    with pytest.raises(ConfigurationError, match="was called with arguments.*the plan expects.*a typical one"):
        pipeline.train([torch.zeros_like(IDS[0])])


def test_layers_that_return_other_containers_are_refused() -> None:
    class Layer(Mixer):
        def forward(self, hidden: Tensor) -> Any:
            return super().forward(hidden) if hidden.shape[1] == 6 else [super().forward(hidden)]

    class Containers(Body):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(4))

        def middle(self, hidden: Tensor) -> Tensor:
            for layer in self.layers:
                hidden = layer(hidden)
                hidden = hidden[0] if isinstance(hidden, list) else hidden
            return hidden

    pipeline = VirtualPipeline(Containers(), plain_step, IDS[0], 2)
    with pytest.raises(ConfigurationError, match="the same containers for every micro-batch"):
        pipeline.train(ids_of(7))


def test_objects_that_layers_return_cannot_be_read_on_later_stages() -> None:
    class Statistics:
        def __init__(self, loss: Tensor) -> None:
            self.loss = loss

    class Layer(Mixer):
        def forward(self, hidden: Tensor) -> Any:
            return super().forward(hidden), Statistics(hidden.mean())

    class Returning(Body):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(4))

        def middle(self, hidden: Tensor) -> Tensor:
            total = torch.zeros(())
            for layer in self.layers:
                hidden, statistics = layer(hidden)
                total = total + statistics.loss
            return hidden + total

    _refuse(Returning(), "'loss' of the Statistics that layer 'layers.0' returned")
