"""Device meshes and FSDP2 modules that outlive their process groups.

Sharded parameters, their gradients and their optimizer state refer to a device mesh, and the mesh to process groups by
name. When groups were destroyed and made anew, the mesh gets the new ones; all tensors stay as they are.
"""

from __future__ import annotations

import gc
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule

from moetion_lightning.errors import RankLostError

__all__ = ["can_outlive_groups", "drop_groups", "rebind"]


def can_outlive_groups() -> bool:
    """Whether this version of torch can take an FSDP2 module back from an iteration that failed half-way."""
    return hasattr(FSDPModule, "reset_iter_state")


def drop_groups(module: nn.Module) -> None:
    """An iteration was broken off: free its buffers, and every reference to the groups that are to be destroyed."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            state: Any = part._get_fsdp_state()
            for group in state._fsdp_param_groups:
                group._all_gather_result = None  # its work belongs to a broken group: never wait for it
                for parameter in group.fsdp_params:
                    # Gradients that were not reduced yet: nobody else clears them, and they would be added to the next.
                    parameter.unsharded_accumulated_grad = None
                    if hasattr(parameter, "_unsharded_param"):
                        parameter._unsharded_param.grad = None
            if state._is_root:
                state._comm_ctx.all_gather_state = None
                part.reset_iter_state()
            for info in _infos(state):
                info.shard_process_group = info.reduce_scatter_process_group = None
                if hasattr(info, "replicate_process_group"):
                    info.replicate_process_group = None
    for mesh in _meshes():
        mesh._pg_registry.clear()


def rebind(root: DeviceMesh, module: nn.Module) -> None:
    """Give a mesh, and all that was cut from it, new groups in place of the destroyed ones. All ranks call it together.

    Args:
        root: The mesh; the same shape on all ranks.
        module: The module whose parameters are sharded over it.

    Raises:
        RankLostError: The module uses a mesh of its own, whose groups are not known here.
    """
    fresh = init_device_mesh(root.device_type, tuple(root.mesh.shape), mesh_dim_names=root.mesh_dim_names)
    renamed = dict(zip(_names(root), _names(fresh)))
    for mesh in _meshes():
        if mesh is root or mesh._get_root_mesh() is root:
            mesh._dim_group_names = [renamed[name] for name in _names(mesh)]
    root._pg_registry.update(fresh._pg_registry)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            if part._get_fsdp_state()._is_root:
                part.reset_iter_state()  # nothing that was gathered before is good now
            for info in _infos(part._get_fsdp_state()):
                if info.mesh._get_root_mesh() is not root:
                    raise RankLostError(
                        f"{type(part).__name__} is sharded over a device mesh of its own: only the strategy's mesh can "
                        "be rebuilt while processes live on. Use self.device_mesh in configure_model()."
                    )
                type(info).__post_init__(info)


def _names(mesh: Any) -> list[str]:
    return list(mesh._dim_group_names)


def _meshes() -> list[Any]:
    return [found for found in gc.get_objects() if isinstance(found, DeviceMesh)]


def _infos(state: Any) -> list[Any]:
    found = {}
    for group in state._fsdp_param_groups:
        for info in (group.mesh_info, group.post_forward_mesh_info):
            if info is not None:
                found[id(info)] = info
    return list(found.values())
