"""Small modules to cut into pipeline stages, and all stages of a pipeline in one process."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetion_lightning.pipeline.cut_plan import CutPlan
from moetion_lightning.pipeline.evaluation import EvalMessage
from moetion_lightning.pipeline.hollow import hollow
from moetion_lightning.pipeline.intercept import Interceptor
from moetion_lightning.pipeline.layer_list import find_layers
from moetion_lightning.pipeline.probe import make_plan
from moetion_lightning.pipeline.specs import LayerSpec

WIDTH, VOCAB = 8, 19

Step = Callable[[nn.Module, Any], Any]
Gradients = dict[str, Tensor]


class Experts(nn.Module):
    def __init__(self, num_experts: int = 4, width: int = WIDTH) -> None:
        super().__init__()
        self.gate = nn.Linear(width, num_experts, bias=False)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(num_experts))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.gate(hidden).softmax(-1)
        chosen = scores.argmax(-1)
        out = torch.zeros_like(hidden)
        for index, expert in enumerate(self.experts):
            where = chosen == index
            if where.any():
                out[where] = (expert(hidden[where]) * scores[where][:, index, None]).to(out.dtype)
        return out, scores.mean((0, 1)).pow(2).sum()


class Block(nn.Module):
    """Pre-norm mixture of experts that returns its load-balancing loss besides."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.moe = Experts()
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        out, balance = self.moe(self.norm(hidden))
        if mask is not None:
            out = out * mask[..., None]
        return hidden + self.dropout(out), balance


