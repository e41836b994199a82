"""The communicators behind a process's groups: how they are made, and how a thread that waits in one is freed.

A collective that waits for a lost rank never ends by itself, and nothing can be raised in the thread that waits. What
frees it, from another thread:

* NCCL: ``abort`` of all communicators, between ``ncclGroupStart`` and ``ncclGroupEnd``. ``destroy_process_group`` would
  wait for all kernels, also for those that never end.
* gloo: ``shutdown`` of the sockets of its pairs. Its own ``abort`` does nothing, and ``close`` sends no FIN while a
  forked DataLoader worker holds a copy of the descriptor. Pairs are connected when a group is made; gloo's lazy mode
  (``TORCH_GLOO_LAZY_INIT``), in which they are not, is not supported.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import device_mesh, distributed_c10d

from moetion_lightning.distributed.sockets import Recorder
from moetion_lightning.errors import ConfigurationError, RankLostError

__all__ = ["Communicators", "join_seconds", "nccl_environment", "replace_everywhere"]

_log = logging.getLogger(__name__)
_ABORT_SECONDS = 30.0
_DEVICE_SECONDS = 30.0
_OWN = ("moetion_lightning", "lightning", "pytorch_lightning")
_PASSING = ("torch", "contextlib", "functools", __name__)


def nccl_environment(world_size: int = 1) -> dict[str, str]:
    """What the launcher's agent sets for its ranks, so that a survivor of a loss may live.

    ======================================= ====== =============================================================
    variable                                value  why
    ======================================= ====== =============================================================
    ``TORCH_NCCL_ASYNC_ERROR_HANDLING``     0      the watchdog must not end the process when a peer is gone
    ``TORCH_NCCL_ENABLE_MONITORING``        0      nor the thread that watches the watchdog
    ``TORCH_NCCL_RETHROW_CUDA_ERRORS``      0      nor an error that the watchdog finds after an abort
    ``TORCH_NCCL_PROPAGATE_ERROR``          0      a rank does not end the others: the launcher tells them
    ``TORCH_NCCL_USE_COMM_NONBLOCKING``     1      a communicator that is being set up can be aborted
    ``TORCH_NCCL_NONBLOCKING_TIMEOUT``      grows  seconds of a set-up: the start's 600, and :func:`join_seconds`
    ======================================= ====== =============================================================

    Args:
        world_size: Ranks of the job.
    """
    return {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
        "TORCH_NCCL_ENABLE_MONITORING": "0",
        "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
        "TORCH_NCCL_PROPAGATE_ERROR": "0",
        "TORCH_NCCL_USE_COMM_NONBLOCKING": "1",
        "TORCH_NCCL_NONBLOCKING_TIMEOUT": f"{600 + join_seconds(world_size):.0f}",
    }


def join_seconds(world_size: int) -> float:
    """How long the ranks of a new membership may take to connect: gloo needs about 0.15 s for each of 8,000 ranks."""
    return 60.0 + 0.25 * world_size


def replace_everywhere(name: str, original: Any, new: Any) -> None:
    """Put a function in place of another in all modules that have it, also those that imported it by its name."""
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(name) is original:
            setattr(module, name, new)


class Communicators:
    """All communicators of this process.

    Groups that the script makes itself are refused: nothing would make them anew for the survivors and a newcomer, and
    a collective in a group that was destroyed returns in silence without a result.

    Args:
        store_ports: Ports of the stores; connections to them are not a group's.
    """

    def __init__(self, store_ports: Collection[int] = ()) -> None:
        self._pairs = Recorder(store_ports)
        self._stores = Recorder()
        self._patched: list[tuple[str, Any, Any]] = []

    def install(self) -> None:
        """Take notice of every group from now on."""
        wraps = (
            (distributed_c10d, "_new_process_group_helper", self._record),
            (distributed_c10d, "split_group", _refusing),
            (device_mesh, "init_device_mesh", _refusing),
        )
        for module, name, wrap in wraps:
            original = getattr(module, name)
            wrapped = wrap(original)
            replace_everywhere(name, original, wrapped)
            self._patched.append((name, original, wrapped))

    def remove(self) -> None:
        """Take :meth:`install` back."""
        for name, original, wrapped in self._patched:
            replace_everywhere(name, wrapped, original)
        self._patched.clear()

    @contextlib.contextmanager
    def connecting(self) -> Iterator[None]:
        """Around the opening of a store for a new group, whose waits have no deadline."""
        with self._stores.recording():
            yield

    def abort(self) -> None:
        """From any thread: whoever waits in a collective gets an error. Never raises; harmless without groups."""
        if not _in_time(_abort_backends, _ABORT_SECONDS):
            _log.warning(
                "aborting the communicators took longer than %.0f s: the process goes on without", _ABORT_SECONDS
            )
        ended = self._pairs.shut_down() + self._stores.shut_down()
        _log.debug("ended %d connections of process groups", ended)

    def give_up(self) -> None:
        """Abort all groups and forget them. An error on the way does not matter: nobody uses them again."""
        self.abort()
        if dist.is_initialized():
            _forget()

    def check_device(self) -> None:
        """Whether this process can go on.

        Raises:
            RankLostError: Its accelerator does not work any more (errors of CUDA stay until the process ends): another
                process must take its place.
        """
        if not torch.cuda.is_available() or not torch.cuda.is_initialized():
            return
        errors: list[Exception] = []

        def probe() -> None:
            try:
                torch.cuda.synchronize()
            except Exception as error:
                errors.append(error)

        if not _in_time(probe, _DEVICE_SECONDS):
            errors.append(TimeoutError(f"no answer within {_DEVICE_SECONDS:.0f} s"))
        if errors:
            first = (str(errors[0]).splitlines() or [type(errors[0]).__name__])[0]
            raise RankLostError(
                f"the accelerator of this process is in an error state after a rank was lost ({first}): this process "
                "ends, and the launcher starts another one in its place."
            ) from errors[0]

    def _record(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def make(group_size: int, group_rank: int, ranks: list[int], *args: Any, **kwargs: Any) -> Any:
            if ranks:  # not the default group
                _refuse_script()
            with self._pairs.recording():
                return original(group_size, group_rank, ranks, *args, **kwargs)

        return make


def _refusing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def make(*args: Any, **kwargs: Any) -> Any:
        _refuse_script()
        return original(*args, **kwargs)

    return make


def _refuse_script() -> None:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _room(frame) in _PASSING:
        frame = frame.f_back
    if frame is not None and _room(frame) not in _OWN:
        raise ConfigurationError(
            f"{frame.f_code.co_filename}:{frame.f_lineno} makes a process group or device mesh of its own. Under "
            "`moetion launch` processes live on when a rank is lost, and such a group would not be made anew: its "
            "collectives would do nothing. Use the default group, self.device_mesh of ModelParallelStrategy, or start "
            "the script with torchrun, which restarts all ranks."
        )


def _room(frame: FrameType) -> str:
    name = str(frame.f_globals.get("__name__", ""))
    return name if name in _PASSING else name.split(".")[0]


def _abort_backends() -> None:
    try:
        groups = _groups_to_abort()
    except Exception as error:
        _log.warning("the process groups cannot be listed: %s", error)
        return
    nccl = None
    if dist.is_nccl_available():
        backends = [_cuda_backend(group) for group in groups]
        nccl = next((b for b in backends if isinstance(b, distributed_c10d.ProcessGroupNCCL)), None)
    # In one group call: aborts of several communicators would wait for each other (pytorch#119797).
    if nccl is not None:
        nccl._group_start()
    for group in groups:
        try:
            group.abort()
        except Exception as error:
            _log.warning("aborting a process group failed: %s", error)
    if nccl is not None:
        nccl._group_end()


def _groups_to_abort() -> list[Any]:
    """Groups that have another backend than gloo, newest first."""
    world = distributed_c10d._world
    for _ in range(10):
        try:
            names = dict(world.pg_names)
            break
        except RuntimeError:  # another thread makes one
            continue
    else:
        names = {}
    others = [group for group, config in dict(world.pg_backend_config).items() if not _is_gloo(config)]
    return sorted((group for group in others if group in names), key=lambda group: names[group], reverse=True)


def _is_gloo(config: str) -> bool:
    return all(part.rpartition(":")[2] in ("gloo", "fake") for part in config.split(","))


def _cuda_backend(group: Any) -> Any:
    try:
        return group._get_backend(torch.device("cuda"))
    except RuntimeError:
        return None


def _forget() -> None:
    """What ``_abort_process_group`` does after its aborts, of which one that fails would end it."""
    world = distributed_c10d._world
    distributed_c10d._update_default_pg(None)
    for kept in (
        world.pg_map,
        world.pg_names,
        world.pg_group_ranks,
        world.pg_backend_config,
        world.pg_to_tag,
        world.tags_to_pg,
        world.pg_coalesce_state,
    ):
        kept.clear()
    distributed_c10d._unregister_all_process_groups()  # type: ignore[attr-defined]
    world.group_count = 0


def _in_time(work: Callable[[], None], seconds: float) -> bool:
    thread = threading.Thread(target=work, name="moetion-abort", daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()
