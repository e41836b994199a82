"""The figures, drawn with Bokeh: time by cause, time line, loss, ratio, bytes, stalls, and the load of the experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
from bokeh.models import (
    BasicTicker,
    BoxZoomTool,
    ColorBar,
    ColumnDataSource,
    FixedTicker,
    HoverTool,
    LinearColorMapper,
    NumeralTickFormatter,
    PanTool,
    Range1d,
    ResetTool,
    WheelZoomTool,
)
from bokeh.palettes import Cividis256
from bokeh.plotting import figure

from moetion_lightning.badput import CAUSES, NANOSECONDS, Use
from moetion_lightning.report.history import Curve, History
from moetion_lightning.report.lanes import MINOR
from moetion_lightning.report.words import COLOURS, FAILURE, INK, OTHER, PAGE, RULE, SOFT, TEXTS, seconds_text

__all__ = ["Run", "draw_badput", "draw_curves", "draw_load", "draw_loss", "draw_rates", "draw_ratio", "draw_timeline"]

_POINTS = 1500  # of a curve: more cannot be seen
MOST_LANES = 64
LINES = (COLOURS[Use.PRODUCTIVE], OTHER)
_UNITS = ((2.0, 86400.0, "days"), (2.0, 3600.0, "hours"), (2.0, 60.0, "minutes"), (0.0, 1.0, "seconds"))
Figure = Any  # Bokeh's own classes are untyped where it counts


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run and what it is called."""

    name: str
    history: History


def _figure(x_label: str, y_label: str, height: int, **options: Any) -> Figure:
    tools = [PanTool(dimensions="width"), BoxZoomTool(dimensions="width"), ResetTool()]
    wheel = WheelZoomTool(dimensions="width", modifiers="ctrl")
    made = figure(
        height=height, sizing_mode="stretch_width", tools=[*tools, wheel], active_drag=tools[1], active_scroll=wheel,
        toolbar_location="right", background_fill_color=None, border_fill_color=None, outline_line_color=RULE,
        min_border_right=8, min_border_left=68, lod_threshold=None, **options,
    )  # fmt: skip
    made.toolbar.logo = None
    made.toolbar.autohide = True
    for axis, label in ((made.xaxis, x_label), (made.yaxis, y_label)):
        axis.axis_label = label
        axis.axis_label_text_color = axis.major_label_text_color = SOFT
        axis.axis_label_text_font_style = "normal"
        axis.axis_line_color = axis.major_tick_line_color = RULE
        axis.minor_tick_line_color = None
    made.grid.grid_line_color = RULE
    if x_label == "iteration":
        made.xaxis.formatter = NumeralTickFormatter(format="0,0")
    return made


def _hover(made: Figure, renderers: Sequence[Any], tips: Sequence[tuple[str, str]], **options: Any) -> None:
    made.add_tools(HoverTool(renderers=list(renderers), tooltips=list(tips), visible=False, **options))


def _unit(runs: Sequence[Run]) -> tuple[float, str]:
    """Seconds of a unit of time in which the run is a handful, and its name."""
    wall = max(run.history.wall_seconds for run in runs)
    return next((length, name) for least, length, name in _UNITS if wall >= least * length)


