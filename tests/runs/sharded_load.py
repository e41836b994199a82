"""Ranks that load a checkpoint of torch.distributed.checkpoint into a sharded module. Runs in child processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from moetion_lightning.testing.compare import flatten_state, write_state
from tests.runs.models import Automatic
from tests.runs.scenario import DEFAULTS


def run(given: dict[str, Any]) -> None:
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (given["ranks"],))
    torch.manual_seed(5)
    module = Automatic({**DEFAULTS, **given})
    for block in module.body.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(module.body, mesh=mesh)
    optimizer = module.configure_optimizers()["optimizer"]
    model, optimizers = get_state_dict(module, optimizer)
    state = {"model": model, "optimizer": optimizers}
    state_dict_loader.load(state, checkpoint_id=given["folder"])
    set_state_dict(module, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    rank = int(os.environ["RANK"])
    write_state(Path(given["out"]) / f"loaded-{rank}.safetensors", *flatten_state(module, [optimizer]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
