"""Plain values and tensors between ranks, over a process group of the training; no pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_group

__all__ = [
    "broadcast_json",
    "broadcast_tensors",
    "receive_message",
    "receive_state",
    "send_message",
    "send_state",
    "sum_over_ranks",
]

Spec = list[Any]


def _spec_of(tensor: Tensor) -> Spec:
    """Dtype and shape of a tensor, as JSON."""
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]


def _tensor_like(spec: Spec, device: torch.device) -> Tensor:
    """Memory for a tensor of this dtype and shape."""
    return torch.empty(spec[1], dtype=getattr(torch, spec[0]), device=device)


def _encode(value: Any, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)


def _decode(text: Tensor) -> Any:
    return json.loads(bytes(text.cpu().numpy()).decode())


def _bytes_of(tensor: Tensor) -> Tensor:
    """The tensor's memory as bytes: backends know few dtypes."""
    return tensor.reshape(-1).view(torch.uint8)


def sum_over_ranks(counts: Tensor) -> Tensor:
    """The sum of an integer tensor over the default process group, exact and on the host.

    Args:
        counts: int64, on the host; the same shape on all ranks.

    Ranks:
        All ranks of the job, together.
    """
    group = _get_default_group()
    kinds = [kind.type for kind in group._device_types]
    device = torch.device("cpu") if "cpu" in kinds else torch.device(kinds[0])
    total = counts.to(device, copy=True)
    if total.numel():
        dist.all_reduce(total)
    return total.cpu()


def broadcast_json(value: Any, source: int, group: dist.ProcessGroup, device: torch.device) -> Any:
    """A JSON value of one rank on all ranks of a group.

    Args:
        value: On the source rank; ignored elsewhere.
        source: Place of that rank in the group.
        group: The group.
        device: What the group communicates from.

    Ranks:
        All ranks of the group, together.
    """
    mine = dist.get_rank(group) == source
    text = _encode(value, device) if mine else torch.empty(0, dtype=torch.uint8, device=device)
    size = torch.tensor([text.numel()], dtype=torch.int64, device=device)
    dist.broadcast(size, group=group, group_src=source)
    if not mine:
        text = torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.broadcast(text, group=group, group_src=source)
    return value if mine else _decode(text)


def broadcast_tensors(
    tensors: Sequence[Tensor], source: int, group: dist.ProcessGroup, device: torch.device, extra: Any = None
) -> tuple[list[Tensor], Any]:
    """Tensors of one rank, and a JSON value, on all ranks of a group; as :func:`broadcast_json`."""
    mine = dist.get_rank(group) == source
    header = broadcast_json([[_spec_of(t) for t in tensors], extra], source, group, device)
    specs, extra = header
    result = list(tensors) if mine else [_tensor_like(spec, device) for spec in specs]
    for tensor in result:
        if tensor.numel():
            dist.broadcast(_bytes_of(tensor.detach().contiguous()), group=group, group_src=source)
    return result, extra


def send_message(header: Any, tensors: Sequence[Tensor], to: int, device: torch.device) -> None:
    """Send a JSON value and tensors (on any device) to a global rank, which calls :func:`receive_message`."""
    text = _encode([header, [_spec_of(t) for t in tensors]], device)
    dist.send(torch.tensor([text.numel()], dtype=torch.int64, device=device), to)
    dist.send(text, to)
    for tensor in tensors:
        if tensor.numel():
            dist.send(_bytes_of(tensor.detach().to(device).contiguous()), to)


def receive_message(source: int, device: torch.device, keep: torch.device | None = None) -> tuple[Any, list[Tensor]]:
    """Receive what a global rank sends with :func:`send_message`.

    Args:
        source: The rank.
        device: What the process group communicates from.
        keep: Where the tensors end; None leaves them on ``device``.
    """
    size = torch.zeros(1, dtype=torch.int64, device=device)
    dist.recv(size, source)
    text = torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.recv(text, source)
    header, specs = _decode(text)
    tensors = []
    for spec in specs:
        tensor = _tensor_like(spec, device)
        if tensor.numel():
            dist.recv(_bytes_of(tensor), source)
        tensors.append(tensor if keep is None else tensor.to(keep))
    return header, tensors


def send_state(tensors: Sequence[tuple[str, Tensor]], header: Mapping[str, Any], to: int, device: torch.device) -> None:
    """Send tensors by name, and plain values, to a global rank, which calls :func:`receive_state`."""
    send_message([[name for name, _ in tensors], dict(header)], [t for _, t in tensors], to, device)


def receive_state(source: int, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Receive what ``source`` sends. Returns the tensors by name, on ``device``, and the header."""
    (names, header), tensors = receive_message(source, device)
    return dict(zip(names, tensors)), header
