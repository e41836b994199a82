"""One page of HTML that needs nothing else: the library that draws its figures is in it, and nothing is loaded."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetion_lightning.badput import CAUSES, Use
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.report.failures import Failure
from moetion_lightning.report.history import UNUSED, History, tell
from moetion_lightning.report.reading import Reading, read_events
from moetion_lightning.report.style import SCRIPT, STYLE
from moetion_lightning.report.words import COLOURS, TEXTS, ranks_text, seconds_text
from moetion_lightning.units import size_text

if TYPE_CHECKING:
    from moetion_lightning.report.figures import Run

__all__ = ["make_page", "write_report"]

_MOST_FAILURES = 200
_COLUMNS = (
    ("#", "n"), ("When", "w"), ("Lost", "w"), ("How", ""), ("After iteration", "n"), ("State came from", ""),
    ("Back to", "n"), ("Replayed", "n"), ("Done again", "n"), ("Until the next new step", "n"), ("Verified", ""),
)  # fmt: skip


def write_report(run_dir: Path, out: Path, compare: Path | None = None, processes: int = 1) -> list[Reading]:
    """Write the page about the run whose events are in a folder.

    Args:
        run_dir: Folder with the JSONL files of all ranks, or one such file.
        out: The file to write; it is replaced.
        compare: The same of another run that is shown with it.
        processes: How many may read very large files; see :func:`~.history.tell`.

    Returns:
        What was read, of each run.

    Raises:
        ConfigurationError: There are no events, the page cannot be written, or the library that draws is missing.
    """
    try:
        from moetion_lightning.report.figures import Run
    except ImportError as error:
        raise ConfigurationError(
            "the page is drawn with Bokeh, which is not installed: pip install 'moetion-lightning[report]'. "
            "(--json needs nothing.)"
        ) from error
    paths = [run_dir] if compare is None else [run_dir, compare]
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    readings = [read_events(path, UNUSED) for path in paths]
    runs = [Run(name=name, history=tell(reading, processes)) for name, reading in zip(names, readings)]
    texts = [_read_text(reading) for reading in readings]
    page = make_page(runs, texts[0] if compare is None else " ".join(f"{n}: {text}" for n, text in zip(names, texts)))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(
            f"{out}: cannot write the report there: {error.strerror or error}. Give the path of a file in a folder "
            "where this user may write (--out FILE)."
        ) from error
    return readings


def make_page(runs: Sequence[Run], read: str = "") -> str:
    """The page as text.

    Args:
        runs: One run, or two that are compared.
        read: What was read, for the foot of the page.
    """
    from bokeh.resources import Resources

    title = html.escape("Run report: " + " and ".join(run.name for run in runs))
    body = _Body()
    body.add(f"<h1>{title}</h1>")
    for run in runs:
        if len(runs) > 1:
            body.add(f"<h3>{html.escape(run.name)}</h3>")
        body.add(f"<p>{_summary(run.history)}</p>", _tiles(run.history))
    _figures(body, runs)
    for run in runs:
        _about(body, run, several=len(runs) > 1)
    body.add(f'<footer><p id="read">{html.escape(read)}</p><dl>')
    body.add(
        *(f"<dt>{html.escape(term)}</dt><dd>{html.escape(meaning)}</dd>" for term, meaning in _TERMS), "</dl></footer>"
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style>{Resources(mode='inline', components=['bokeh']).render_js()}</head>"
        f"<body>{body.text()}"
        f'<script type="application/json" id="figures">{body.figures()}</script>'
        f"<script>{SCRIPT}</script></body></html>\n"
    )


class _Body:
    """Parts of the page, and the figures that go into it."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._drawn: dict[str, Any] = {}

    def add(self, *parts: str) -> None:
        self._parts += parts

    def section(self, title: str, about: str, *figures: tuple[str, Any], key: str = "", level: int = 2) -> None:
        self.add(f"<h{level}>{html.escape(title)}</h{level}>", f"<p>{about}</p>" if about else "", key)
        for name, drawn in figures:
            self._drawn[name] = drawn
            self.add(f'<div id="{name}"></div>')

    def text(self) -> str:
        return "\n".join(self._parts)

    def figures(self) -> str:
        """All of them in one document, so that those with a common axis move together."""
        from bokeh.document import Document
        from bokeh.embed.util import standalone_docs_json_and_render_items

        document = Document()
        for drawn in self._drawn.values():
            document.add_root(drawn)
        documents, items = standalone_docs_json_and_render_items([document])
        item = items[0].to_json()
        item["roots"] = {drawn.id: name for name, drawn in self._drawn.items()}
        return json.dumps([documents, [item]], separators=(",", ":"), allow_nan=False).replace("</", "<\\/")


