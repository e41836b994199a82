"""Quantities as people write them: ``671B`` parameters, ``25GB/s``, ``10min``."""

from __future__ import annotations

import math
import re

from moetion_lightning.errors import ConfigurationError

__all__ = ["byte_count", "count", "count_text", "duration", "number_text", "percent_text", "time_text"]

_COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
_BYTES = {
    **{f"{prefix}b": factor for prefix, factor in (("", 1.0), ("k", 1e3), ("m", 1e6), ("g", 1e9), ("t", 1e12))},
    **{f"{prefix}ib": float(1 << shift) for prefix, shift in (("k", 10), ("m", 20), ("g", 30), ("t", 40))},
    "": 1.0,
}
_SECONDS = {"": 1.0, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def count(text: str) -> float:
    """``671B`` -> 671e9; k, M, B (or G) and T are decimal.

    Raises:
        ConfigurationError: It is no such quantity.
    """
    return _parse(text, _COUNTS, "a number, with k, M, B or T behind it, e.g. 671B")


def count_text(number: float) -> str:
    """``671B``, ``1.3B``, ``57M``: three digits."""
    for unit in ("", "k", "M", "B"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"


def number_text(number: int, noun: str) -> str:
    """``1 rank``, ``16,384 ranks``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def time_text(seconds: float) -> str:
    """``20 ms``, ``1.5 s``, ``10 min``, ``4.17 d``, ``31.7 years``: three digits, and no 0 for what is short."""
    years = seconds / (365 * 86400.0)
    if years >= 1000:
        return f"{years:,.0f} years"
    for unit, length in (("years", 365 * 86400.0), ("d", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds * 1e3:.3g} ms" if seconds else "0 s"


def percent_text(share: float) -> str:
    """``0.10%``, and without digits from 1,000% on, where two more would say nothing."""
    return f"{share:.2%}" if share < 10 else f"{share:,.0%}"


def byte_count(text: str) -> float:
    """``25GB/s`` or ``25GB`` -> 25e9; ``64GiB`` -> 64 x 2**30.

    Raises:
        ConfigurationError: It is no such quantity.
    """
    return _parse(text.removesuffix("/s"), _BYTES, "bytes, with kB, MB, GB, TB or KiB .. TiB behind it, e.g. 25GB/s")


def duration(text: str) -> float:
    """``10min`` -> 600; ms, s, min, h and d.

    Raises:
        ConfigurationError: It is no such quantity.
    """
    return _parse(text, _SECONDS, "a time, with ms, s, min, h or d behind it, e.g. 10min")


def _parse(text: str, units: dict[str, float], expected: str) -> float:
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-z]*)\s*", text.lower())
    factor = None if found is None else units.get(found[2])
    if found is None or factor is None or not math.isfinite(float(found[1])):
        raise ConfigurationError(f"{text!r}: expected {expected}")
    return float(found[1]) * factor
