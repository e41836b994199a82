"""Result files: JSON, and the same as a markdown table."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = [
    "RESULTS",
    "child_environment",
    "load_results",
    "machine",
    "machine_line",
    "markdown_table",
    "number",
    "write_results",
]

RESULTS = Path(__file__).parent / "results"


def child_environment(threads: int) -> dict[str, str]:
    """Environment of a child process, which finds this checkout also where the package is not installed."""
    paths = [str(RESULTS.parent.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            model = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), model)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except OSError:
        memory = 0
    packages = {}
    for name in ("torch", "lightning", "accelerate", "transformers", "dlrover", "nvidia-resiliency-ext"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "python": platform.python_version(),
        "packages": packages,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load_average": [round(x, 2) for x in os.getloadavg()],
    }


def machine_line(results: Mapping[str, Any]) -> str:
    """The machine in one markdown line."""
    m = results["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in m["packages"].items())
    loads = results.get("load_average_end", m["load_average"])
    return (
        f"{m['cores']} cores ({m['cpu']}), {m['memory_bytes'] / 2**30:.0f} GiB, Python {m['python']}, {packages}; "
        f"{m['date']}; load average {m['load_average'][0]} at the start, {loads[0]} at the end."
    )


def number(value: float | None, pattern: str = "{:.2f}") -> str:
    """A cell; a missing number is a dash."""
    return "-" if value is None else pattern.format(value)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table whose columns also line up as plain text."""
    cells = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def write_results(name: str, results: dict[str, Any], markdown: str, folder: Path = RESULTS) -> None:
    """Write ``<name>.json`` and ``<name>.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(markdown + "\n", encoding="utf-8")


def load_results(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """Read ``<name>.json``."""
    path = folder / f"{name}.json"
    if not path.exists():
        raise SystemExit(f"{path} does not exist yet: run `python benchmarks/{name}.py` first")
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded
