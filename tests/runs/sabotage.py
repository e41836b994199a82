"""Negative controls: one part of a restore is left out. The comparison must notice each of them."""

from __future__ import annotations

from typing import Any


def apply(what: str) -> None:
    SABOTAGE[what]()


def _activation() -> None:
    from moetion_lightning.core import reconstruct

    original = reconstruct.write_active
    left_out: list[str] = []

    def write_active(live: Any, operators: Any, load: Any, scalars: Any) -> None:
        operators = list(operators)
        if operators and not left_out:
            left_out.append(operators[0].name)
        original(live, [op for op in operators if op.name not in left_out], load, scalars)

    reconstruct.write_active = write_active


def _adam_step() -> None:
    from moetion_lightning.core import reconstruct, state

    original = state.write_active

    def write_active(live: Any, operators: Any, load: Any, scalars: Any) -> None:
        operators = list(operators)
        original(live, operators, load, scalars)
        for op in operators:
            for piece in op.pieces:
                entries = live.optimizer_state(piece.parameter)
                if "step" in entries:
                    entries["step"] += 1

    reconstruct.write_active = write_active


def _rng() -> None:
    from moetion_lightning import data_position
    from moetion_lightning.callbacks import _data_seam
    from moetion_lightning.engine import run_state

    for module in (run_state, _data_seam, data_position):  # fetching puts generators back, too
        module.set_rng = lambda *args, **kwargs: None


def _data_position() -> None:
    from moetion_lightning.callbacks import _data_seam

    _data_seam.DataSeam.restore = lambda self, state: None


def _buffers() -> None:
    import torch

    from moetion_lightning.engine import run_state

    def write_buffers(module: Any, saved: Any) -> None:
        with torch.no_grad():
            for buffer in module.buffers():
                buffer.zero_()

    run_state.write_buffers = write_buffers


def _scheduler() -> None:
    from torch.optim.lr_scheduler import LambdaLR

    LambdaLR.load_state_dict = lambda self, state: None


SABOTAGE = {
    "activation": _activation,
    "adam_step": _adam_step,
    "rng": _rng,
    "data_position": _data_position,
    "buffers": _buffers,
    "scheduler": _scheduler,
}