def draw_badput(runs: Sequence[Run]) -> Figure:
    """Seconds by cause, of the whole run and of the last hour; or of two runs."""
    rows = [Use.PRODUCTIVE, *CAUSES]
    names = [use.value for use in reversed(rows)]
    first = runs[0].history
    series = [(run.name, run.history.uses, run.history) for run in runs]
    if len(runs) == 1 and first.wall_seconds > 3600:
        series.append(("last hour", first.recent, first))
    thick = 0.8 / len(series)
    made = _figure("share of the wall time", "", 60 + 26 * len(rows) * len(series), y_range=names, x_range=(0, 1.02))
    made.xaxis.formatter = NumeralTickFormatter(format="0 %")
    made.xaxis.ticker = FixedTicker(ticks=[0, 0.25, 0.5, 0.75, 1])
    made.ygrid.grid_line_color = None
    for index, (name, uses, history) in enumerate(series):
        seconds = history.seconds(uses)
        wall = sum(seconds.values()) or 1.0
        middle = 0.5 + 0.4 - thick * (index + 0.5)
        source = ColumnDataSource(
            {
                "y": [len(rows) - 1 - row + middle for row in range(len(rows))],
                "share": [seconds[use] / wall for use in rows],
                "text": [f"{seconds[use] / wall:.1%}  {seconds_text(seconds[use])}" for use in rows],
                "cause": [TEXTS[use] for use in rows],
                "of": [name] * len(rows),
                # Of long bars it is written inside: there is no room behind them.
                "align": ["right" if seconds[use] / wall > 0.6 else "left" for use in rows],
                "offset": [-6 if seconds[use] / wall > 0.6 else 6 for use in rows],
                "fill": [COLOURS[use] for use in rows],
            }
        )
        bars = made.hbar(
            y="y", right="share", height=thick * 0.9, fill_color="fill", line_color=None, source=source,
            fill_alpha=1.0 if index == 0 else 0.5,
        )  # fmt: skip
        made.text(
            x="share", y="y", text="text", x_offset="offset", text_align="align", text_baseline="middle",
            text_font_size="11px", text_color=INK, source=source,
        )  # fmt: skip
        _hover(made, [bars], [("", "@cause"), ("", "@text"), ("", "@of")])
    return made


