"""What the documentation shows works as it stands, and it quotes what the code says."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import inspect
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moetion_lightning.cli import _OWN, TRAINING, main
from moetion_lightning.recipes import list_recipes
from tests.runs import program
from tests.runs.drill import Zygote

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(DOCS)): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
#: Values that a message gives differ; the documentation writes this in their place.
GAP = "…"
OTHER_COMMANDS = {
    *("pip", "torchrun", "accelerate", "python", "git", "export"),
    *("apt-get", "kubectl", "sbatch", "srun", "docker", "jupyter"),
}


def _blocks(language: str) -> list[Any]:
    found = []
    for page, text in PAGES.items():
        for number, match in enumerate(re.finditer(rf"^```{language}\n(.*?)^```", text, re.M | re.S), 1):
            found.append(pytest.param(match[1], id=f"{page}-{number}"))
    return found


@pytest.mark.parametrize("code", _blocks("python"))
def test_python_block_runs(code: str, zygote: Zygote, memory_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    folder = tmp_path / "work"
    folder.mkdir()
    environment = {"MOETION_MEMORY_DIR": str(memory_dir)}
    ended = zygote.run_group([program.spec(folder, "-c", code)], [log], [environment])
    assert ended.good, log.read_text()


def test_notebook_runs(zygote: Zygote, memory_dir: Path, tmp_path: Path) -> None:
    """Its cells, one after the other in one process, as a kernel runs them."""
    cells = json.loads((ROOT / "examples" / "first_run.ipynb").read_text(encoding="utf-8"))["cells"]
    code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    log = tmp_path / "log"
    folder = tmp_path / "work"
    folder.mkdir()
    ended = zygote.run_group([program.spec(folder, "-c", code)], [log], [{"MOETION_MEMORY_DIR": str(memory_dir)}])
    said = log.read_text()
    assert ended.good, said
    assert "14 steps were done" in said
    assert "found the window of iterations" in said
    assert "bitwise equal: " in said


@pytest.mark.parametrize("code", _blocks("py"))
def test_fragment_is_python(code: str) -> None:
    compile(code, "fragment.py", "exec")


# --- commands --------------------------------------------------------------------------------------------------------


def _help(*arguments: str) -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([*arguments, "--help"])
    return text.getvalue()


def _check_moetion(words: list[str]) -> None:
    command, *rest = words
    if command in TRAINING:
        from lightning.pytorch import Trainer

        fields = set(inspect.signature(Trainer).parameters)
        for word in rest:
            if word.startswith("recipe:"):
                assert word.removeprefix("recipe:") in {recipe.name for recipe in list_recipes()}
            elif word.startswith("--trainer."):
                assert word.removeprefix("--trainer.").split(".")[0].rstrip("+") in fields
            elif word.startswith("--"):
                assert re.match(r"--(config|print_config|model(\.\w+)*|data(\.\w+)*|ckpt_path|seed_everything)$", word)
        return
    assert command in _OWN, f"moetion has no command {command!r}"
    if command == "demo" and rest and not rest[0].startswith("-"):
        command, rest = f"demo {rest[0]}", rest[1:]
    shown = _help(*command.split())
    for number, word in enumerate(rest):
        if word in ("-m", "--") or word.endswith(".py"):  # what follows is the program's
            if word == "-m" and rest[number + 1] == "moetion_lightning":
                _check_moetion(rest[number + 2 :])
            break
        if word.startswith("--"):
            assert re.search(rf"(^|[\s\[,]){re.escape(word)}\b", shown), f"moetion {command} has no option {word}"
        if word.startswith("recipe:"):
            assert word.removeprefix("recipe:") in {recipe.name for recipe in list_recipes()}


def _check_make(words: list[str]) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for word in words:
        assert "=" in word or word in targets, f"make has no target {word!r}"


@pytest.mark.parametrize("text", _blocks("bash"))
def test_commands_exist(text: str) -> None:
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"\w+=", words[0]):
            words = words[1:]
        if words[:1] == ["moetion"]:
            _check_moetion(words[1:])
        elif words[:1] == ["make"]:
            _check_make(words[1:])
        elif words[:1] == ["python"] and words[1] not in ("-m", "-c"):
            assert words[1] == "train.py" or (ROOT / words[1]).is_file(), line
        elif words:
            assert words[0] in OTHER_COMMANDS, line
            for word in words[1:]:  # files of this repository
                assert not word.startswith("examples/") or (ROOT / word).is_file(), line


def test_every_command_and_recipe_is_documented() -> None:
    page = PAGES["commands.md"]
    for recipe in list_recipes():
        assert f"| `{recipe.name}` |" in page
    for command in (*TRAINING, *_OWN):
        assert re.search(rf"`(moetion )?{command}\b", page), command


# --- texts -----------------------------------------------------------------------------------------------------------


def _said() -> str:
    """All texts of the sources, with a gap for each value, one text a line."""
    lines = []
    for path in (ROOT / "moetion_lightning").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                lines.append(re.sub(r"%[-+ 0]*[\d.]*[sdrfge]", GAP, node.value).replace("%%", "%"))
            elif isinstance(node, ast.JoinedStr):
                lines.append("".join(v.value if isinstance(v, ast.Constant) else GAP for v in node.values))
    return "\n".join(" ".join(line.split()) for line in lines)


def test_troubleshooting_quotes_the_sources() -> None:
    said = _said()
    quotes = re.findall(r"^```text\n(.*?)^```", PAGES["troubleshooting.md"], re.M | re.S)
    assert quotes
    unknown = [quote for quote in quotes if " ".join(quote.split()).strip(f"{GAP} ") not in said]
    assert unknown == []


def test_constructor_arguments_in_the_tuning_tables_exist() -> None:
    import moetion_lightning
    from moetion_lightning.config import EngineConfig

    callbacks = [getattr(moetion_lightning, n) for n in moetion_lightning.__all__ if n.endswith(("Checkpoint",))]
    known = {name for callback in callbacks for name in inspect.signature(callback).parameters}
    known |= set(inspect.signature(EngineConfig).parameters)
    rows = re.findall(r"^\| `(\w+)=", PAGES["tuning.md"], re.M)
    assert rows
    assert set(rows) <= known


# --- the site --------------------------------------------------------------------------------------------------------


def _anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = str((DOCS / page).parent.joinpath(path).resolve().relative_to(DOCS)) if path else page
        if linked.endswith(".png"):
            assert (DOCS / linked).is_file(), f"{page} shows {target}"
            continue
        assert linked in PAGES, f"{page} links to {target}"
        assert not anchor or anchor in _anchors(PAGES[linked]), f"{page} links to {target}"


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = re.findall(r"[\w./-]+\.md", navigation)
    decisions = {page for page in PAGES if re.match(r"adr/\d", page)}  # listed by adr/index.md
    assert sorted(listed) == sorted(set(PAGES) - decisions)


def test_every_decision_is_listed() -> None:
    decisions = {name.removeprefix("adr/") for name in PAGES if re.match(r"adr/\d", name)}
    assert set(re.findall(r"\((\d{4}[\w-]+\.md)\)", PAGES["adr/index.md"])) == decisions


def test_every_public_name_is_in_the_reference() -> None:
    import moetion_lightning
    from moetion_lightning import callbacks, integrations, metrics, strategies

    documented = set(re.findall(r"^::: [\w.]*?(\w+)$", PAGES["api.md"], re.M)) | {"MoEtionError", "__version__"}
    for module in (moetion_lightning, callbacks, integrations, metrics):
        assert set(module.__all__) <= documented, module.__name__
    assert strategies.MoEtionStrategy.__name__ in documented


@pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None,
    reason="needs the extra `docs`",
)
def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    assert built.stdout + built.stderr == ""
    text = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.html"))
    fetched = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"?(https?://[^\" >]+)", text)
    assert fetched == []
    assert ":class:" not in text
    # Search in pages that are opened as files: the index is a script, and a frame stands for the worker.
    assert (site / "search" / "search_index.js").stat().st_size > 100_000
    page = (site / "index.html").read_text(encoding="utf-8")
    assert page.index("assets/iframe-worker.js") < page.index("assets/javascripts/bundle")
    assert "unpkg.com" not in text
