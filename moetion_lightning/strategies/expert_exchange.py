"""The exchange of token rows between the ranks of an expert-parallel group, forward and backward.

Every collective here must run on all ranks of the group, also on one that has no token for anybody. Forward that is
the callers' business; backward it is autograd's, which visits only what the loss depends on. Hence the *token*, an
empty tensor that runs from the first exchange of a layer through its last into the layer's output (:func:`tie`), so
that a rank without rows visits the same nodes as the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.strategies.expert_layout import ExpertGroups

__all__ = ["all_to_all", "exchange", "exchange_integers", "new_token", "tie", "touch"]


def all_to_all(groups: ExpertGroups, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    """Send row blocks to each rank of the group and receive theirs.

    Args:
        groups: The groups of this rank.
        rows: ``[sum(sent), ...]``, ordered by destination.
        sent: Rows for each rank.
        received: Rows from each rank.

    Returns:
        ``[sum(received), ...]``, ordered by source.

    Ranks:
        The expert-parallel group, together.
    """
    result = rows.new_empty((sum(received), *rows.shape[1:]))
    dist.all_to_all_single(result, rows.contiguous(), list(received), list(sent), group=groups.expert)
    return result


def exchange_integers(groups: ExpertGroups, values: Sequence[Sequence[int]], device: torch.device) -> list[list[int]]:
    """Send a list of integers to each rank; every rank receives lists of one length from all.

    Args:
        groups: The groups of this rank.
        values: What goes to each rank of the group.
        device: A device that the group's backend can send from.

    Ranks:
        The expert-parallel group, together.
    """
    own = len(values[groups.position])
    flat = torch.tensor([value for block in values for value in block], dtype=torch.int64, device=device)
    answer = all_to_all(groups, flat, [len(block) for block in values], [own] * len(values)).tolist()
    return [answer[start : start + own] for start in range(0, len(answer), own)]


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, groups: ExpertGroups, sent: list[int], received: list[int], token: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.groups, ctx.sent, ctx.received = groups, sent, received
        return (torch.empty_like(token), *(all_to_all(groups, tensor, sent, received) for tensor in tensors))

    @staticmethod
    def backward(ctx: Any, grad_token: Tensor, *grads: Tensor) -> tuple[Any, ...]:
        # Always all of them, whichever inputs need a gradient here: the other ranks may need it.
        back = (all_to_all(ctx.groups, grad, ctx.received, ctx.sent) for grad in grads)
        return None, None, None, grad_token, *back


def new_token(device: torch.device) -> Tensor:
    """The start of a layer's chain: requires a gradient, so that the backward pass reaches the first exchange."""
    # A dtype of its own: activation checkpointing compares it, and the default dtype may change until the backward.
    return torch.zeros(0, dtype=torch.float32, device=device, requires_grad=torch.is_grad_enabled())


def exchange(
    groups: ExpertGroups, sent: list[int], received: list[int], token: Tensor, *tensors: Tensor
) -> tuple[Tensor, ...]:
    """:func:`all_to_all` of several tensors, with gradients.

    Args:
        groups: The groups of this rank.
        sent: Rows for each rank.
        received: Rows from each rank.
        token: The chain so far.
        *tensors: Tensors of ``sum(sent)`` rows.

    Returns:
        The chain, and the received tensors.

    Ranks:
        The expert-parallel group, together; forward, and backward if gradients are enabled.
    """
    result: tuple[Tensor, ...] = _Exchange.apply(groups, sent, received, token, *tensors)  # type: ignore[no-untyped-call]
    return result


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, token: Tensor) -> Tensor:
        # Saved so that activation checkpointing, which stops a recomputation after the last saved tensor, repeats the
        # layer to its end on every rank.
        ctx.save_for_backward(token)
        # A copy: autograd refuses in-place operations on a view that a Function made.
        return output.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (token,) = ctx.saved_tensors
        return grad, torch.zeros_like(token)


def tie(output: Any, token: Tensor, where: str) -> Any:
    """Make a layer's output depend on the chain.

    Args:
        output: What the layer returns: a tensor, or tensors in tuples, lists and dictionaries.
        token: The end of the chain.
        where: Name of the layer, for errors.

    Raises:
        ConfigurationError: There is no floating-point tensor in the output.
    """
    if not token.requires_grad:
        return output
    leaves, structure = tree_flatten(output)
    floating = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    chosen = [i for i in floating if leaves[i].requires_grad] or floating[:1]
    if not chosen:
        raise ConfigurationError(
            f"MoE layer {where!r} returns {type(output).__name__} without a floating-point tensor in it; expert "
            "parallelism needs one (in tuples, lists or dictionaries) to order its backward pass"
        )
    for index in chosen:
        leaves[index] = _Tie.apply(leaves[index], token)  # type: ignore[no-untyped-call]
    return tree_unflatten(leaves, structure)


class _Touch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return torch.empty_like(token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


def touch(token: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Let parameters that got no token have a zero gradient, as the unused rows of a fused parameter have."""
    result: Tensor = _Touch.apply(token, *parameters)  # type: ignore[no-untyped-call]
    return result
