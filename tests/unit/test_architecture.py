"""Who may import whom. The table is the architecture; a new room must be entered here."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import moetion_lightning

PACKAGE = Path(moetion_lightning.__file__).resolve().parent
ROOT = PACKAGE.parent

BELOW_ADAPTERS = (
    "errors", "units", "config", "events", "core", "moe", "storage", "capture", "gradient_log", "distributed",
    "pipeline", "data", "engine", "session",
)  # fmt: skip
# The rooms that each room may import, apart from itself and the root's `__version__`.
TABLE: dict[str, set[str]] = {
    **{room: set(BELOW_ADAPTERS[:index]) for index, room in enumerate(BELOW_ADAPTERS)},
    "config": {"errors"},
    "events": {"errors"},
    "badput": {"events"},
    "callbacks": {*BELOW_ADAPTERS, "strategies", "metrics", "badput"},
    "strategies": set(BELOW_ADAPTERS),
    "integrations": set(BELOW_ADAPTERS),
    "metrics": {"errors", "units", "config", "events", "badput"},
    "planning": {"errors", "units", "core"},
    "report": {"errors", "units", "events", "badput"},
    "export": {*BELOW_ADAPTERS} - {"session"},
    "recipes": {"errors"},
    "testing": {*BELOW_ADAPTERS, "callbacks"},
    "entry_points": {"errors", "config", "distributed", "commands"},
    "commands": {*BELOW_ADAPTERS, "callbacks", "integrations", "recipes", "testing", "planning", "report", "export"},
    "demo": {*BELOW_ADAPTERS, "callbacks", "recipes", "testing"},
    "cli": {"errors", "config", "commands", "demo", "recipes"},
    "__main__": {"cli"},
}
LIGHTNING = {"callbacks", "strategies", "commands", "recipes", "demo", "testing", "cli"}
HUGGING_FACE = {"integrations", "recipes", "core"}  # core: only inside functions
# recipes: a module that shards itself; export: torch's own sharded checkpoints, without process groups
TORCH_DISTRIBUTED = {"distributed", "pipeline", "strategies", "recipes", "export"}


@dataclass(frozen=True)
class Import:
    """One import statement of one file."""

    file: Path
    room: str
    target: str
    in_function: bool

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)} imports {self.target}"


def _room(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def _targets(node: ast.AST, file: Path) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parts = ("moetion_lightning", *file.relative_to(PACKAGE).parent.parts)
            base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [base])])
        return [f"{base}.{alias.name}" for alias in node.names]
    return []


def _walk(node: ast.AST, in_function: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        yield child, in_function
        yield from _walk(child, in_function or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)))


@functools.cache
def _imports() -> list[Import]:
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        if file == PACKAGE / "__init__.py":
            continue
        for node, in_function in _walk(ast.parse(file.read_text(encoding="utf-8"))):
            found += [Import(file, _room(file), target, in_function) for target in _targets(node, file)]
    return found


def _of(*packages: str) -> list[Import]:
    return [i for i in _imports() if any(i.target == p or i.target.startswith(p + ".") for p in packages)]


def test_every_room_is_in_the_table() -> None:
    rooms = {_room(file) for file in PACKAGE.rglob("*.py")} - {"__init__"}
    assert rooms <= TABLE.keys(), f"enter into the table: {sorted(rooms - TABLE.keys())}"


def test_imports_point_one_way() -> None:
    forbidden = []
    for item in _of("moetion_lightning"):
        target = item.target.split(".")[1] if "." in item.target else ""
        if target in ("", "__version__", item.room):
            continue
        if target not in TABLE[item.room]:
            forbidden.append(str(item))
    assert not forbidden, "\n".join(forbidden)


def test_lightning_only_in_adapters_and_recipes() -> None:
    forbidden = [str(i) for i in _of("lightning", "pytorch_lightning", "lightning_fabric") if i.room not in LIGHTNING]
    assert not forbidden, "\n".join(forbidden)


def test_transformers_and_accelerate_only_lazily_outside_integrations() -> None:
    forbidden = [
        str(i)
        for i in _of("transformers", "accelerate")
        if i.room not in HUGGING_FACE or (i.room != "integrations" and not i.in_function)
    ]
    assert not forbidden, "\n".join(forbidden)


def test_torch_distributed_only_where_ranks_are() -> None:
    forbidden = [str(i) for i in _of("torch.distributed") if i.room not in TORCH_DISTRIBUTED]
    assert not forbidden, "\n".join(forbidden)


def test_no_pickle() -> None:
    forbidden = [str(i) for i in _of("pickle", "dill", "cloudpickle")]
    assert not forbidden, "\n".join(forbidden)


def test_only_config_reads_the_environment() -> None:
    """`demo` copies the environment for its child processes, which is no setting."""
    readers = []
    for file in sorted(PACKAGE.rglob("*.py")):
        if _room(file) in ("config", "demo", "testing"):
            continue
        for node, _ in _walk(ast.parse(file.read_text(encoding="utf-8"))):
            named = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os"
            if named and node.attr in ("environ", "getenv"):  # type: ignore[attr-defined]
                readers.append(f"{file.relative_to(ROOT)}:{node.lineno}")  # type: ignore[attr-defined]
    assert not readers, f"environment variables are read in {readers}"


@pytest.mark.parametrize(
    "module", ["moetion_lightning", "moetion_lightning.cli", "moetion_lightning.commands.simulate"]
)
def test_import_is_light(module: str) -> None:
    code = f"import sys, {module}; sys.exit(str(sorted({{'torch', 'lightning', 'transformers'}} & sys.modules.keys())))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == "[]"


def test_at_most_a_dozen_public_names() -> None:
    assert len(moetion_lightning.__all__) <= 12
    assert set(moetion_lightning._HOMES) | {"__version__"} == set(moetion_lightning.__all__)


def test_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'SparseCheckpoint'"):
        _ = moetion_lightning.SparseCheckpoint


@pytest.mark.parametrize("name", [n for n in moetion_lightning.__all__ if n != "__version__"])
def test_public_name_exists(name: str) -> None:
    assert getattr(moetion_lightning, name).__name__ == name


def test_top_level_names_are_links_into_the_package() -> None:
    """Only in a checkout: an sdist may hold copies."""
    for name in ("callbacks", "recipes"):
        link = ROOT / name
        if not link.exists():
            pytest.skip("not a checkout")
        assert link.resolve() == PACKAGE / name
