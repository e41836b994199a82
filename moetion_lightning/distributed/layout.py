"""Which ranks hold the same bytes of a parameter, and where a shard begins."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

__all__ = ["holders", "row_offset", "shard_box"]


def holders(parameter: Tensor, world_size: int) -> tuple[int, ...]:
    """Ranks that hold a copy of what this rank holds of the parameter, itself included.

    Args:
        parameter: A plain tensor is taken to be replicated everywhere; a DTensor along its mesh's replicating
            dimensions.
        world_size: Number of ranks.
    """
    if not isinstance(parameter, DTensor):
        return tuple(range(world_size))
    mesh = parameter.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None  # this rank holds the parameter, so it is in the mesh
    index = tuple(
        slice(None) if placement.is_replicate() else position
        for placement, position in zip(parameter.placements, coordinate)
    )
    return tuple(sorted(int(rank) for rank in mesh.mesh[index].reshape(-1).tolist()))


def row_offset(parameter: Tensor) -> int | None:
    """Global row of the first row that this rank holds of a DTensor; None for a plain tensor."""
    if not isinstance(parameter, DTensor):
        return None
    if not parameter.dim():
        return 0
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return int(offset[0])


def shard_box(parameter: Tensor) -> tuple[list[int], list[int] | None] | None:
    """Where this rank's part of a parameter lies in the whole; None where this rank holds all of it.

    Returns:
        The whole parameter's shape, and the position of the local shard's first element in it; None for the position
        where the shard is no box (sharded over several dimensions of a mesh).
    """
    if not isinstance(parameter, DTensor):
        return None
    cut = [placement for placement in parameter.placements if not placement.is_replicate()]
    if not cut:
        return None
    shape = list(parameter.shape)
    if len(cut) > 1 or type(cut[0]) is not Shard:
        return shape, None
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return shape, [int(start) for start in offset]
