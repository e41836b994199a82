"""Newer libraries than were tested are told once, and used."""

from __future__ import annotations

import importlib.metadata
import logging
from pathlib import Path

import pytest

from moetion_lightning.session import versions

ROOT = Path(__file__).resolve().parents[2]


def test_newer_version_than_was_tested_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    installed = {"torch": "2.99.1+cu140", "lightning": versions.NEWEST_TESTED["lightning"] + ".9", "accelerate": "0.1"}

    def version(name: str) -> str:
        try:
            return installed[name]
        except KeyError:
            raise importlib.metadata.PackageNotFoundError(name) from None

    monkeypatch.setattr(importlib.metadata, "version", version)
    versions.notice_untested.cache_clear()
    with caplog.at_level(logging.WARNING, "moetion_lightning"):
        versions.notice_untested()
        versions.notice_untested()
    versions.notice_untested.cache_clear()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"torch 2.99.1+cu140 is newer than {versions.NEWEST_TESTED['torch']}")


def test_installed_versions_are_tested_ones() -> None:
    """What `constraints.txt` installs is no newer than what is said to be tested."""
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for name, tested in versions.NEWEST_TESTED.items():
        assert versions._numbers(pinned[name]) <= versions._numbers(tested), name


def test_lowest_environment_is_what_is_declared() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    from tests.versions import ENVIRONMENTS

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lowest = ENVIRONMENTS["lowest"][1]
    assert declared["requires-python"] == f">={ENVIRONMENTS['lowest'][0]}"
    assert "torch>=2.8" in declared["dependencies"] and "torch==2.8.*" in lowest  # noqa: PT018
    assert any(d.startswith("lightning>=2.5") for d in declared["dependencies"])
    assert "lightning==2.5.0" in lowest
