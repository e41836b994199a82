"""What the README shows works as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moetion_lightning.cli import _OWN, TRAINING
from moetion_lightning.recipes import list_recipes

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


@pytest.mark.parametrize("code", _blocks("python"))
def test_python_block_runs(
    code: str, memory_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOETION_MEMORY_DIR", str(memory_dir))
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})


def test_every_recipe_and_command_is_named() -> None:
    for recipe in list_recipes():
        assert f"`{recipe.name}`" in README
    for command in (*TRAINING, *_OWN):
        assert re.search(rf"`(moetion )?{command}\b", README), command
    assert {"make demo", "make test"} <= set(re.findall(r"make \w+", README))


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert set(re.findall(r"make ([a-z]+)\b", README)) <= targets


def test_named_files_exist() -> None:
    linked = [path for path in re.findall(r"\]\(([\w./-]+)[)#]", README) if "//" not in path]
    assert {"CONTRIBUTING.md", "docs/index.md"} <= set(linked)
    assert [path for path in linked if not (ROOT / path).is_file()] == []


def test_readme_is_short() -> None:
    assert len(README.splitlines()) < 170


def test_benchmark_of_every_number_exists() -> None:
    scripts = re.findall(r"`python (benchmarks/\w+\.py)`", README)
    assert len(scripts) >= 3
    assert [script for script in scripts if not (ROOT / script).is_file()] == []


def test_transcript_has_the_lines_that_the_demo_prints() -> None:
    (transcript,) = _blocks("text")
    labels = re.findall(r"^  (\S.*?)  +\S", transcript, re.M)
    assert len(labels) >= 4
    said = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "moetion_lightning" / "demo").glob("*.py"))
    assert [label for label in labels if label not in said] == []
