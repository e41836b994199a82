"""The charts: stall and bytes of each iteration, the ratio over time, and the load of the experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from xml.etree import ElementTree

from moetion_lightning.report.drawing import (
    LEFT,
    RIGHT,
    WIDTH,
    Scale,
    element,
    figure,
    grid,
    round_steps,
    seconds_text,
    time_axis,
)
from moetion_lightning.report.history import History
from moetion_lightning.report.timeline import mark_failures
from moetion_lightning.units import size_text

__all__ = ["draw_bytes", "draw_load", "draw_ratio", "draw_stalls"]

_MOST_BARS = 220
_MOST_POINTS = 600
_TOP, _HEIGHT = 30.0, 130.0


def draw_stalls(history: History) -> ElementTree.Element:
    """Seconds that each iteration waited for captures."""
    return _bars("stall", "Stall of each iteration", history.stalls, seconds_text, 0.0)


def draw_bytes(history: History) -> ElementTree.Element:
    """Bytes that were captured of each iteration, and those of a dense checkpoint."""
    return _bars("bytes", "Bytes captured of each iteration", history.nbytes, size_text, float(history.dense_bytes))


def _bars(
    name: str, title: str, values: Mapping[int, float], text: Callable[[float], str], reference: float
) -> ElementTree.Element:
    """Bars over iterations; where there are too many, one for several of them, as high as the largest."""
    last = max(values, default=1)
    width = -(-last // _MOST_BARS)
    highest: dict[int, int] = {}
    for iteration in values:
        place = (iteration - 1) // width
        if place not in highest or values[iteration] > values[highest[place]]:
            highest[place] = iteration
    largest = max((values[iteration] for iteration in highest.values()), default=0.0)
    bottom = _TOP + _HEIGHT
    svg = figure(name, title, f"{len(values)} iterations, at most {text(largest)}.", bottom + 40)
    steps = round_steps(max(largest, reference), 4)
    y = Scale(0.0, steps[-1], bottom, _TOP)
    grid(svg, y, steps, [text(step) for step in steps], "")
    x = Scale(0.0, float(max(highest, default=0) + 1), LEFT, WIDTH - RIGHT)
    gap = min(2.0, 0.2 * (x(1) - x(0)))
    for place, iteration in highest.items():
        value = values[iteration]
        bar = element(
            svg, "rect", class_=f"bar {name}", x=x(place) + gap / 2, y=y(value), width=x(1) - x(0) - gap,
            height=bottom - y(value), data_iteration=iteration, data_value=f"{value:.6f}",
        )  # fmt: skip
        element(bar, "title", f"iteration {iteration}: {text(value)}")
    if reference:
        line = element(
            svg, "line", class_="reference", x1=LEFT, x2=WIDTH - RIGHT, y1=y(reference), y2=y(reference),
            data_value=f"{reference:.6f}",
        )  # fmt: skip
        element(line, "title", f"a dense checkpoint: {text(reference)}")
        label = f"a dense checkpoint: {text(reference)}"
        element(svg, "text", label, class_="tick end halo", x=WIDTH - RIGHT - 4, y=y(reference) - 5)
    for iteration in sorted({int(step) for step in round_steps(float(last), 8)}):
        if 1 <= iteration <= last:
            element(svg, "text", str(iteration), class_="tick middle", x=x((iteration - 0.5) / width), y=bottom + 16)
    each = "iteration" if width == 1 else f"iteration (each bar: the largest of {width})"
    element(svg, "text", each, class_="tick end", x=WIDTH - RIGHT, y=bottom + 32)
    return svg


def draw_ratio(history: History) -> ElementTree.Element:
    """The effective training time ratio from the first start to each moment."""
    bottom = _TOP + _HEIGHT + 20
    last = history.ratio[-1][1]
    svg = figure("ratio", "Effective training time ratio over time", f"At the end it is {last:.3f}.", bottom + 40)
    y = Scale(0.0, 1.0, bottom, _TOP)
    x = Scale(0.0, max(history.wall_seconds, 1e-6), LEFT, WIDTH - RIGHT)
    steps = [0.0, 0.25, 0.5, 0.75, 1.0]
    grid(svg, y, steps, [f"{step:.0%}" for step in steps], "")
    time_axis(svg, x, _TOP, bottom)
    mark_failures(svg, history, x, _TOP, bottom)
    every = -(-len(history.ratio) // _MOST_POINTS)
    points = [*history.ratio[::every], history.ratio[-1]]
    path = " ".join(f"{x(time):.2f},{y(value):.2f}" for time, value in points)
    element(svg, "polyline", class_="line", points=path, data_last=f"{last:.6f}")
    end = x(points[-1][0]), y(last)
    element(svg, "circle", class_="end", cx=end[0], cy=end[1], r=4.0)
    element(svg, "text", f"{last:.1%}", class_="value end halo", x=end[0] - 8, y=end[1] - 8)
    return svg


def draw_load(history: History) -> ElementTree.Element:
    """Tokens of each expert divided by the mean of its layer, as a map."""
    tokens = history.tokens
    experts = max(len(row) for row in tokens.values())
    left = min(300.0, 16 + 6.6 * max(len(name) for name in tokens))
    cell = min(64.0, (WIDTH - left - RIGHT) / experts)
    height = 26.0 if len(tokens) <= 24 else 14.0
    bottom = 12 + height * len(tokens)
    largest = max((max(row) * len(row) / max(1, sum(row)) for row in tokens.values()), default=1.0)
    svg = figure(
        "load", "Load of the experts", f"{len(tokens)} layers, {experts} experts; the busiest one has {largest:.2f} "
        "times the mean of its layer.", bottom + 74,
    )  # fmt: skip
    for row, (name, counts) in enumerate(tokens.items()):
        y = 12 + height * row
        element(svg, "text", name, class_="label end", x=left - 8, y=y + height / 2 + 4)
        for expert, count in enumerate(counts):
            relative = count * len(counts) / max(1, sum(counts))
            square = element(
                svg, "rect", class_="cell", x=left + cell * expert + 1, y=y + 1, width=max(cell - 2, 0.5),
                height=height - 2, fill_opacity=_opacity(relative, largest), data_layer=name, data_expert=expert,
                data_tokens=count,
            )  # fmt: skip
            element(square, "title", f"{name}, expert {expert}: {count} tokens, {relative:.2f} times the mean")
            if cell >= 34 and height >= 20:
                middle = left + cell * (expert + 0.5)
                element(svg, "text", f"{relative:.2f}", class_="cell-text middle", x=middle, y=y + height / 2 + 4)
    for expert in sorted({int(step) for step in round_steps(float(experts - 1), 16)}):
        if expert < experts:
            element(svg, "text", str(expert), class_="tick middle", x=left + cell * (expert + 0.5), y=bottom + 16)
    element(svg, "text", "expert", class_="tick", x=left + cell * experts + 6, y=bottom + 16)
    _legend(svg, left, bottom + 44, largest)
    return svg


def _legend(svg: ElementTree.Element, left: float, top: float, largest: float) -> None:
    for index in range(40):
        part = largest * (index + 0.5) / 40
        element(
            svg, "rect", class_="cell", x=left + 5.0 * index, y=top, width=5.0, height=10.0,
            fill_opacity=_opacity(part, largest),
        )  # fmt: skip
    element(svg, "text", "0", class_="tick", x=left, y=top + 24)
    if 0.15 < 1 / largest < 0.85:
        element(svg, "text", "1 (balanced)", class_="tick middle", x=left + 200 / largest, y=top + 24)
    element(svg, "text", f"{largest:.2f} times the mean", class_="tick", x=left + 206, y=top + 10)


def _opacity(relative: float, largest: float) -> float:
    return 0.04 + 0.71 * relative / max(largest, 1e-9)