def draw_timeline(run: Run, x_range: Any = None) -> Figure:
    """Lanes of the ranks over time; of very many ranks, those that failed first."""
    history = run.history
    lanes = chosen_lanes(history)
    length, unit = _unit([run])
    thick = max(12, min(34, 640 // len(lanes)))  # pixels of a lane
    above = 0.5 + 16 / thick
    x_range = x_range or Range1d(0, history.wall_seconds / length, bounds="auto")
    made = _figure(
        f"{unit} since the first start", "rank", 90 + thick * len(lanes), x_range=x_range,
        y_range=(len(lanes) - 0.5, -above),
    )  # fmt: skip
    made.ygrid.grid_line_color = None
    every = -(-len(lanes) // 32)
    made.yaxis.ticker = FixedTicker(ticks=list(range(0, len(lanes), every)))
    made.yaxis.major_label_overrides = {row: str(lane.rank) for row, lane in enumerate(lanes)}
    for use in Use:
        found = [(row, lane.rank, p) for row, lane in enumerate(lanes) for p in lane.pieces if p.use is use]
        if not found:
            continue
        starts = np.array([p.start for _, _, p in found], np.float64) / NANOSECONDS - history.start
        ends = np.array([p.end for _, _, p in found], np.float64) / NANOSECONDS - history.start
        source = ColumnDataSource(
            {
                "left": (starts / length).astype(np.float32),
                "right": (ends / length).astype(np.float32),
                "row": np.array([row for row, _, _ in found], np.uint16),
                "rank": np.array([rank for _, rank, _ in found], np.uint16),
                "first": np.array([p.first for _, _, p in found], np.int32),
                "last": np.array([p.last for _, _, p in found], np.int32),
            }
        )
        bars = made.hbar(
            y="row", left="left", right="right", height=0.7, fill_color=COLOURS[use], source=source,
            line_width=0.5, line_color=None if use in MINOR else COLOURS[use],
        )  # fmt: skip
        tips = [("", TEXTS[use]), ("rank", "@rank"), ("from, to", f"@left{{0.000}}, @right{{0.000}} {unit}")]
        _hover(made, [bars], [*tips, ("iterations", "@first to @last")] if any(p.first for *_, p in found) else tips)
    _mark(made, [(f.time - history.start) / length for f in history.failures], top=-0.5 - 8 / thick)
    return made


def chosen_lanes(history: History) -> list[Any]:
    """The lanes that are drawn, by rank."""
    failed = {rank for failure in history.failures for rank in failure.ranks}
    by_interest = sorted(history.lanes, key=lambda lane: (lane.rank not in failed, lane.rank))
    return sorted(by_interest[:MOST_LANES], key=lambda lane: lane.rank)


def _mark(made: Figure, places: Sequence[float], top: float | None = None) -> None:
    """A line for each failure; with ``top``, its number there, as in the table."""
    if not places:
        return
    made.vspan(x=list(places), line_color=FAILURE, line_dash="dashed", line_width=1, line_alpha=0.9)
    if top is None:
        return
    shown, last = [], float("-inf")
    for number, place in enumerate(places, start=1):  # numbers must not lie on each other
        if place - last > (max(places) or 1.0) / 40:
            shown.append((place, str(number)))
            last = place
    made.text(
        x=[place for place, _ in shown], y=[top] * len(shown), text=[text for _, text in shown], text_color=FAILURE,
        text_font_size="11px", text_baseline="middle", x_offset=3,
    )  # fmt: skip


def _thinned(curve: Curve) -> dict[str, Any]:
    """At most so many points: means of neighbours, and the range that they lie in."""
    count = len(curve.iterations)
    width = max(1, -(-count // _POINTS))
    starts = np.arange(0, count, width)
    if not count:
        return {"x": [], "y": [], "low": [], "high": []}
    sizes = np.minimum(width, count - starts)
    return {
        "x": curve.iterations[np.minimum(starts + width // 2, count - 1)].astype(np.int32),
        "y": (np.add.reduceat(curve.values, starts) / sizes).astype(np.float32),
        "low": np.minimum.reduceat(curve.values, starts).astype(np.float32),
        "high": np.maximum.reduceat(curve.highest if len(curve.highest) else curve.values, starts).astype(np.float32),
    }


def draw_loss(runs: Sequence[Run]) -> Figure:
    """The loss over all restarts: what is part of the training, and under it what was taken back and done again."""
    made = _figure("iteration", "loss", 320, x_range=iterations(runs))
    for run, colour in zip(runs, LINES):
        again, history = _thinned(run.history.lost_loss), run.history
        if len(again["x"]):
            made.scatter(x=again["x"], y=again["y"], size=11, color=COLOURS[Use.REDO], alpha=0.6, line_color=None)
        _line(made, _thinned(history.loss), colour, "loss", "{0.0000}", marked=len(history.loss.iterations) <= 60)
        _mark(made, [failure.iteration for failure in history.failures])
    return made


def draw_rates(runs: Sequence[Run], x_range: Any) -> Figure:
    """The learning rate over all restarts."""
    made = _figure("iteration", "learning rate", 180, x_range=x_range)
    made.yaxis.formatter.precision = 1
    for run, colour in zip(runs, LINES):
        _line(made, _thinned(run.history.rates), colour, "learning rate", "{0.000e+0}")
        _mark(made, [failure.iteration for failure in run.history.failures])
    return made


def draw_curves(
    runs: Sequence[Run], curve: Callable[[History], Curve], label: str, scale: float, x_range: Any, dense: bool = False
) -> Figure:
    """Something of each iteration: the mean, and the range in which neighbours and ranks lie.

    Args:
        runs: One or two.
        curve: What of them.
        label: What it is, with its unit.
        scale: Factor into that unit.
        x_range: That of the other figures over iterations.
        dense: Whether the bytes of a dense checkpoint are drawn with it.
    """
    made = _figure("iteration", label, 220, x_range=x_range)
    made.y_range.start = 0
    made.y_range.only_visible = True
    for run, colour in zip(runs, LINES):
        found = curve(run.history)
        scaled = Curve(iterations=found.iterations, values=found.values * scale, highest=found.highest * scale)
        _line(made, _thinned(scaled), colour, label, "{0.000}")
        if dense and run.history.dense_bytes:
            made.hspan(y=run.history.dense_bytes * scale, line_color=colour, line_dash="dashed", line_width=1.5)
    return made


def _line(made: Figure, data: dict[str, Any], colour: str, name: str, form: str, *, marked: bool = False) -> None:
    source = ColumnDataSource(data)
    if not np.array_equal(data["low"], data["high"]):
        made.varea(x="x", y1="low", y2="high", source=source, fill_color=colour, fill_alpha=0.25)
    line = made.line(x="x", y="y", source=source, line_color=colour, line_width=1.8)
    if marked:
        made.scatter(x="x", y="y", source=source, size=4, color=colour)
    _hover(made, [line], [("iteration", "@x"), (name, f"@y{form}")], mode="vline")


def iterations(runs: Sequence[Run]) -> Range1d:
    last = max(run.history.iterations for run in runs)
    return Range1d(0.5, max(last, 1) + 0.5, bounds="auto")


def draw_ratio(runs: Sequence[Run], x_range: Any = None) -> Figure:
    """The effective training time ratio from the first start to each moment, and of the hour before it."""
    length, unit = _unit(runs)
    wall = max(run.history.wall_seconds for run in runs)
    x_range = x_range or Range1d(0, wall / length, bounds="auto")
    made = _figure(f"{unit} since the first start", "", 240, x_range=x_range, y_range=(0, 1.02))
    made.yaxis.formatter = NumeralTickFormatter(format="0 %")
    for run, colour in zip(runs, LINES):
        times, total, recent = run.history.ratio
        data = {"x": (times / length).astype(np.float32), "y": total.astype(np.float32)}
        data["recent"] = recent.astype(np.float32)
        source = ColumnDataSource(data)
        if run.history.wall_seconds > 3600:
            made.line(x="x", y="recent", source=source, line_color=colour, line_width=1.2, line_alpha=0.6)
        line = made.line(x="x", y="y", source=source, line_color=colour, line_width=2)
        tips = [(unit, "@x{0.00}"), ("since the start", "@y{0.0 %}"), ("last hour", "@recent{0.0 %}")]
        _hover(made, [line], tips, mode="vline")
        if len(runs) == 1:
            _mark(made, [(f.time - run.history.start) / length for f in run.history.failures])
    return made


def draw_load(run: Run) -> Figure:
    """Tokens of each expert divided by the mean of its layer, as a map."""
    tokens = run.history.tokens
    num_experts = max(len(row) for row in tokens.values())
    relative = np.full((len(tokens), num_experts), np.nan, np.float32)
    for index, row in enumerate(tokens.values()):
        relative[index, : len(row)] = np.array(row) * len(row) / max(1, sum(row))
    shown = max(len(tokens) * 26, 60) if len(tokens) <= 24 else min(640, 14 * len(tokens))
    made = _figure("expert", "layer", shown + 70, x_range=(-0.5, num_experts - 0.5), y_range=(len(tokens) - 0.5, -0.5))
    made.grid.grid_line_color = None
    mapper = LinearColorMapper(
        palette=Cividis256, low=0, high=max(2.0, float(np.nanmax(relative))), nan_color="#00000000"
    )
    image = made.image(
        image=[relative], x=-0.5, y=-0.5, dw=num_experts, dh=len(tokens), color_mapper=mapper,
    )  # fmt: skip
    _hover(made, [image], [("expert", "$x{0}"), ("layer", "$y{0}"), ("times the mean", "@image{0.00}")])
    for axis in (made.xaxis, made.yaxis):
        axis.ticker = BasicTicker(min_interval=1, num_minor_ticks=0, desired_num_ticks=8)
    names = [layer for layer, _ in short_names(tuple(tokens))]
    made.yaxis.major_label_overrides = dict(enumerate(names))
    if len(names) <= 24:
        made.yaxis.ticker = FixedTicker(ticks=list(range(len(names))))
    bar = ColorBar(
        color_mapper=mapper, width=10, background_fill_color=None, major_label_text_color=SOFT, bar_line_color=None,
        ticker=BasicTicker(desired_num_ticks=4), major_tick_line_color=PAGE, padding=4,
    )  # fmt: skip
    made.add_layout(bar, "right")
    return made


def short_names(names: Sequence[str]) -> list[tuple[str, str]]:
    """What tells layers apart, and each one's full name: ``body.blocks.1.mlp`` of several such is ``1``."""
    if len(names) == 1:
        return [(names[0][-20:], names[0])]
    start = _common(names)
    end = _common([name[start:][::-1] for name in names])
    return [(name[start : len(name) - end] or name, name) for name in names]


def _common(names: Sequence[str]) -> int:
    """How many letters all of them begin with."""
    return sum(1 for _ in takewhile(lambda letters: len(set(letters)) == 1, zip(*names)))
