"""What the figures are made of: SVG elements, scales, axes, and numbers as people read them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from xml.etree import ElementTree

__all__ = [
    "WIDTH",
    "Scale",
    "element",
    "figure",
    "grid",
    "number",
    "round_steps",
    "seconds_text",
    "time_axis",
]

#: Width of all figures, in their own units; the page scales them to its width.
WIDTH = 960.0
LEFT, RIGHT = 72.0, 16.0
_TIME_STEPS = (60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 7200.0, 21600.0, 43200.0, 86400.0, 172800.0, 604800.0)


def element(
    parent: ElementTree.Element | None, tag: str, text: str = "", /, **attributes: object
) -> ElementTree.Element:
    """Add an element.

    Args:
        parent: Where to; None makes a root.
        tag: Its name.
        text: Its text.
        **attributes: ``_`` in a name stands for ``-``, but not at its end (``class_``); floats are cut to 0.01.
    """
    given = {name.rstrip("_").replace("_", "-"): number(value) for name, value in attributes.items()}
    made = ElementTree.Element(tag, given) if parent is None else ElementTree.SubElement(parent, tag, given)
    if text:
        made.text = text
    return made


def number(value: object) -> str:
    """A value of an attribute."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def figure(name: str, title: str, description: str, height: float) -> ElementTree.Element:
    """An empty figure.

    Args:
        name: Its id.
        title: What it shows, for those who do not see it.
        description: The same in a sentence.
        height: In units of the figure.
    """
    svg = element(
        None, "svg", id=name, viewBox=f"0 0 {number(WIDTH)} {number(height)}", role="img",
        aria_labelledby=f"{name}-title {name}-description", xmlns="http://www.w3.org/2000/svg",
    )  # fmt: skip
    element(svg, "title", title, id=f"{name}-title")
    element(svg, "desc", description, id=f"{name}-description")
    return svg


@dataclass(frozen=True)
class Scale:
    """Values onto positions: ``low`` is at ``start``, ``high`` at ``stop``."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        """The position of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)


def round_steps(high: float, most: int = 5) -> list[float]:
    """Round numbers from 0 to at least ``high``, at most ``most`` steps."""
    if high <= 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(high / most))
    step = next(s * power for s in (1.0, 2.0, 5.0, 10.0, 20.0) if s * power * most >= high)
    return [step * index for index in range(math.ceil(high / step - 1e-9) + 1)]


def grid(svg: ElementTree.Element, scale: Scale, values: list[float], labels: list[str], unit: str) -> None:
    """Horizontal lines with their labels, and the unit above them."""
    for value, label in zip(values, labels):
        y = scale(value)
        element(svg, "line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y)
        element(svg, "text", label, class_="tick end", x=LEFT - 8, y=y + 4)
    element(svg, "text", unit, class_="tick end", x=LEFT - 8, y=scale.stop - 10)


def time_axis(svg: ElementTree.Element, scale: Scale, top: float, bottom: float) -> None:
    """Vertical lines at round times since the start, labelled below."""
    values = round_steps(scale.high, 8)
    if scale.high > 120:
        step = next((s for s in _TIME_STEPS if s * 8 >= scale.high), _TIME_STEPS[-1])
        values = [step * index for index in range(int(scale.high / step) + 1)]
    for value in values:
        if value <= scale.high:
            x = scale(value)
            element(svg, "line", class_="grid", x1=x, x2=x, y1=top, y2=bottom)
            element(svg, "text", seconds_text(value), class_="tick middle", x=x, y=bottom + 16)
    element(svg, "text", "time since the first start", class_="tick end", x=WIDTH - RIGHT, y=bottom + 32)


def seconds_text(seconds: float) -> str:
    """A duration with its unit."""
    if seconds == 0:
        return "0 s"
    for limit, factor, unit in ((1e-3, 1e6, "\u00b5s"), (1.0, 1e3, "ms")):
        if seconds < limit:
            return f"{seconds * factor:.3g} {unit}"
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        rest = round(seconds - 60 * int(seconds / 60))
        return f"{int(seconds / 60)} min {rest} s" if 0 < rest < 60 else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"
