"""One rank of the boundary log's benchmark: blocks of iterations with the log and without it."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import resource
import time
from typing import Any

import torch.distributed as dist
from _pipeline import Stage, Wire
from _pipeline_models import Device, Workload
from _pipeline_tables import NUM_STAGES

__all__ = ["run_rank"]


class _Rank:
    """The stage of one process, and what it measures."""

    def __init__(self, rank: int, num_micro_batches: int, args: argparse.Namespace, *, emulated: bool) -> None:
        self.args = args
        self.work = self._make_work(emulated)
        self.samples = args.samples * num_micro_batches
        self.stage = Stage(
            self.work.module, self.work.step, self.work.batch(0, args.samples),
            num_stages=NUM_STAGES, num_micro_batches=num_micro_batches, world=NUM_STAGES, rank=rank,
        )  # fmt: skip
        self.wire = Wire()
        self.logged = 0  # iterations that the log has seen
        self._trained = 0

    def _make_work(self, emulated: bool) -> Workload:
        args = self.args
        if emulated:
            device = Device(args.forward_ms / 1e3, args.backward_ms / 1e3)
            return Workload.emulated(NUM_STAGES, seq_len=args.seq_len, d_model=args.d_model, device=device)
        return Workload.computing(
            seq_len=args.seq_len, d_model=args.d_model, d_expert=args.d_expert, num_layers=args.num_layers
        )

    def block(self, *, logging: bool, iterations: int | None = None) -> dict[str, Any]:
        """Train a block of iterations, and say what it took."""
        count = iterations or self.args.block
        if logging:
            self.stage.start_log(self.logged + 1)
        else:
            self.stage.stop_log()
        batches = [self.work.batch(self._trained + i, self.samples) for i in range(count)]
        dist.barrier()
        before, clock = self.wire.read(), self.stage.clock
        records, norms = clock.records, clock.norms
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        cpu, started = time.process_time(), time.perf_counter()
        for number, batch in enumerate(batches):
            self.stage.train(self._trained + number, batch, logging=logging)
            if logging:
                self.logged += 1
                self._free()
        seconds = time.perf_counter() - started
        self._trained += count
        sends, send_bytes, collectives = (now - then for now, then in zip(self.wire.read(), before))
        return {
            "seconds": seconds / count,
            "cpu": (time.process_time() - cpu) / count,
            "faults": (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults) / count,
            "record_seconds": (clock.records - records) / count,
            "norm_seconds": (clock.norms - norms) / count,
            "sends": sends / count,
            "send_bytes": send_bytes / count,
            "collectives": collectives / count,
        }

    def _free(self) -> None:
        """What the engine frees when a window is committed, here in the iteration in which it ends."""
        window, log = self.args.window, self.stage.log
        assert log is not None
        if self.logged % window == 0:
            with self.stage.clock.recording():
                log.free(self.logged - window + 2)  # its first iteration is never replayed

    def bytes_of(self, num_micro_batches: int) -> dict[str, int]:
        """Bytes that one iteration of this very batch leaves in the log when it is cut otherwise."""
        usual, self.stage.num_micro_batches = self.stage.num_micro_batches, num_micro_batches
        self.block(logging=True, iterations=1)
        self.stage.num_micro_batches = usual
        log, number = self.stage.log, self.logged
        assert log is not None
        sent = [
            tensor.numel() * tensor.element_size()
            for boundary in range(NUM_STAGES + 1)
            for direction in ("F", "B")
            for _, tensors in log.sent(number, boundary, direction)
            for tensor in tensors
        ]
        return {"records": len(sent), "sent": sum(sent), "batch": log.iteration_bytes - sum(sent)}


def _reset_peak() -> None:
    """Give free memory back to the system, and begin the peak of resident memory anew, where that is possible."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")


def _peak_bytes() -> int | None:
    """Most resident memory of this process since the last reset; None where the system does not tell."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next((1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM:")), None)
    except OSError:
        return None


def run_rank(rank: int, num_micro_batches: int, args: argparse.Namespace, *, emulated: bool) -> dict[str, Any]:
    """All blocks of one job, on one rank."""
    me = _Rank(rank, num_micro_batches, args, emulated=emulated)
    me.block(logging=False, iterations=3)  # shapes are learnt, the optimizer's state appears
    if me.work.device is not None:
        me.work.device.busy = True
    blocks = [me.block(logging=False)]
    for number in range(args.rounds):
        if rank == 0:
            kind = "emulated" if emulated else "computing"
            print(f"  M = {num_micro_batches}, {kind}, round {number + 1}/{args.rounds}", flush=True)
        for logging in (True, False, False, False):
            blocks.append(me.block(logging=logging))
    found = {"blocks": blocks, "parameters": sum(p.numel() for p in me.stage.parameters.values())}
    return found if emulated else {**found, **_sizes(me, num_micro_batches)}


def _sizes(me: _Rank, num_micro_batches: int) -> dict[str, Any]:
    """Memory, and bytes of an iteration."""
    log, peaks = me.stage.start_log(me.logged + 1), []
    for logging in (False, True):
        log.clear()
        _reset_peak()
        me.block(logging=logging, iterations=2 * me.args.window)
        peaks.append(_peak_bytes())
    counts = sorted({num_micro_batches, max(3, num_micro_batches // 2)})
    return {
        "state_bytes": sum(t.numel() * t.element_size() for t in me.stage.state()),
        "high_water_bytes": log.high_water_bytes,
        "peak_without": peaks[0],
        "peak_with": peaks[1],
        "iteration_bytes": {str(count): me.bytes_of(count) for count in counts},
    }