class Decoder(nn.Module):
    """Tuple layers, an auxiliary loss, and positions that are a parameter used directly.

    Args:
        num_layers: Number of blocks.
        dropout: Of blocks and of the embedding.
        tied: Whether the head is the embedding.
    """

    def __init__(self, num_layers: int = 4, dropout: float = 0.0, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.position = nn.Parameter(torch.randn(16, WIDTH))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.dropout(self.embed(ids) + self.position[: ids.shape[1]])
        mask = ids != 0
        balances = []
        for block in self.blocks:
            hidden, balance = block(hidden, mask=mask)
            balances.append(balance)
        return next_token_loss(self.head(self.norm(hidden)), ids) + 0.1 * torch.stack(balances).mean()


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


class Mixer(nn.Module):
    """A layer of one input and one output."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + torch.tanh(self.linear(hidden))


class Body(nn.Module):
    """Embedding, mixers and a head; subclasses say how the mixers are called."""

    def __init__(self, num_layers: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Mixer() for _ in range(num_layers))
        self.head = nn.Linear(WIDTH, VOCAB)

    def middle(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden

    def forward(self, ids: Tensor) -> Tensor:
        return next_token_loss(self.head(self.middle(self.embed(ids))), ids)


class ReadsLayer(Body):
    def middle(self, hidden: Tensor) -> Tensor:
        seen = []
        for layer in self.layers:
            hidden = layer(hidden)
            seen.append(hidden)
        return hidden + seen[1]


class Stages(nn.Module):
    """Declares its stages, which pass tuples of floats, integers and booleans to each other."""

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(19, WIDTH)

        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            hidden = self.embed(ids)
            return hidden, hidden.argmax(-1), {"positive": hidden.sum(-1) > 0}

    class Second(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(WIDTH, WIDTH)

        def forward(self, hidden: Tensor, index: Tensor, flags: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            return hidden + self.table(index) * flags["positive"][..., None], flags["positive"]

    class Third(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(WIDTH, 19)

        def forward(self, hidden: Tensor, flags: Tensor) -> Tensor:
            return self.head(hidden * (1 + flags[..., None]))

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = self.First(), self.Second(), self.Third()

    def configure_pipeline(self) -> list[nn.Module]:
        return [self.a, self.b, self.c]

    def forward(self, ids: Tensor) -> Tensor:
        return next_token_loss(self.c(*self.b(*self.a(ids))), ids)


def ids_of(*lengths: int, rows: int = 3, seed: int = 7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (rows, length), generator=generator) for length in lengths]


def plain_step(module: nn.Module, batch: Any) -> Any:
    return module(batch)


def plain_gradients(module: nn.Module, step: Step, batches: Sequence[Any]) -> tuple[list[Tensor], Gradients]:
    """Losses and accumulated gradients of an unchanged copy of the module."""
    module = copy.deepcopy(module)
    losses = []
    for batch in batches:
        loss = step(module, copy.deepcopy(batch))
        loss.backward()
        losses.append(loss.detach())
    return losses, {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@dataclass
class Stage:
    module: nn.Module
    interceptor: Interceptor


class VirtualPipeline:
    """All stages of a pipeline in one process, each with a copy of the module in which only its parameters are left.

    Args:
        module: The module; it is cut, learnt from and left as it was.
        step: Runs the step of a module on a micro-batch and returns the loss.
        batch: The micro-batch from which the plan is made.
        num_stages: Number of stages.
        bounds: First layers.
        layers: Names of lists of layers.
        plan: A plan that was made already.
    """

    def __init__(
        self,
        module: nn.Module,
        step: Step,
        batch: Any,
        num_stages: int,
        *,
        bounds: Sequence[int] | None = None,
        layers: str | Sequence[str] | None = None,
        seed: int = 11,
    ) -> None:
        self.step, self.seed = step, seed
        interceptor = Interceptor(find_layers(module, layers))
        interceptor.install()
        try:
            self.plan: CutPlan = make_plan(
                module, interceptor, bounds, num_stages, lambda: step(module, copy.deepcopy(batch)), seed=5
            )
        finally:
            interceptor.remove()
        self.stages = []
        for stage in range(num_stages):
            part = copy.deepcopy(module)
            found = Interceptor(find_layers(part, layers))
            found.install()
            hollow(part, self.plan.owned[stage])
            self.stages.append(Stage(part, found))

    def train(self, batches: Sequence[Any]) -> tuple[list[Tensor], Gradients]:
        """Losses and gradients of all micro-batches; of a parameter in several stages, the sum in order of stages."""
        losses = [self._forward_backward(index, batch) for index, batch in enumerate(batches)]
        gradients: Gradients = {}
        for stage in self.stages:
            for name, parameter in stage.module.named_parameters():
                if parameter.grad is not None:
                    before = gradients.get(name)
                    gradients[name] = parameter.grad if before is None else before + parameter.grad
        return losses, gradients

    def _forward_backward(self, index: int, batch: Any) -> Tensor:
        received: list[list[Tensor]] = [[]]
        sent: list[tuple[Tensor, ...]] = []
        specs: list[LayerSpec] = []
        for number, stage in enumerate(self.stages):
            run = stage.interceptor.run(
                self.plan,
                number,
                lambda module=stage.module: self.step(module, copy.deepcopy(batch)),
                received=received[-1],
                stubs=[LayerSpec.from_json(json.loads(json.dumps(spec.to_json()))) for spec in specs],
                seed=self.seed + index,
            )
            specs += run.layer_specs
            sent.append(run.payload)
            received.append([tensor.detach().requires_grad_(tensor.requires_grad) for tensor in run.payload])
        loss: Tensor = run.result
        loss.backward()
        for number in reversed(range(len(self.stages) - 1)):
            pairs = [(t, r.grad) for t, r in zip(sent[number], received[number + 1]) if t.requires_grad]
            pairs = [(t, g) for t, g in pairs if g is not None]
            if pairs:
                torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
        return loss.detach()

    def evaluate(self, step: Step, batch: Any) -> Any:
        """What another step returns, forward only."""
        message: EvalMessage | None = None
        for number, stage in enumerate(self.stages):
            message = stage.interceptor.run_eval(
                self.plan, number, lambda module=stage.module: step(module, copy.deepcopy(batch)), message
            )
            if number + 1 < len(self.stages):
                message = EvalMessage(json.loads(json.dumps(message.header)), message.tensors)
        return message


def check_equal(
    expected: tuple[list[Tensor], Gradients], found: tuple[list[Tensor], Gradients], tied: Container[str] = ()
) -> None:
    """Losses and gradients are bitwise equal.

    The gradient of a parameter in several stages is a sum over them, and within each over the micro-batches, which is
    another order of summation than the whole module's: those are compared up to rounding.
    """
    assert len(expected[0]) == len(found[0])
    for index, (a, b) in enumerate(zip(expected[0], found[0])):
        assert torch.equal(a, b), f"loss of micro-batch {index}: {a} and {b}"
    assert expected[1].keys() == found[1].keys()
    for name, gradient in expected[1].items():
        if name in tied:
            torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)
        else:
            error = (gradient - found[1][name]).abs().max()
            assert torch.equal(gradient, found[1][name]), f"gradient of {name}: differs by up to {error}"


def check_pipeline(
    module: nn.Module, num_stages: int = 3, batches: Sequence[Any] | None = None, **options: Any
) -> VirtualPipeline:
    """Cut a module, and compare losses and gradients of all micro-batches with the unchanged module's."""
    batches = ids_of(6, 6, 6) if batches is None else batches
    expected = plain_gradients(module, plain_step, batches)
    pipeline = VirtualPipeline(module, plain_step, batches[0], num_stages, **options)
    check_equal(expected, pipeline.train(batches), pipeline.plan.tied())
    return pipeline
