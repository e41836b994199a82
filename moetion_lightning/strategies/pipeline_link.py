"""A pipeline strategy's boundary log, and the replay of its stages from it."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from moetion_lightning.distributed.messages import receive_message, send_message
from moetion_lightning.engine.stage_link import StageReplay, StageWork
from moetion_lightning.pipeline.boundary_log import BoundaryLog, Control, Round
from moetion_lightning.pipeline.micro_batches import map_tensors, tensors_of
from moetion_lightning.pipeline.runner import StageShapes
from moetion_lightning.pipeline.stage import Direction, NetworkTraffic
from moetion_lightning.pipeline.stage_replay import (
    TIED,
    Announced,
    FedTraffic,
    IterationRecords,
    ReplayRoutes,
    Source,
)
from moetion_lightning.strategies.pipeline_gradients import TiedExchange
from moetion_lightning.strategies.pipeline_steps import loss_of

if TYPE_CHECKING:
    from moetion_lightning.strategies.pipeline_strategy import PipelineStrategy

__all__ = ["PipelineLink"]

_log = logging.getLogger(__name__)


class PipelineLink:
    """Implements :class:`~moetion_lightning.engine.stage_link.StageLink` for a pipeline strategy.

    Args:
        strategy: The strategy.
        max_bytes: Bound of the log.
        on_overflow: Told once if the bound is reached.
    """

    def __init__(self, strategy: PipelineStrategy, max_bytes: int, on_overflow: Callable[[str], None]) -> None:
        self._strategy = strategy
        self.log = BoundaryLog(max_bytes, on_overflow, strategy.root_device)
        self._stepped = False
        self._norm = 0.0
        self._hook: Any = None
        self._exchange: TiedExchange | None = None
        self._settings: list[dict[str, Any]] = []
        #: Shapes by signature, for stages that replay: the runner forgets its own with its groups.
        self._shapes: dict[Any, StageShapes] = {}

    # --- recording -----------------------------------------------------------------------------------------------

    def attach(self, strategy: PipelineStrategy) -> None:
        """The module is cut: listen to its boundaries and to its optimizer."""
        cut = strategy.cut
        assert cut is not None
        cut.runner.use(_Recording(self.log))
        exchange = self._exchange = cut.gradients.exchange

        def logged_exchange(name: str, own: Tensor) -> list[Tensor]:
            self._record_tied(name, own)
            return exchange(name, own)

        cut.gradients.exchange = logged_exchange
        (optimizer,) = strategy.optimizers
        plain = getattr(optimizer, "_optimizer", optimizer)
        self._hook = plain.register_step_pre_hook(lambda optimizer, args, kwargs: self._note_step(optimizer))

    def _record_tied(self, name: str, own: Tensor) -> None:
        index = list(self._cut.tied_places).index(name)
        self.log.record(TIED - index, "B", 0, [own.detach().clone()])

    def _note_step(self, optimizer: Any) -> None:
        """The optimizer is called: these settings are those of the step."""
        self._stepped = True
        self._settings = [_plain_settings(group) for group in optimizer.param_groups]

    def end_round(self, batch: Any, number: int, seed: int, losses: list[Tensor]) -> None:
        """A batch has passed through the pipeline."""
        self._shapes.update(self._cut.runner.shapes)  # also those that were learnt before a recovery
        self.log.end_round(
            Round(
                batch=tuple(tensors_of(batch)),
                index=number,
                seed=seed,
                losses=tuple(float(loss).hex() for loss in losses),
            )
        )

    def reduced(self) -> None:
        """The gradients are those that the step begins with."""
        self._norm = self._cut.gradients.stage_norm()

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """Around an optimizer step: seal the iteration if the step is really made."""
        self._stepped = False
        scale = self._scale()
        yield
        if not self._stepped or (scale is not None and self._strategy.overflowed):
            self.log.skip()
            return
        self.log.seal(
            Control(
                norms=tuple(float(norm).hex() for norm in self._cut.gradients.norms),
                stage_norms=self._share_norm(self._norm),
                groups=self._settings,
                scale=scale,
                divisor=int(self._cut.module.trainer.accumulate_grad_batches),
            )
        )

    def _share_norm(self, norm: float) -> tuple[str, ...]:
        groups = self._strategy.pipeline_groups
        size = groups.layout.pipeline_parallel_size
        device = self._strategy.root_device
        parts = [torch.zeros(1, dtype=torch.float64, device=device) for _ in range(size)]
        dist.all_gather(parts, torch.tensor([norm], dtype=torch.float64, device=device), group=groups.pipeline)
        return tuple(float(part).hex() for part in parts)

    @property
    def _scaler(self) -> Any:
        return getattr(self._strategy.precision_plugin, "scaler", None)

    def _scale(self) -> str | None:
        return None if self._scaler is None else float(self._scaler.get_scale()).hex()

    @property
    def _cut(self) -> Any:
        cut = self._strategy.cut
        assert cut is not None
        return cut

    # --- StageLink -----------------------------------------------------------------------------------------------

    @property
    def stage(self) -> int:
        """See :class:`StageLink`."""
        return self._strategy.pipeline_layout.pp_rank(self._strategy.global_rank)

    def logged(self) -> tuple[int, int] | None:
        """See :class:`StageLink`."""
        return self.log.complete()

    def free(self, before: int) -> None:
        """See :class:`StageLink`."""
        self.log.free(before)

    def iteration_begins(self, iteration: int) -> None:
        """See :class:`StageLink`."""
        if iteration != self.log.current or self.log.holds(iteration):
            self.log.begin(iteration)

    def replay(self, plan: StageReplay, mine: StageWork | None) -> list[str]:
        """See :class:`StageLink`."""
        routes = ReplayRoutes(layout=self._strategy.pipeline_layout, replaying=plan.replaying)
        if problems := routes.mismatches(self._tied_places()):  # all ranks find the same
            return problems
        if mine is None:
            self._serve(routes)
            return []
        return self._replay(routes, mine)

    def _serve(self, routes: ReplayRoutes) -> None:
        """Tell the ranks that replay what there is, and send it if all of them can use it."""
        strategy, started = self._strategy, time.perf_counter()
        me, device = strategy.global_rank, strategy.root_device
        source = Source(routes=routes, log=self.log, me=me, places=self._tied_places())
        targets = source.targets()
        for rank in targets:
            shapes = [[_signature_to_json(s), found.to_json()] for s, found in self._shapes.items()]
            send_message([source.describe(rank), shapes if routes.witness(rank) == me else []], [], rank, device)
        if not self._all_can(True):
            return
        nbytes = 0
        for iteration, rank in routes.iterations():
            if rank in targets:
                tensors = source.tensors(iteration, rank)
                send_message(iteration, tensors, rank, device)
                nbytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if nbytes:
            _log.info(
                "rank %d kept its state and sent %.1f MB of its boundary log to the stages that replay (%.1f s)",
                me, nbytes / 1e6, time.perf_counter() - started,
            )  # fmt: skip

    def _all_can(self, can: bool) -> bool:
        """Whether no rank has found the records wanting."""
        wrong = torch.tensor([float(not can)], device=self._strategy.root_device)
        dist.all_reduce(wrong)
        return not float(wrong)

    def _tied_places(self) -> Mapping[int, tuple[int, ...]]:
        return dict(enumerate(self._cut.tied_places.values()))

    # --- replaying -----------------------------------------------------------------------------------------------

    def _replay(self, routes: ReplayRoutes, work: StageWork) -> list[str]:
        strategy, cut, me = self._strategy, self._cut, self._strategy.global_rank
        device, places = strategy.root_device, self._tied_places()
        headers = {}
        for source in routes.sources(me, places):
            (headers[source], shapes), _ = receive_message(source, device)
            if shapes:
                cut.runner.shapes = {_signature_from_json(s): StageShapes.from_json(found) for s, found in shapes}
                self._shapes.update(cut.runner.shapes)
        announced = Announced(routes, me, headers)
        problems = announced.problems()
        if not self._all_can(not problems):
            cut.runner.shapes = {}  # as on all others
            return problems or ["the records of another rank that replays are not whole"]
        start, stop = routes.replaying[me]
        unknown: list[str] = []
        with self._in_replay(routes) as traffic:
            for iteration in range(start + 1, stop + 1):
                records = announced.receive(iteration, device)
                unknown = unknown or self._other_form(records)
                if unknown:
                    continue  # nothing follows on what cannot be replayed, but it must be received
                problems += self._replay_iteration(records, routes, traffic, work)
                work.end_iteration(iteration)
        return [*problems, *unknown]

    def _other_form(self, records: IterationRecords) -> list[str]:
        """Whether a batch has more or fewer tensors than the one by which this process knows their form."""
        known = len(tensors_of(self._cut.template))
        counts = sorted({len(done.batch) for done in records.rounds} - {known})
        if not counts:
            return []
        return [f"iteration {records.iteration}: its batch has {counts[0]} tensors, this process knows one of {known}"]

    @contextlib.contextmanager
    def _in_replay(self, routes: ReplayRoutes) -> Iterator[FedTraffic]:
        """The stages are fed; nothing is logged, and what is global stays as it is."""
        cut = self._cut
        traffic = FedTraffic(routes, self.log, self._strategy.global_rank)
        scaler_state = None if self._scaler is None else self._scaler.state_dict()
        exchange = cut.gradients.exchange
        cut.runner.use(traffic)
        cut.replaying = True
        try:
            with cut.logs.standing_in():
                yield traffic
        finally:
            cut.replaying = False
            cut.gradients.exchange = exchange
            cut.gradients.given = None
            cut.runner.use(_Recording(self.log))
            cut.runner.shapes = {}  # all ranks of the pipeline learn them together again
            if scaler_state is not None:
                self._scaler.load_state_dict(scaler_state)

    def _replay_iteration(
        self, records: IterationRecords, routes: ReplayRoutes, traffic: FedTraffic, work: StageWork
    ) -> list[str]:
        strategy, cut = self._strategy, self._cut
        control, problems = records.control, []
        self.log.begin(records.iteration)
        self._apply(control)
        for parameter in cut.parameters.values():
            parameter.grad = None
        for number, done in enumerate(records.rounds):
            waiting = iter(done.batch)
            batch = map_tensors(cut.template, lambda tensor: next(waiting))  # noqa: B023  # used at once
            traffic.run(records, number)
            results = strategy.steps.run_stages(cut, batch, done.index, done.seed, control.divisor)
            losses = tuple(float(loss_of(result).detach()).hex() for result in results) or done.losses
            if losses != done.losses:
                problems.append(_difference(records.iteration, "loss", done.losses, losses))
            self.log.end_round(done)
        cut.gradients.exchange = self._fed_exchange(records, routes)
        cut.gradients.reduce()
        norm, recorded = cut.gradients.stage_norm().hex(), control.stage_norms[self.stage]
        if norm != recorded and not work.skip_gradients:
            problems.append(_difference(records.iteration, "gradient norm", (recorded,), (norm,)))
        self._step(control, work)
        self.log.seal(control)
        return problems

    def _apply(self, control: Control) -> None:
        """The settings that the iteration was made with."""
        (optimizer,) = self._strategy.optimizers
        for group, settings in zip(optimizer.param_groups, control.groups):
            for key, value in settings.items():
                value = float.fromhex(value["f"]) if isinstance(value, Mapping) else value
                value = tuple(value) if isinstance(value, list) else value
                if isinstance(group.get(key), Tensor):
                    group[key].fill_(value)
                else:
                    group[key] = value
        if control.scale is not None:
            self._scaler.load_state_dict({**self._scaler.state_dict(), "scale": float.fromhex(control.scale)})
            self._scaler.scale(torch.zeros((), device=self._strategy.root_device))  # it exists from its first use on

    def _step(self, control: Control, work: StageWork) -> None:
        """Clip and step as Lightning does, with the norm of the original run."""
        strategy, cut = self._strategy, self._cut
        (optimizer,) = strategy.optimizers
        cut.gradients.given = [float.fromhex(norm) for norm in control.norms]
        ready = torch.zeros(())

        def closure() -> Tensor:
            return ready

        with cut.gradients.global_norm():
            strategy.precision_plugin.optimizer_step(optimizer, model=cut.module, closure=closure)
        work.after_step(0)

    def _fed_exchange(self, records: IterationRecords, routes: ReplayRoutes) -> Callable[[str, Tensor], list[Tensor]]:
        """Shares of tied gradients: from the log of those that live, from those that replay too themselves."""
        strategy, cut = self._strategy, self._cut
        layout, me = strategy.pipeline_layout, strategy.global_rank
        names = list(cut.tied_places)

        def exchange(name: str, own: Tensor) -> list[Tensor]:
            index = names.index(name)
            self.log.record(TIED - index, "B", 0, [own.detach().clone()])
            shares = []
            for place in cut.tied_places[name]:
                rank = layout.global_rank(place, layout.dp_rank(me))
                if rank == me:
                    shares.append(own)
                elif routes.lives(rank):
                    shares.append(records.tied(TIED - index, rank)[0])
                else:
                    shares.append(_swap(own, rank, first=me < rank))
            return shares

        return exchange

    def close(self) -> None:
        """Give up the log."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self.log.clear()
        if self._strategy.cut is not None:
            self._strategy.cut.runner.use(NetworkTraffic())
            if self._exchange is not None:
                self._strategy.cut.gradients.exchange = self._exchange
                self._exchange = None