def _figures(body: _Body, runs: Sequence[Run]) -> None:
    from moetion_lightning.report import figures as draw

    several = len(runs) > 1
    lines = _key([(draw.LINES[i], run.name) for i, run in enumerate(runs)]) if several else ""
    order = f"<p>Above: {html.escape(runs[0].name)}; below, pale: {html.escape(runs[-1].name)}.</p>" if several else ""
    if not several and runs[0].history.wall_seconds > 3600:
        order = "<p>Below each, pale: the last hour.</p>"
    histories = [run.history for run in runs]
    again = _key([(COLOURS[Use.REDO], "executions that a failure took back")]) if not several else lines
    if any(len(history.loss.iterations) for history in histories):
        loss = draw.draw_loss(runs)
        body.section("Loss", _ABOUT_LOSS, ("loss", loss), ("rates", draw.draw_rates(runs, loss.x_range)), key=again)
        iterations = loss.x_range
    else:
        iterations = draw.iterations(runs)
    body.section("Where the time went", _ABOUT_BADPUT, ("badput", draw.draw_badput(runs)), key=order)
    times = None
    for index, run in enumerate(runs):
        used = [use for use in Use if run.history.uses[use]]
        key = _key([(COLOURS[use], TEXTS[use]) for use in used])
        line = draw.draw_timeline(run)
        times = line.x_range if not several else None
        about = _ABOUT_TIME
        if len(run.history.lanes) > draw.MOST_LANES:
            about += f" {draw.MOST_LANES} of {len(run.history.lanes)} ranks are drawn, those that failed first."
        title = f"Time line of {run.name}" if several else "Time line"
        body.section(title, about, (f"timeline-{index}", line), key=key)
        _failures(body, run.history)
    body.section("Effective training time ratio", _ABOUT_RATIO, ("ratio", draw.draw_ratio(runs, times)), key=lines)
    stalls = draw.draw_curves(runs, lambda h: h.stalls, "stall (ms)", 1e3, iterations)
    body.section("Stall of each iteration", _ABOUT_STALL, ("stalls", stalls), key=lines)
    if any(len(history.nbytes.iterations) for history in histories):
        largest = max(float(h.nbytes.values.max(initial=h.dense_bytes)) for h in histories)
        unit, scale = ("GB", 1e-9) if largest >= 2e9 else ("MB", 1e-6)
        nbytes = draw.draw_curves(runs, lambda h: h.nbytes, f"captured ({unit})", scale, iterations, dense=True)
        body.section("Bytes captured of each iteration", _ABOUT_BYTES, ("bytes", nbytes), key=lines)
    for index, run in enumerate(runs):
        if run.history.tokens:
            title = f"Expert load of {run.name}" if several else "Expert load"
            names = tuple(run.history.tokens)
            about = (
                _ABOUT_LOAD
                + f" Layers: {html.escape(names[0])}"
                + (f" to {html.escape(names[-1])}." if names[1:] else ".")
            )
            body.section(title, about, (f"load-{index}", draw.draw_load(run)))


