"""Gradient buckets of ``DistributedDataParallel``, made the same after a restart.

An all-reduce adds up the ranks' gradients in an order that depends on where a value lies in its bucket, so with three
or more ranks the last bits of a sum depend on the layout of the buckets. DDP lays them out twice: by the order of the
parameters before the first iteration, and by the order in which gradients arrived in it from the second iteration on.
A restarted process would use the first layout again for one iteration. So the layout is saved with the training state,
and a new reducer is taken through a backward of zeros in that order before it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch.nn.parallel import DistributedDataParallel

__all__ = ["bucket_order", "set_bucket_order"]

#: The second layout of a wrapper is its last one.
_known: WeakKeyDictionary[DistributedDataParallel, list[int]] = WeakKeyDictionary()
_SAMPLE_RATE = 100  # torch's own


def bucket_order(ddp: DistributedDataParallel) -> list[int]:
    """Indices of the parameters in the order in which the buckets hold them; empty while the first layout is used.

    A layout that the next forward would make is made now: all ranks must call this at the same place.
    """
    if _has_one_layout(ddp):
        return []
    if ddp not in _known:
        ddp.reducer._rebuild_buckets()
        order = _read_order(ddp)
        if not order:
            return []
        _known[ddp] = order
    return list(_known[ddp])


def set_bucket_order(ddp: DistributedDataParallel, order: Sequence[int]) -> None:
    """Lay the buckets of a new reducer out as :func:`bucket_order` said; gradients go. All ranks must call this.

    Args:
        ddp: A wrapper that has not run yet.
        order: From :func:`bucket_order`; empty keeps the first layout.
    """
    if not order or ddp in _known or _has_one_layout(ddp):
        return
    parameters, sparse = ddp._build_params_for_reducer()
    if any(sparse):  # their gradients are not in the buckets' memory
        return
    ddp.reducer.prepare_for_backward([])
    with torch.enable_grad():
        for index in order:
            (parameters[index].sum() * 0).backward()
    for parameter in parameters:
        parameter.grad = None
    ddp.reducer._rebuild_buckets()
    _known[ddp] = list(order)


def _has_one_layout(ddp: DistributedDataParallel) -> bool:
    """Whether the first layout is the only one. Captured with the other kind, a run goes on with other sums' order."""
    return bool(ddp.find_unused_parameters and not ddp.static_graph)


def _read_order(ddp: DistributedDataParallel) -> list[int]:
    # DDP notes its layout in the next forward, of the first ten and then of every hundredth one.
    ddp.reducer._set_ddp_runtime_logging_sample_rate(1)
    assert ddp.logger is not None  # made with the wrapper
    ddp.logger.set_runtime_stats_and_log()
    ddp.reducer._set_ddp_runtime_logging_sample_rate(_SAMPLE_RATE)
    buckets = str(ddp._get_ddp_logging_data().get("rebuilt_per_bucket_param_indices", ""))
    return [int(index) for bucket in buckets.split(",") for index in bucket.split()]
