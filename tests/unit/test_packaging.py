"""What is installed, and with which requirements."""

from __future__ import annotations

import re
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

import moetion_lightning

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def project() -> dict[str, Any]:
    if sys.version_info < (3, 11):
        pytest.skip("tomllib needs Python 3.11")
    import tomllib

    content: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return content


def test_compromised_uploads_of_lightning_are_excluded(project: dict[str, Any]) -> None:
    (lightning,) = (r for r in project["project"]["dependencies"] if r.startswith("lightning"))
    assert "!=2.6.2" in lightning
    assert "!=2.6.3" in lightning


def test_library_has_lower_bounds_and_no_pins(project: dict[str, Any]) -> None:
    for requirement in project["project"]["dependencies"]:
        assert "==" not in requirement, requirement
        if not requirement.startswith("safetensors"):
            assert ">=" in requirement, requirement


def test_constraints_pin_exactly_what_the_tests_need() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    for name in ("torch", "lightning", "accelerate", "torchmetrics", "safetensors", "jsonargparse", "pytest", "mypy"):
        assert re.fullmatch(r"[\d.]+", pins[name]), name


def test_only_our_package_is_installed(project: dict[str, Any]) -> None:
    """The links at the top level must never be installed as packages of their own."""
    setuptools = pytest.importorskip("setuptools")
    tool = project["tool"]["setuptools"]
    found = setuptools.find_namespace_packages(str(ROOT), include=tool["packages"]["find"]["include"])
    assert found
    assert all(name.split(".")[0] == "moetion_lightning" for name in found)
    assert tool["package-data"]["moetion_lightning"] == ["py.typed", "recipes/*.yaml"]


def test_package_is_typed_and_has_one_version(project: dict[str, Any]) -> None:
    assert (Path(moetion_lightning.__file__).parent / "py.typed").exists()
    assert project["project"]["dynamic"] == ["version"]
    assert f"## [{moetion_lightning.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_folder_with_code_is_a_package() -> None:
    package = Path(moetion_lightning.__file__).parent
    folders = {path.parent for path in package.rglob("*.py")}
    assert [str(f) for f in folders if not (f / "__init__.py").exists()] == []


def test_continuous_integration_runs_the_readmes_test_command() -> None:
    script = ROOT / ".ci" / "run"
    assert "make test" in script.read_text(encoding="utf-8")
    assert script.stat().st_mode & stat.S_IXUSR