_ABOUT_LOSS = (
    "Over all restarts: the last execution of each iteration, and under it, as spots, executions that a failure took "
    "back. Where a recovery is exact, they lie on the curve. Dashed: the last iteration before each failure. "
    "The line is the mean over ranks, the band reaches to the highest one."
)
_ABOUT_BADPUT = (
    "Wall time since the first start, mean over ranks. Each second is counted once, so all bars together are the wall "
    "time."
)
_ABOUT_TIME = "What each rank did. Draw a box to zoom, or hold Ctrl and turn the wheel."
_ABOUT_RATIO = (
    "Share of the time in which training went forward, mean over ranks at the same moment; pale, of the hour before "
    "each moment. An iteration counts when it is finished for the first time, without its stall and validation."
)
_ABOUT_STALL = "Time that training waited for captures, mean over ranks; the band reaches to the longest one."
_ABOUT_BYTES = (
    "What was copied to host memory, on all ranks together. The dashed line is what a dense checkpoint of the same "
    "state would take each time."
)
_ABOUT_LOAD = "Tokens that each expert received, divided by the mean over the experts of its layer: 1 is balanced."


def _key(entries: Sequence[tuple[str, str]]) -> str:
    items = "".join(f'<li><i style="background:{colour}"></i>{html.escape(text)}</li>' for colour, text in entries)
    return f'<ul class="key">{items}</ul>'


