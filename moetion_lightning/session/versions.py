"""Versions of other libraries that were tested with this one: a newer one gets a notice, and is used."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import re

__all__ = ["NEWEST_TESTED", "notice_untested"]

_log = logging.getLogger(__name__)
#: The newest release of each that `make test-versions` was run with. Private names that we read may change after it.
NEWEST_TESTED = {"torch": "2.15", "lightning": "2.6", "transformers": "5.24", "accelerate": "1.15"}


@functools.cache
def notice_untested() -> None:
    """Say once in a process which installed libraries are newer than what was tested."""
    for name, tested in NEWEST_TESTED.items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if _numbers(installed) > _numbers(tested):
            _log.warning(
                "%s %s is newer than %s, the newest that this version was tested with. If something fails, look for a "
                "newer moetion-lightning, or install %s<=%s.*",
                name, installed, tested, name, tested,
            )  # fmt: skip


def _numbers(version: str) -> tuple[int, int]:
    """Major and minor."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)
