"""Text data without a download: the source files of the Python standard library, byte by byte."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from moetion_lightning.errors import ConfigurationError

__all__ = ["ByteWindows", "StdlibText", "read_stdlib_bytes"]


def read_stdlib_bytes(max_bytes: int) -> bytes:
    """The first ``max_bytes`` bytes of the standard library's own source text.

    The rule is fixed: the ``*.py`` files directly in the standard library's folder, sorted by name, without those whose
    name begins with an underscore (some of them are written by the build). So every process of one interpreter reads
    the same bytes.

    Args:
        max_bytes: Upper bound of the size, bytes.

    Raises:
        ConfigurationError: This interpreter was installed without its source files.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = bytearray()
    for path in sorted(folder.glob("[!_]*.py")):
        text += path.read_bytes()
        if len(text) >= max_bytes:
            break
    if not text:
        raise ConfigurationError(f"no Python source files in {folder}: this interpreter has no standard library text")
    return bytes(text[:max_bytes])


class ByteWindows(Dataset[dict[str, Tensor]]):
    """Non-overlapping windows of a byte string, each with its index.

    Args:
        text: 1-d uint8 tensor on the CPU.
        seq_len: Tokens an item. The text's tail that does not fill a window is left out.
        first_id: Identity of item 0 (``sample_id`` of the others follow).
    """

    def __init__(self, text: Tensor, seq_len: int, first_id: int = 0) -> None:
        self._windows = text[: text.numel() // seq_len * seq_len].view(-1, seq_len)
        self._first_id = first_id

    def __len__(self) -> int:
        return self._windows.shape[0]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._windows[index].long(), "sample_id": torch.tensor(self._first_id + index)}


class StdlibText(LightningDataModule):
    """Byte-level text of the Python standard library's own source files: real text, no download, 256 symbols.

    Batches are dictionaries: ``input_ids`` (int64, ``[batch, seq_len]``) and ``sample_id`` (int64, ``[batch]``).

    Args:
        seq_len: Tokens (bytes) a sample.
        batch_size: Samples a batch.
        max_bytes: Upper bound of the text's size, bytes.
        val_fraction: Share of the samples held out for validation (the text's end); 0 for no validation set.
        seed: Seed of the order of the training samples, independent of ``seed_everything``; None to shuffle with the
            global generator.
        num_workers: Worker processes of each loader; 0 loads in the training process.
        drop_last: Leave out the last batch of an epoch when it is smaller than the others.
    """

    def __init__(
        self,
        seq_len: int = 64,
        batch_size: int = 8,
        max_bytes: int = 1_000_000,
        val_fraction: float = 0.05,
        seed: int | None = 0,
        num_workers: int = 0,
        drop_last: bool = True,
    ) -> None:
        super().__init__()
        if seq_len < 2:
            raise ConfigurationError(f"StdlibText(seq_len={seq_len}): a sample needs at least 2 tokens")
        if not 0.0 <= val_fraction < 1.0:
            raise ConfigurationError(f"StdlibText(val_fraction={val_fraction}): expected a value in [0, 1)")
        if max_bytes < seq_len * (batch_size + 1):
            raise ConfigurationError(
                f"StdlibText(max_bytes={max_bytes}): less than one batch of {batch_size} x {seq_len} bytes; raise it"
            )
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.max_bytes = max_bytes
        self.val_fraction = val_fraction
        self.seed = seed
        self.num_workers = num_workers
        self.drop_last = drop_last
        self._train: ByteWindows | None = None
        self._val: ByteWindows | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read the text and split it. Ranks: none (each process reads the same bytes)."""
        if self._train is not None:
            return
        raw = bytearray(read_stdlib_bytes(self.max_bytes))
        text = torch.frombuffer(raw, dtype=torch.uint8).clone()
        samples = text.numel() // self.seq_len
        held_out = int(samples * self.val_fraction)
        cut = (samples - held_out) * self.seq_len
        self._train = ByteWindows(text[:cut], self.seq_len)
        self._val = ByteWindows(text[cut:], self.seq_len, first_id=samples - held_out)

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Shuffled training samples."""
        if self._train is None:
            self.setup()
        assert self._train is not None
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        return DataLoader(
            self._train,
            batch_size=self.batch_size,
            shuffle=True,
            generator=generator,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            drop_last=self.drop_last,
        )

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]] | list[DataLoader[dict[str, Tensor]]]:
        """Held-out samples in order; no loader at all when there are none."""
        if self._val is None:
            self.setup()
        assert self._val is not None
        if len(self._val) == 0:
            return []
        return DataLoader(self._val, batch_size=self.batch_size, num_workers=self.num_workers)
