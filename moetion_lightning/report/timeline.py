"""The time line: what each rank did, what was captured and committed, and where ranks were lost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from xml.etree import ElementTree

from moetion_lightning.report.drawing import LEFT, RIGHT, WIDTH, Scale, element, figure, seconds_text, time_axis
from moetion_lightning.report.history import History
from moetion_lightning.report.lanes import Kind, Lane, Span

__all__ = ["KINDS", "draw_timeline", "mark_failures"]

#: What each kind of span is called.
KINDS: dict[Kind, str] = {
    Kind.FIRST: "iterations, for the first time",
    Kind.REPLAYED: "iterations, replayed to rebuild the state",
    Kind.AGAIN: "iterations, done again",
    Kind.STAGE_REPLAY: "stage replayed alone, from its neighbours' logs",
    Kind.STARTING: "starting and restoring",
    Kind.WAITING: "waiting for ranks that are replaced",
    Kind.LOST: "iteration that was never finished",
    Kind.DOWN: "no process",
}
MOST_LANES = 64
_LANE, _BAR, _STRIP, _TOP = 34.0, 14.0, 4.0, 28.0
_SMALLEST = 0.4  # what is narrower is drawn together with its neighbour of the same kind


def draw_timeline(history: History) -> ElementTree.Element:
    """Lanes of the ranks over time; of very many ranks, those that failed first."""
    lanes = chosen_lanes(history)
    bottom = _TOP + _LANE * len(lanes)
    svg = figure(
        "timeline", "Time line of all ranks",
        f"{len(lanes)} ranks over {seconds_text(history.wall_seconds)}, with {len(history.failures)} failures.",
        bottom + 40,
    )  # fmt: skip
    scale = Scale(0.0, max(history.wall_seconds, 1e-6), LEFT, WIDTH - RIGHT)
    time_axis(svg, scale, _TOP, bottom)
    for index, lane in enumerate(lanes):
        _draw_lane(svg, lane, _TOP + _LANE * index, scale, history.start)
    mark_failures(svg, history, scale, _TOP, bottom)
    return svg


def chosen_lanes(history: History) -> list[Lane]:
    """The lanes that are drawn, by rank."""
    if len(history.lanes) <= MOST_LANES:
        return list(history.lanes)
    failed = {rank for failure in history.failures for rank in failure.ranks}
    by_interest = sorted(history.lanes, key=lambda lane: (lane.rank not in failed, lane.rank))
    return sorted(by_interest[:MOST_LANES], key=lambda lane: lane.rank)


def _draw_lane(svg: ElementTree.Element, lane: Lane, top: float, scale: Scale, start: float) -> None:
    group = element(svg, "g", class_="lane", data_rank=lane.rank)
    element(group, "text", f"rank {lane.rank}", class_="label end", x=LEFT - 8, y=top + 6 + _BAR - 3)
    for span in joined(lane.spans, scale, start):
        _draw_span(group, span, KINDS[span.kind], span.kind.value, top + 6, _BAR, scale, start)
    strip = top + 6 + _BAR + 2
    for span in joined(lane.captures, scale, start):
        _draw_span(group, span, "capture", "capture", strip, _STRIP, scale, start)
    drawn = float("-inf")
    for time, iteration in lane.commits:
        x = scale(time - start)
        if x - drawn < 7:  # marks must not lie on each other
            continue
        drawn = x
        mark = element(group, "path", class_="commit", d=f"M{x:.2f} {strip + 4:.2f}l-3 6h6z", data_iteration=iteration)
        element(mark, "title", f"window up to iteration {iteration} committed, {seconds_text(time - start)}")


def joined(spans: Iterable[Span], scale: Scale, start: float) -> list[Span]:
    """Neighbours of one kind between which nothing could be seen, as one."""
    result: list[Span] = []
    for span in spans:
        last = result[-1] if result else None
        near = last is not None and scale(span.start - start) - scale(last.end - start) < _SMALLEST
        if last is not None and near and last.kind == span.kind and _follows(last, span):
            result[-1] = Span(kind=span.kind, start=last.start, end=span.end, first=last.first, last=span.last)
        else:
            result.append(span)
    return result


def _follows(before: Span, after: Span) -> bool:
    return before.last is None or after.first is None or after.first in (before.last, before.last + 1)


def _draw_span(
    group: ElementTree.Element,
    span: Span,
    name: str,
    kind: str,
    y: float,
    height: float,
    scale: Scale,
    start: float,
) -> None:
    x, end = scale(span.start - start), scale(span.end - start)
    data: dict[str, object] = {} if span.first is None else {"data_first": span.first, "data_last": span.last}
    bar = element(
        group, "rect", class_=f"span {kind}", x=x, y=y, width=max(end - x, _SMALLEST), height=height,
        data_seconds=f"{span.end - span.start:.6f}", **data,
    )  # fmt: skip
    which = ""
    if span.first is not None:
        which = f" {span.first}" if span.first == span.last else f" {span.first} to {span.last}"
    element(
        bar, "title", f"{name}{which}: {seconds_text(span.end - span.start)}, from {seconds_text(span.start - start)}"
    )


def mark_failures(svg: ElementTree.Element, history: History, scale: Scale, top: float, bottom: float) -> None:
    """A line for each failure, with its number in the table."""
    drawn = float("-inf")
    for index, failure in enumerate(history.failures, start=1):
        x = scale(failure.time - history.start)
        group = element(svg, "g", class_="failure", data_failure=index)
        element(group, "title", f"failure {index}: {ranks_text(failure.ranks)} lost")
        element(group, "line", x1=x, x2=x, y1=top - 6, y2=bottom)
        if x - drawn >= 16:  # numbers must not lie on each other
            drawn = x
            element(group, "circle", cx=x, cy=top - 14, r=8.0)
            element(group, "text", str(index), class_="middle", x=x, y=top - 10)


def ranks_text(ranks: Sequence[int], most: int = 6) -> str:
    """Ranks as a list, cut where it is long."""
    shown = ", ".join(str(rank) for rank in ranks[:most])
    word = "rank" if len(ranks) == 1 else "ranks"
    return f"{word} {shown}" + (f" and {len(ranks) - most} more" if len(ranks) > most else "")
