"""One page of HTML that needs nothing else: no scripts, no fonts, no network."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from xml.etree import ElementTree

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.report.charts import draw_bytes, draw_load, draw_ratio, draw_stalls
from moetion_lightning.report.drawing import element, seconds_text
from moetion_lightning.report.failures import Failure
from moetion_lightning.report.history import History, tell
from moetion_lightning.report.lanes import Kind
from moetion_lightning.report.reading import Reading, read_events
from moetion_lightning.report.style import STYLE
from moetion_lightning.report.timeline import KINDS, MOST_LANES, draw_timeline, ranks_text
from moetion_lightning.units import size_text

__all__ = ["make_page", "write_report"]

_COLUMNS = (
    ("#", "n"), ("When", "w"), ("Lost", "w"), ("After iteration", "n"), ("State came from", ""), ("Back to", "n"),
    ("Replayed", "n"), ("Done again", "n"), ("Until the next new step", "n"), ("Verified", ""),
)  # fmt: skip


def write_report(run_dir: Path, out: Path) -> Reading:
    """Write the page about the run whose events are in a folder.

    Args:
        run_dir: Folder with the JSONL files of all ranks, or one such file.
        out: The file to write; it is replaced.

    Returns:
        What was read.

    Raises:
        ConfigurationError: There are no events, or the page cannot be written.
    """
    reading = read_events(run_dir)
    page = make_page(reading, run_dir.resolve().name)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(
            f"{out}: cannot write the report there: {error.strerror or error}. Give the path of a file in a folder "
            "where this user may write (--out FILE)."
        ) from error
    return reading


def make_page(reading: Reading, name: str) -> str:
    """The page as text.

    Args:
        reading: The events.
        name: What the run is called.
    """
    history = tell(reading.records)
    html = element(None, "html", lang="en")
    head = element(html, "head")
    element(head, "meta", charset="utf-8")
    element(head, "meta", name="viewport", content="width=device-width, initial-scale=1")
    element(head, "title", f"Run report: {name}")
    element(head, "style", STYLE)
    body = element(html, "body")
    element(body, "h1", f"Run report: {name}")
    element(body, "p", _summary(history))
    _tiles(body, history)
    _timeline(body, history)
    _failures(body, history)
    _section(body, "Effective training time ratio", _ABOUT_RATIO, draw_ratio(history))
    if any(history.stalls.values()):
        _section(body, "Stall", _ABOUT_STALL, draw_stalls(history))
    else:
        element(body, "h2", "Stall")
        element(body, "p", "No iteration waited for a capture.")
    if history.nbytes:
        _section(body, "Bytes", _ABOUT_BYTES + (_ABOUT_DENSE if history.dense_bytes else ""), draw_bytes(history))
    if history.tokens:
        _section(body, "Expert load", _ABOUT_LOAD, draw_load(history))
    _footer(body, reading)
    text = ElementTree.tostring(html, encoding="unicode", method="html")
    return f"<!DOCTYPE html>\n{text}\n"


_ABOUT_RATIO = (
    "Share of the time since the first start in which training went forward. Each iteration counts once, without its "
    "stall, as it was done last; so the curve falls where a failure takes iterations back."
)
_ABOUT_STALL = "Time that the optimizer of an iteration waited for captures, on the rank that waited longest."
_ABOUT_BYTES = "What was copied to host memory after each iteration, on all ranks together."
_ABOUT_DENSE = " The dashed line is what a dense checkpoint of the same state would take at each of them."
_ABOUT_LOAD = "Tokens that each expert received, divided by the mean over the experts of its layer: 1 is balanced."


def _summary(history: History) -> str:
    started = datetime.fromtimestamp(history.start, tz=timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    ranks, failures = len(history.lanes), len(history.failures)
    return (
        f"Started {started}; {seconds_text(history.wall_seconds)}, {ranks} {'rank' if ranks == 1 else 'ranks'}, "
        f"{history.num_processes} {'process' if history.num_processes == 1 else 'processes'}, "
        f"{failures} {'failure' if failures == 1 else 'failures'}."
    )


def _tiles(body: ElementTree.Element, history: History) -> None:
    tiles = element(body, "div", class_="tiles")
    shown = [
        ("ettr", f"{history.ratio[-1][1]:.1%}", "effective training time"),
        ("iterations", str(history.iterations), "iterations"),
        ("failures", str(len(history.failures)), "failures"),
    ]
    recoveries = sorted(f.seconds for f in history.failures if f.seconds is not None)
    if recoveries:
        shown.append(("recovery", seconds_text(recoveries[len(recoveries) // 2]), "to the next new step (median)"))
    if history.stalls:
        stall = sum(history.stalls.values()) / len(history.stalls)
        shown.append(("stall", seconds_text(stall), "stall per iteration (mean)"))
    if history.nbytes:
        mean = sum(history.nbytes.values()) / len(history.nbytes)
        shown.append(("bytes", size_text(mean), "captured per iteration (mean)"))
    if history.plt is not None:
        shown.append(("plt", f"{history.plt:.2%}", "proportion of lost tokens"))
    for key, value, label in shown:
        tile = element(tiles, "div", class_="tile", data_tile=key)
        element(tile, "b", value)
        element(tile, "span", label)


def _timeline(body: ElementTree.Element, history: History) -> None:
    about = "Each bar is what a rank did; below it, captures (on their own thread) and committed windows."
    if len(history.lanes) > MOST_LANES:
        about += f" {MOST_LANES} of {len(history.lanes)} ranks are drawn, those that failed first."
    element(body, "h2", "Time line")
    element(body, "p", about)
    key = element(body, "ul", class_="key")
    used = {span.kind for lane in history.lanes for span in lane.spans}
    for kind in Kind:
        if kind in used:
            item = element(key, "li")
            element(item, "i", class_=kind.value).tail = KINDS[kind]
    item = element(key, "li")
    element(item, "i", "\u25ac", class_="mark").tail = "capture"
    item = element(key, "li")
    element(item, "i", "\u25b2", class_="mark").tail = "window committed"
    if history.failures:
        item = element(key, "li")
        element(item, "i", "\u2460", class_="mark").tail = "failure, numbered as in the table"
    element(body, "div", class_="scroll").append(draw_timeline(history))


def _failures(body: ElementTree.Element, history: History) -> None:
    element(body, "h2", "Failures")
    if not history.failures:
        element(body, "p", "No rank was lost.")
        return
    element(body, "p", "A process whose place another one has taken, and what it took to be where it was.")
    table = element(element(body, "div", class_="scroll"), "table", id="failures")
    row = element(element(table, "thead"), "tr")
    lossy = any(failure.lost_tokens is not None for failure in history.failures)
    for title, kind in (*_COLUMNS, *((("Lost tokens", "n"),) if lossy else ())):
        element(row, "th", title, class_=kind, scope="col")
    rows = element(table, "tbody")
    for index, failure in enumerate(history.failures, start=1):
        _failure(rows, index, failure, history, lossy=lossy)


def _failure(rows: ElementTree.Element, index: int, failure: Failure, history: History, *, lossy: bool) -> None:
    row = element(rows, "tr", data_failure=index)
    clock = datetime.fromtimestamp(failure.time, tz=timezone.utc).strftime("%H:%M:%S")
    everyone = len(failure.ranks) == len(history.lanes) > 1
    cells = [
        (str(index), "n"),
        (f"{seconds_text(failure.time - history.start)} ({clock})", "w"),
        ("all ranks" if everyone else ranks_text(failure.ranks), "w"),
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
    for text, kind in cells:
        element(row, "td", text, class_=kind)


def _until_new(failure: Failure) -> str:
    if failure.seconds is not None:
        return seconds_text(failure.seconds)
    return "lost again before" if failure.lost_again else "none came"


def _verdict(failure: Failure) -> tuple[str, str]:
    if failure.verified is None:
        return "not finished" if failure.lost_again else "nothing to replay", "w"
    return ("exact", "yes") if failure.verified else ("not exact", "no")


def _section(body: ElementTree.Element, title: str, about: str, svg: ElementTree.Element) -> None:
    element(body, "h2", title)
    element(body, "p", about)
    element(body, "div", class_="scroll").append(svg)


def _footer(body: ElementTree.Element, reading: Reading) -> None:
    footer = element(body, "footer")
    files = len(reading.files)
    skipped = "no line was skipped" if not reading.num_skipped else f"{reading.num_skipped} lines were skipped"
    element(
        footer, "p", f"{len(reading.records)} events from {files} {'file' if files == 1 else 'files'}; {skipped}"
        + (" (damaged, or no events of this version)." if reading.num_skipped else "."), id="read",
    )  # fmt: skip
    terms = element(footer, "dl")
    for term, meaning in _TERMS:
        element(terms, "dt", term)
        element(terms, "dd", meaning)


_TERMS = (
    ("Replayed", "Iterations of the restored window that were executed again to make its state whole, or by a lost "
     "stage alone. Each is compared with what was recorded when it was done first; \u201cexact\u201d: all agreed."),
    ("Done again", "Iterations that came after the restored window and were lost with the process."),
    ("When", "Last sign of life of what was lost. The time until the next new step runs from there to the end of the "
     "first iteration that the job had not finished before: detection, restart, restoring and replaying are in it."),
    ("Effective training time ratio", "It begins with the first event. The last iteration of a run is in no number: an "
     "iteration ends where the next one begins."),
)  # fmt: skip