def _summary(history: History) -> str:
    started = datetime.fromtimestamp(history.start, tz=timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    counts = ((len(history.lanes), "rank", "ranks"), (history.num_processes, "process", "processes"))
    counted = [
        f"{n} {one if n == 1 else many}" for n, one, many in (*counts, (len(history.failures), "failure", "failures"))
    ]
    return f"Started {started}; {seconds_text(history.wall_seconds)}, {', '.join(counted)}. {_ending(history)}"


def _ending(history: History) -> str:
    last = history.newest()
    if last.completed:
        return "Training is complete."
    return f"Ended by {html.escape(last.reason)}." if last.reason else "It runs, or ended without a word."


def _tiles(history: History) -> str:
    shown = [
        ("ettr", f"{history.ettr:.1%}", "effective training time"),
        ("iterations", str(history.iterations), "iterations"),
        ("failures", str(len(history.failures)), "failures"),
    ]
    if history.wall_seconds > 3600:
        recent = history.recent[Use.PRODUCTIVE] / max(1, sum(history.recent.values()))
        shown.insert(1, ("recent", f"{recent:.1%}", "effective training time, last hour"))
    recoveries = sorted(f.seconds for f in history.failures if f.seconds is not None)
    if recoveries:
        shown.append(("recovery", seconds_text(recoveries[len(recoveries) // 2]), "to the next new step (median)"))
    for key, curve, text, label in (
        ("stall", history.stalls, seconds_text, "stall per iteration (mean)"),
        ("bytes", history.nbytes, size_text, "captured per iteration (mean)"),
    ):
        if len(curve.values):
            shown.append((key, text(float(curve.values.mean())), label))
    if history.plt is not None:
        shown.append(("plt", f"{history.plt:.2%}", "proportion of lost tokens"))
    tiles = (
        f'<div class="tile" data-tile="{key}"><b>{value}</b><span>{label}</span></div>' for key, value, label in shown
    )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _about(body: _Body, run: Run, *, several: bool) -> None:
    """What it ran on, as its newest process says."""
    process = run.history.newest()
    body.section(f"About {run.name}" if several else "About this run", "")
    rows = {**process.environment, **{f"setting: {name}": value for name, value in process.settings.items()}}
    hosts = sorted({p.environment.get("host", "") for lives in run.history.processes.values() for p in lives} - {""})
    if len(hosts) > 1:
        rows["host"] = f"{len(hosts)}: {', '.join(hosts[:8])}" + (" and others" if len(hosts) > 8 else "")
    cells = "".join(
        f"<tr><th scope='row'>{html.escape(name)}</th><td class='long'>{html.escape(value)}</td></tr>"
        for name, value in rows.items()
        if value
    )
    body.add(f'<table class="about">{cells}</table>' if cells else "<p>Its events do not say.</p>")


def _failures(body: _Body, history: History) -> None:
    if not history.failures:
        body.add("<h3>Failures</h3><p>No rank was lost.</p>")
        return
    about = "A process whose place another one has taken, and what it took to be where it was."
    if len(history.failures) > _MOST_FAILURES:
        about += f" The last {_MOST_FAILURES} of {len(history.failures)} are listed."
    lossy = any(failure.lost_tokens is not None for failure in history.failures)
    columns = (*_COLUMNS, *((("Lost tokens", "n"),) if lossy else ()))
    head = "".join(f'<th class="{kind}" scope="col">{title}</th>' for title, kind in columns)
    numbered = list(enumerate(history.failures, start=1))[-_MOST_FAILURES:]
    rows = "\n".join(_failure(index, failure, history, lossy=lossy) for index, failure in numbered)
    body.add("<h3>Failures</h3>", f"<p>{about}</p>", '<div class="scroll"><table>')
    body.add(f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>")


def _failure(index: int, failure: Failure, history: History, *, lossy: bool) -> str:
    clock = datetime.fromtimestamp(failure.time, tz=timezone.utc).strftime("%H:%M:%S")
    everyone = len(failure.ranks) == len(history.lanes) > 1
    cells = [
        (str(index), "n"),
        (f"{seconds_text(failure.time - history.start)} ({clock})", "w"),
        ("all ranks" if everyone else ranks_text(failure.ranks), "w"),
        (failure.cause, "long"),
        (str(failure.iteration), "n"),
        (", ".join(failure.sources) or "nowhere: began anew", ""),
        (str(failure.restored), "n"),
        (str(failure.replayed), "n"),
        (str(failure.again), "n"),
        (_until_new(failure), "n"),
        _verdict(failure),
    ]  # fmt: skip
    if lossy:
        cells.append(("" if failure.lost_tokens is None else str(failure.lost_tokens), "n"))
    inside = "".join(f'<td class="{kind}">{html.escape(text)}</td>' for text, kind in cells)
    return f'<tr data-failure="{index}">{inside}</tr>'


def _until_new(failure: Failure) -> str:
    if failure.seconds is not None:
        return seconds_text(failure.seconds)
    return "lost again before" if failure.lost_again else "none came"


def _verdict(failure: Failure) -> tuple[str, str]:
    if failure.verified is None:
        return "not finished" if failure.lost_again else "nothing to replay", "w"
    return ("exact", "yes") if failure.verified else ("not exact", "no")


def _read_text(reading: Reading) -> str:
    files = len(reading.files)
    skipped = "no line was skipped" if not reading.num_skipped else f"lines that were skipped: {reading.num_skipped}"
    part = f" Of every {reading.every} iterations the loss and the bytes of one are shown." if reading.every > 1 else ""
    return (
        f"{reading.num_events} events from {files} {'file' if files == 1 else 'files'}; {skipped}"
        + (" (damaged, or no events of this version)." if reading.num_skipped else ".") + part
    )  # fmt: skip


_TERMS = (
    *((cause.value, TEXTS[cause].partition(": ")[2]) for cause in CAUSES if ": " in TEXTS[cause]),
    ("Replayed", "Iterations of the restored window that were executed again to make its state whole, or by a lost "
     "stage alone, or rebuilt from logged gradients. Each is compared with what was recorded when it was done first; "
     "\u201cexact\u201d: all agreed."),
    ("Done again", "Iterations that came after the restored window and were lost with the process."),
    ("How", "What the launcher saw, or the process itself said before it ended."),
    ("When", "Last sign of life of what was lost. The time until the next new step runs from there to the end of the "
     "first iteration that the job had not finished before: detection, restart, restoring and replaying are in it."),
)  # fmt: skip
