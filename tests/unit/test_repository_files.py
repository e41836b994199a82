"""Files that only services and people read are well-formed, and say what the code says."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import moetion_lightning

ROOT = Path(__file__).resolve().parents[2]
URL = "https://github.com/moetion-lightning/moetion-lightning"
YAML_FILES = sorted(
    path
    for pattern in (".github/**/*.yml", ".pre-commit-config.yaml", "CITATION.cff", "examples/**/*.yaml")
    for path in ROOT.glob(pattern)
)


def _load(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_yaml_is_valid(path: Path) -> None:
    assert all(isinstance(document, dict) for document in yaml.safe_load_all(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", ["ci.yml", "versions.yml"])
def test_workflow_has_jobs_with_limits_and_pinned_actions(name: str) -> None:
    workflow = _load(f".github/workflows/{name}")
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] > 0
        for step in job["steps"]:
            assert ("run" in step) != bool(re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step.get("uses", "")))


def test_continuous_integration_runs_make_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    lines = [step.get("run", "") for job in _load(".github/workflows/ci.yml")["jobs"].values() for step in job["steps"]]
    used = {word for line in lines for word in re.findall(r"^make ([a-z-]+)", line)}
    assert {"check", "test", "docs"} <= used <= targets


@pytest.mark.parametrize("name", ["bug.yml", "feature.yml"])
def test_issue_form_has_fields_with_names_of_their_own(name: str) -> None:
    form = _load(f".github/ISSUE_TEMPLATE/{name}")
    assert {"name", "description", "body"} <= set(form)
    identities = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert identities
    assert len(identities) == len(set(identities))
    assert all(field["attributes"].get("label") for field in form["body"] if field["type"] != "markdown")


def test_citation_has_the_version_and_the_licence() -> None:
    citation = _load("CITATION.cff")
    assert str(citation["version"]) == moetion_lightning.__version__
    assert citation["license"] == "Apache-2.0"
    assert citation["repository-code"] == URL
    assert all(reference["url"].startswith("https://arxiv.org/abs/") for reference in citation["references"])


def test_hooks_lint_with_the_version_that_the_tests_pin() -> None:
    pins = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))
    (ruff,) = [repo for repo in _load(".pre-commit-config.yaml")["repos"] if "ruff" in repo["repo"]]
    assert ruff["rev"] == f"v{pins['ruff']}"


def test_one_address_of_the_project_everywhere() -> None:
    texts = [*ROOT.glob("*.md"), ROOT / "pyproject.toml", *ROOT.glob(".github/**/*.*"), *ROOT.glob("docs/**/*.md")]
    named = {
        address
        for path in texts
        for address in re.findall(r"github\.com/[\w-]+/moetion-lightning", path.read_text(encoding="utf-8"))
    }
    assert named == {URL.removeprefix("https://")}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib needs Python 3.11")
def test_extras_are_those_that_the_documentation_names() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = "".join(p.read_text(encoding="utf-8") for p in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
    named = {extra for group in re.findall(r"\.?\[([a-z0-9,]+)\]['\"]", text) for extra in group.split(",")}
    assert {"hf", "s3", "gcs", "ray"} <= named <= set(project["optional-dependencies"])
    assert all(address.startswith(URL) for address in project["urls"].values())


def test_source_distribution_has_tests_documentation_and_changelog() -> None:
    manifest = (ROOT / "MANIFEST.in").read_text(encoding="utf-8")
    kept = set(re.findall(r"^graft (\S+)$", manifest, re.M))
    kept |= {name for line in re.findall(r"^include (.*)$", manifest, re.M) for name in line.split()}
    assert {"tests", "docs", "benchmarks", "examples", "CHANGELOG.md", "Makefile", "constraints.txt"} <= kept
    assert [name for name in kept if not (ROOT / name).exists()] == []


def test_notebook_is_valid_and_holds_no_output() -> None:
    notebook = json.loads((ROOT / "examples" / "first_run.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    identities = [cell["id"] for cell in notebook["cells"]]
    assert len(identities) == len(set(identities))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


def test_contributors_find_every_folder_and_the_files_to_read_first() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = text.partition("```text\nmoetion_lightning/\n")[2].partition("tests/\n")[0]
    listed = set(re.findall(r"^  (\w+)/ ", tree, re.M))
    package = Path(moetion_lightning.__file__).parent
    assert listed == {path.parent.name for path in package.glob("*/__init__.py")}
    first = re.findall(r"^\d\. `([\w/.]+)`", text.partition("## Proof")[0], re.M)
    assert len(first) == 6
    assert [name for name in first if not (ROOT / name).is_file()] == []


def test_make_targets_for_contributors_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert set(re.findall(r"make ([a-z]+)\b", text)) <= targets
