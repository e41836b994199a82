"""Short digests of what an iteration saw: its batches, its gradients, the global random generators.

Two runs that did the same have the same digests, whatever process made them. Everything here is called on the training
thread in each iteration, so large tensors are looked at in a sample of elements, and nothing waits for a device: what
lies there is copied in the background and read later, on another thread.
"""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from moetion_lightning.core.device_random import device_states
from moetion_lightning.core.local import local

__all__ = ["Digest", "HostCopy", "bytes_of", "digest_of", "rng_digests", "sample_positions"]

_WHOLE_BYTES = 1 << 16  # up to this size a tensor or text is looked at whole
_SAMPLED = 512  # elements of a larger one
_MAX_ITEMS = 64  # of a longer list a sample is looked at
_MAX_LEAVES = 1024
_MAX_DEPTH = 8
_MAX_KNOWN = 256  # batches of varying length have many sizes
_MT19937_BYTES = 625 * 4  # numpy's state: 624 words and the position in them
_PLAIN = (bool, int, float, complex, str, bytes, type(None))

# Golden-ratio steps: evenly spread, and never in step with the rows of a tensor, whose ends are often padding.
_SPREAD = torch.sort(torch.arange(_SAMPLED, dtype=torch.float64) * 0.6180339887498949 % 1).values
_spread: dict[torch.device, Tensor] = {torch.device("cpu"): _SPREAD}
_positions: dict[tuple[int, int, torch.device, int], Tensor] = {}


