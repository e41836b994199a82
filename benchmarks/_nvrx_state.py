"""NVRx's tensor-aware state for the CPU. A module of its own: NVRx pickles the class by its name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from _trees import replace, replace_tensors, tensors_of
from nvidia_resiliency_ext.checkpointing.local.base_state_dict import TensorAwareStateDict
from torch import Tensor

__all__ = ["CPUStateDict"]


@dataclass(frozen=True)
class _Hole:
    """Where a tensor was."""

    index: int


class CPUStateDict(TensorAwareStateDict):
    """Clones tensors, for NVRx empties what it is given and would alias them."""

    def __init__(self, state: dict[str, Any]) -> None:
        self._state: Any = state
        self._tensors_out: list[Tensor] | None = None

    def pop_tensors(self) -> list[Tensor]:
        taken: list[Tensor] = []
        self._state = replace_tensors(self._state, lambda t: (taken.append(t), _Hole(len(taken) - 1))[1])
        self._tensors_out = None
        return taken

    @property
    def tensors(self) -> Any:
        return iter(tensors_of(self._state))

    @property
    def is_hollow(self) -> bool:
        return not tensors_of(self._state)

    def insert_tensors(self, tensor_data: Iterable[Tensor]) -> None:
        tensors = list(tensor_data)
        self._state = replace(self._state, _Hole, lambda hole: tensors[hole.index])

    def init_tensors(self) -> None:
        raise NotImplementedError

    def copy_tensors_to_cpu(self, non_blocking: bool = False) -> None:
        self._state = replace_tensors(self._state, lambda t: t.detach().clone())

    def restore_tensor_device(self, non_blocking: bool = True) -> None:
        return None

    def to_state_dict(self) -> dict[str, Any]:
        return self._state