class _Recording(NetworkTraffic):
    """Training, with a log."""

    def __init__(self, log: BoundaryLog) -> None:
        self._log = log

    def record(self, boundary: int, direction: Direction, micro_batch: int, tensors: Any) -> None:
        """Keep what is sent."""
        self._log.record(boundary, direction, micro_batch, tensors)


def _swap(own: Tensor, rank: int, *, first: bool) -> Tensor:
    other = torch.empty_like(own.contiguous())
    for turn in (first, not first):
        if turn:
            dist.send(own.contiguous(), rank)
        else:
            dist.recv(other, rank)
    return other


def _difference(iteration: int, what: str, recorded: tuple[str, ...], replayed: tuple[str, ...]) -> str:
    def readable(values: tuple[str, ...]) -> str:
        return ", ".join(f"{float.fromhex(value):.9g}" for value in values)

    return f"iteration {iteration}: {what} was {readable(recorded)}, replayed {readable(replayed)}"


def _plain_settings(group: Mapping[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for key, value in group.items():
        value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        if isinstance(value, float):
            settings[key] = {"f": value.hex()}
        elif value is None or isinstance(value, (bool, int, str)) or _is_numbers(value):
            settings[key] = value
    settings.pop("params", None)
    return settings


def _is_numbers(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(item, (bool, int, float)) for item in value)


def _signature_to_json(signature: Any) -> list[Any]:
    return [[list(shape), dtype] for shape, dtype in signature]


def _signature_from_json(value: Any) -> Any:
    return tuple((tuple(shape), dtype) for shape, dtype in value)
