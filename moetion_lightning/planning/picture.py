"""Small self-contained SVG figures: lines over a logarithmic axis, and stacked bars. Light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from moetion_lightning.errors import ConfigurationError

__all__ = ["bars", "lines", "save"]

_WIDTH, _HEIGHT = 780.0, 400.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 64.0, 220.0, 44.0, 56.0
_APART = 64.0  # between two labels of an axis
_LIGHT = ("#2563c9", "#c2571a", "#1a7f5a", "#8250c4", "#b58900", "#c62f5b", "#57606a", "#0e8a9c")
_DARK = ("#6ea8ff", "#f0924f", "#4fd19c", "#b791f0", "#e6bf45", "#ff7ba1", "#9aa5b1", "#4cc9dc")
_STYLE = (
    "svg{font-family:system-ui,'DejaVu Sans',sans-serif;font-size:12px;--ink:#1b1f24;--soft:#57606a;--rule:#d8dde3;"
    "--page:#fff}text{fill:var(--ink)}.soft{fill:var(--soft)}.rule{stroke:var(--rule)}.page{fill:var(--page)}"
    ".small{font-size:10px}.title{font-size:14px;font-weight:600}.line{fill:none;stroke-width:2;stroke-linejoin:round}"
    + "".join(f".l{i}{{stroke:{c}}}.f{i}{{fill:{c}}}" for i, c in enumerate(_LIGHT))
    + "@media(prefers-color-scheme:dark){svg{--ink:#e8ebef;--soft:#9aa5b1;--rule:#2d343d;--page:#0f1216}"
    + "".join(f".l{i}{{stroke:{c}}}.f{i}{{fill:{c}}}" for i, c in enumerate(_DARK))
    + "}"
)


def lines(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_label: str,
    y_label: str,
    x_text: Callable[[float], str],
    y_min: float = 0.0,
    y_max: float = 1.0,
    points: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    logarithmic: bool = True,
) -> ElementTree.Element:
    """Lines over a common axis.

    Args:
        title: Above the figure.
        series: By name, points ``(x, y)`` in their order.
        x_label: Below the axis.
        y_label: Above the other one.
        x_text: Label of a value of x.
        y_min: Lower end of y.
        y_max: Upper end of y.
        points: Marks without a line, in the colour of the series of the same name (or of the next free one).
        logarithmic: Whether x is.
    """
    points = points or {}
    xs = sorted({x for values in (*series.values(), *points.values()) for x, _ in values})
    scale = math.log if logarithmic else float
    low, high = scale(xs[0]), scale(xs[-1])
    span = (high - low) or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (scale(x) - low) / span * (_WIDTH - _LEFT - _RIGHT)
        share = (min(max(y, y_min), y_max) - y_min) / (y_max - y_min)
        return across, _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    names = list(dict.fromkeys([*series, *points]))
    svg = _figure(title, names)
    _scale(svg, y_label, y_min, y_max)
    newest = -_APART
    for x in xs:
        across, _ = at(x, y_min)
        if across - newest >= _APART:
            _add(svg, "text", x_text(x), x=across, y=_HEIGHT - _BOTTOM + 18, class_="soft", text_anchor="middle")
            newest = across
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    _add(svg, "text", x_label, x=middle, y=_HEIGHT - 14, class_="soft", text_anchor="middle")
    for name, values in series.items():
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*value) for value in values))
        _add(svg, "polyline", points=path, class_=f"line l{names.index(name) % len(_LIGHT)}")
    for name, values in points.items():
        for value in values:
            across, up = at(*value)
            dot = _add(svg, "circle", cx=across, cy=up, r=4.5, class_=f"f{names.index(name) % len(_LIGHT)}")
            _add(dot, "title", f"{name}: {x_text(value[0])}, {value[1]:.3g}")
    return svg


def bars(
    title: str,
    rows: Mapping[str, Mapping[str, float]],
    *,
    y_label: str,
    y_max: float = 1.0,
) -> ElementTree.Element:
    """One stacked bar for each row.

    Args:
        title: Above the figure.
        rows: By name, the heights of its parts, from below.
        y_label: Above the axis.
        y_max: Upper end of the axis.
    """
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    svg = _figure(title, parts)
    _scale(svg, y_label, 0.0, y_max)
    step = (_WIDTH - _LEFT - _RIGHT) / max(1, len(rows))
    for index, (name, row) in enumerate(rows.items()):
        left, top = _LEFT + index * step + 0.15 * step, _HEIGHT - _BOTTOM
        for part, value in row.items():
            height = max(0.0, value) / y_max * (_HEIGHT - _TOP - _BOTTOM)
            top -= height
            box = _add(
                svg, "rect", x=left, y=top, width=0.7 * step, height=height,
                class_=f"f{parts.index(part) % len(_LIGHT)}",
            )  # fmt: skip
            _add(box, "title", f"{name}, {part}: {value:.4g}")
        for line, text in enumerate(name.split("\n")):
            place = {"x": left + 0.35 * step, "y": _HEIGHT - _BOTTOM + 18 + 14 * line}
            _add(svg, "text", text, class_="soft small", text_anchor="middle", **place)
    return svg


def save(svg: ElementTree.Element, path: Path) -> None:
    """Write a figure as a file.

    Raises:
        ConfigurationError: It cannot be written there.
    """
    ElementTree.indent(svg, " ")
    try:
        path.write_text(ElementTree.tostring(svg, encoding="unicode") + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error}. Give another file.") from error


def _figure(title: str, names: Sequence[str]) -> ElementTree.Element:
    """An empty figure with its title and key."""
    svg = ElementTree.Element(
        "svg", xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {_WIDTH:.0f} {_HEIGHT:.0f}", role="img"
    )
    _add(svg, "title", title)
    _add(svg, "style", _STYLE)
    _add(svg, "rect", width=_WIDTH, height=_HEIGHT, class_="page")
    _add(svg, "text", title, x=_LEFT, y=20.0, class_="title")
    for index, name in enumerate(names):
        y = _TOP + 20.0 * index
        left = _WIDTH - _RIGHT + 16
        _add(svg, "rect", x=left, y=y, width=12.0, height=12.0, class_=f"f{index % len(_LIGHT)}")
        _add(svg, "text", name.replace("\n", " "), x=left + 18, y=y + 10)
    return svg


def _scale(svg: ElementTree.Element, label: str, y_min: float, y_max: float) -> None:
    """Horizontal rules with their values."""
    _add(svg, "text", label, x=_LEFT, y=_TOP - 8, class_="soft")
    for fifth in range(6):
        y = _HEIGHT - _BOTTOM - fifth / 5 * (_HEIGHT - _TOP - _BOTTOM)
        _add(svg, "line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="rule")
        _add(
            svg,
            "text",
            f"{y_min + fifth / 5 * (y_max - y_min):.3g}",
            x=_LEFT - 8,
            y=y + 4,
            class_="soft",
            text_anchor="end",
        )


def _add(parent: ElementTree.Element, tag: str, text: str = "", /, **attributes: object) -> ElementTree.Element:
    """An element; ``_`` in a name stands for ``-``, but not at its end."""
    given = {
        name.rstrip("_").replace("_", "-"): f"{value:.1f}" if isinstance(value, float) else str(value)
        for name, value in attributes.items()
    }
    made = ElementTree.SubElement(parent, tag, given)
    if text:
        made.text = text
    return made
