"""What all scripts of this folder share: the table "paper / ours / why different", and where it goes."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

sys.path.append(str(Path(__file__).resolve().parents[1]))

from _report import RESULTS, markdown_table

from moetion_lightning.planning.picture import save

__all__ = ["OUT", "Row", "publish", "results_of"]

OUT = RESULTS / "papers"


@dataclass(frozen=True)
class Row:
    """One number that a paper prints.

    Args:
        what: What it is.
        paper: As printed.
        ours: What comes out here.
        why: Why the two differ, or why they agree.
    """

    what: str
    paper: str
    ours: str
    why: str


def publish(
    name: str,
    title: str,
    rows: Sequence[Row],
    *,
    notes: Sequence[str],
    figure: Element | None = None,
    data: Mapping[str, Any] | None = None,
) -> None:
    """Write the table, the figure and the numbers, and print the table.

    Args:
        name: Of the files.
        title: Above the table, with the paper and its table or figure.
        rows: Of the table.
        notes: Below it: parameters and their sources, what could not be reproduced.
        figure: SVG.
        data: Numbers behind both.
    """
    OUT.mkdir(parents=True, exist_ok=True)
    table = markdown_table(["what", "paper", "ours", "why different"], [[r.what, r.paper, r.ours, r.why] for r in rows])
    parts = [f"# {title}", table, *(f"- {note}" for note in notes)]
    if figure is not None:
        save(figure, OUT / f"{name}.svg")
        parts.insert(2, f"![{title}]({name}.svg)")
    text = "\n\n".join(parts[:3]) + "\n\n" + "\n".join(parts[3:]) if figure is not None else (
        "\n\n".join(parts[:2]) + "\n\n" + "\n".join(parts[2:]))  # fmt: skip
    (OUT / f"{name}.md").write_text(text.rstrip() + "\n", encoding="utf-8")
    (OUT / f"{name}.json").write_text(json.dumps(data or {}, indent=1) + "\n", encoding="utf-8")
    print(f"{title}\n\n{table}\n\nwritten to {OUT}/{name}.md")


def results_of(name: str) -> dict[str, Any]:
    """Numbers that another benchmark has left in ``benchmarks/results``.

    Args:
        name: Of the JSON file, without its ending.
    """
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found
