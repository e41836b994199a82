"""Bytes in, bytes out: snapshot files, window manifests and the tiers that hold them."""

from __future__ import annotations

__all__: list[str] = []