def sample_positions(numel: int, device: torch.device, count: int = _SAMPLED) -> Tensor:
    """Positions in a flat tensor that are looked at: the same for each tensor of this size.

    Args:
        numel: Size of the tensor.
        device: Where the positions are needed.
        count: How many; at most 512.
    """
    # Each stream has its own: what was made on another one may not be there yet, or be freed too early.
    stream = torch.cuda.current_stream(device).stream_id if device.type == "cuda" else 0
    key = (numel, count, device, stream)
    found = _positions.get(key)
    if found is None:
        if len(_positions) >= _MAX_KNOWN:
            _positions.clear()
        if device not in _spread:
            _spread[device] = _SPREAD.to(device)  # the one copy that waits for the device
        found = _positions[key] = (_spread[device][:: _SAMPLED // count] * numel).long()
    return found


class HostCopy:
    """Small tensors on their way to the host: asked for here, and read on another thread.

    Values on the CPU are copied at once: whoever gave them may change them.

    Args:
        tensors: The tensors.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._copies: list[Tensor] = []
        self._events: list[torch.cuda.Event] = []
        devices: dict[torch.device, None] = {}
        for tensor in tensors:
            tensor = local(tensor.detach())
            if tensor.device.type == "cuda":
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                copy.copy_(tensor, non_blocking=True)
                devices[tensor.device] = None
            else:
                copy = tensor.clone()
            self._copies.append(copy)
        for device in devices:
            self._events.append(torch.cuda.current_stream(device).record_event())

    def read(self) -> list[Tensor]:
        """The values, on the host. Waits for the device."""
        for event in self._events:
            event.synchronize()
        return self._copies


class Digest:
    """A digest that may wait for samples from a device.

    Args:
        hasher: Has seen all that was on the host.
        samples: From devices, in order; None if there are none.
    """

    def __init__(self, hasher: xxhash.xxh3_64, samples: HostCopy | None) -> None:
        self._hasher = hasher
        self._samples = samples

    def read(self) -> str:
        """The digest. Waits for the device."""
        samples, self._samples = self._samples, None
        if samples is not None:
            for sample in samples.read():
                self._hasher.update(bytes_of(sample))
        return self._hasher.hexdigest()


def digest_of(value: object) -> Digest:
    """Digest of a batch: tensors and arrays, numbers and text, in lists, tuples, mappings and objects of any kind.

    Small tensors are looked at whole, of large ones a sample of elements. Of objects the attributes are looked at, of
    what cannot be looked into (images, open files) the type alone. Iterators are not moved.

    Args:
        value: The batch.
    """
    walk = _Walk()
    walk.add(value, 0)
    return Digest(walk.hasher, HostCopy(walk.samples) if walk.samples else None)


class _Walk:
    def __init__(self) -> None:
        self.hasher = xxhash.xxh3_64()
        self.samples: list[Tensor] = []
        self._leaves = 0

    def add(self, value: object, depth: int) -> None:
        self._leaves += 1
        if self._leaves > _MAX_LEAVES or depth > _MAX_DEPTH:
            return
        try:
            self._add(value, depth)
        except Exception:  # of a user's class, or a tensor without memory of its own: looking must not end training
            self._note("?")

    def _add(self, value: object, depth: int) -> None:
        if isinstance(value, Tensor):
            self._add_tensor(value)
        elif isinstance(value, _PLAIN):
            self._add_plain(value)
        elif isinstance(value, (np.ndarray, np.generic)):
            self._add_array(np.asarray(value))
        elif isinstance(value, Mapping):
            self._note(f"{{{len(value)}")
            for key, item in value.items():
                self.add(key, depth + 1)
                self.add(item, depth + 1)
        elif isinstance(value, (list, tuple)):
            self._add_sequence(value, depth)
        elif isinstance(value, (set, frozenset)):
            self._note(repr(sorted(map(repr, value))) if all(isinstance(v, _PLAIN) for v in value) else str(len(value)))
        elif isinstance(value, enum.Enum):
            self._note(f"{type(value).__qualname__}.{value.name}")
        else:
            self._add_object(value, depth)

    def _note(self, text: str) -> None:
        self.hasher.update(text.encode("utf-8", "surrogatepass"))

    def _add_plain(self, value: object) -> None:
        if isinstance(value, (str, bytes)) and len(value) > _WHOLE_BYTES:
            self._note(f"{len(value)}")
            value = value[:: len(value) // _SAMPLED]
        if isinstance(value, bytes):
            self.hasher.update(value)
        else:
            self._note(value if isinstance(value, str) else f"{type(value).__name__}{value!r}")

    def _add_sequence(self, value: Sequence[object], depth: int) -> None:
        self._note(f"[{len(value)}")
        if len(value) > _MAX_ITEMS:
            value = [value[index * len(value) // _MAX_ITEMS] for index in range(_MAX_ITEMS)]
        for item in value:
            self.add(item, depth + 1)

    def _add_object(self, value: object, depth: int) -> None:
        self._note(type(value).__qualname__)
        if isinstance(value, type) or callable(value) or hasattr(value, "__next__"):
            return
        names = [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else None
        for name in vars(value) if names is None and hasattr(value, "__dict__") else names or ():
            self._note(name)
            self.add(getattr(value, name, None), depth + 1)

    def _add_tensor(self, tensor: Tensor) -> None:
        self._note(f"{tensor.dtype}{tuple(tensor.shape)}")
        values = _values_of(tensor)
        if values.device.type == "cpu":
            self.hasher.update(bytes_of(values))
        elif values.device.type == "cuda":
            self.samples.append(values)

    def _add_array(self, array: np.ndarray[Any, Any]) -> None:
        self._note(f"{array.dtype}{array.shape}")
        if array.dtype.hasobject:
            self._add_sequence(array.reshape(-1)[:_MAX_ITEMS].tolist(), 0)
            return
        if array.nbytes > _WHOLE_BYTES:
            array = array.flat[sample_positions(array.size, torch.device("cpu")).numpy()]
        self.hasher.update(array.tobytes())


def _values_of(tensor: Tensor) -> Tensor:
    """All elements of a small tensor, a sample of a large one."""
    tensor = local(tensor)
    if tensor.numel() * tensor.element_size() <= _WHOLE_BYTES:
        return tensor
    positions = sample_positions(tensor.numel(), tensor.device)
    if tensor.is_contiguous():
        return tensor.view(-1).index_select(0, positions)
    return tensor[torch.unravel_index(positions, tensor.shape)]  # images with their channels last: never copied whole


def bytes_of(tensor: Tensor) -> Any:
    """The bytes of a tensor of any dtype, as an array on the host."""
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    return tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy()


def rng_digests() -> dict[str, str]:
    """Digests of python's, numpy's and torch's global generators, by name."""
    _, words, gauss = random.getstate()
    found = {
        "python": f"{hash(words) & (1 << 64) - 1:016x}" + ("" if gauss is None else float(gauss).hex()),
        "numpy": xxhash.xxh3_64_hexdigest(_numpy_state()),
        "torch": xxhash.xxh3_64_hexdigest(torch.get_rng_state().numpy().data),
    }
    kind, states = device_states()
    for index, state in enumerate(states):
        found[f"{kind}:{index}"] = xxhash.xxh3_64_hexdigest(state.numpy().data)
    return found


def _numpy_state() -> bytes:
    """The state of numpy's global generator; of the usual kind where it lies, since ``get_state`` takes 40 us."""
    generator: Any = np.random.get_bit_generator()  # type: ignore[attr-defined]
    if type(generator) is np.random.MT19937:
        return ctypes.string_at(generator.ctypes.state_address, _MT19937_BYTES)
    return repr(np.random.get_state(legacy=False)).encode()
