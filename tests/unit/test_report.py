"""The report over runs that are written by hand: every number that is drawn is known before."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from moetion_lightning.cli import main
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.events import (
    CaptureFinished,
    Event,
    IterationFinished,
    JsonlSink,
    OperatorsFound,
    PartialExpertsRestored,
    ReplayFinished,
    ReplayIteration,
    RestoreApplied,
    RestoreStarted,
    ScheduleMade,
    StageReplayFinished,
    TokensCounted,
    WindowCommitted,
)
from moetion_lightning.report import read_events, write_report
from moetion_lightning.report.drawing import LEFT, RIGHT, WIDTH, round_steps, seconds_text
from moetion_lightning.report.history import History, tell
from moetion_lightning.report.lanes import Kind
from moetion_lightning.units import size_text

START = 1_700_000_000.0
FOUND = OperatorsFound(num_operators=9, num_moe_layers=2, num_experts=6, dense_bytes=1000)


class Run:
    """Writes the events of processes at times of a test's choice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.now = 0.0
        path.mkdir(exist_ok=True)

    def emit(self, event: Event, *, pid: int, rank: int = 0, after: float = 0.0) -> None:
        self.now += after
        record = {"time": START + self.now, "pid": pid, "rank": rank, "event": event.kind, **dataclasses.asdict(event)}
        with (self.path / f"events-{rank}.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def iterate(self, numbers: Sequence[int], *, pid: int, ranks: Sequence[int] = (0,), stall: float = 0.25) -> None:
        """Iterations of one second."""
        for number in numbers:
            self.now += 1.0
            for rank in ranks:
                done = IterationFinished(iteration=number, seconds=1.0, stall_seconds=stall)
                self.emit(done, pid=pid + rank, rank=rank)

    def restore(self, first: int, replay: int, *, pid: int, tier: str = "host memory") -> None:
        last = first + replay
        self.emit(RestoreStarted(first_iteration=first, last_iteration=last, tier=tier, nbytes=10), pid=pid)
        self.emit(RestoreApplied(iteration=first, replay=replay, seconds=0.5), pid=pid, after=0.5)

    def replay(self, first: int, replay: int, *, pid: int, verified: bool = True) -> None:
        for slot, number in enumerate(range(first + 1, first + replay + 1), start=1):
            self.iterate([number], pid=pid)
            again = ReplayIteration(iteration=number, slot=slot, num_slots=replay + 1, verified=verified)
            self.emit(again, pid=pid)
        done = ReplayFinished(
            iteration=first + replay, replayed=replay, seconds=float(replay), compared=["losses"], verified=verified
        )
        self.emit(done, pid=pid)

    def history(self) -> History:
        return tell(read_events(self.path).records)


def killed(path: Path) -> Run:
    """Eight iterations, killed; back to 4, two replayed; killed in the replay's course; once more; up to 10."""
    run = Run(path)
    run.emit(FOUND, pid=1)
    schedule = ScheduleMade(window=3, heaviest_bytes=500, total_bytes=1300, dense_bytes=1000, reason="first schedule")
    run.emit(schedule, pid=1, after=1.0)
    run.iterate(range(1, 9), pid=1)
    run.emit(TokensCounted(iteration=8, tokens={"a": [80, 80], "b": [4, 4, 4, 4]}), pid=1)
    run.emit(FOUND, pid=2, after=3.0)
    run.restore(4, 2, pid=2)
    run.iterate([5], pid=2)
    run.emit(ReplayIteration(iteration=5, slot=1, num_slots=3, verified=True), pid=2)
    run.emit(FOUND, pid=3, after=2.0)
    run.restore(4, 2, pid=3)
    run.replay(4, 2, pid=3)
    run.iterate([7, 8, 9, 10], pid=3)
    run.emit(TokensCounted(iteration=10, tokens={"a": [6, 10], "b": [0, 1, 3, 4]}), pid=3)
    for number in range(1, 11):
        captured = CaptureFinished(iteration=number, slot=0, num_slots=3, nbytes=100 * number, seconds=0.25)
        run.emit(captured, pid=3)
    run.emit(WindowCommitted(first_iteration=8, last_iteration=10, nbytes=600, seconds=2.0), pid=3)
    return run


# --- reading ---------------------------------------------------------------------------------------------------------


def test_what_the_sink_writes_is_read_back(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "deep" / "events.jsonl", rank=3)
    written = (
        FOUND,
        PartialExpertsRestored(iteration=4, stale={"a/1": 2}, lost_tokens=5, lost_by_layer={"a": 5}, plt=0.25),
        TokensCounted(iteration=5, tokens={"a": [1, 2]}),
    )
    for event in written:
        sink(event)
    sink.close()
    reading = read_events(tmp_path)
    assert tuple(record.event for record in reading.records) == written
    assert {record.rank for record in reading.records} == {3}
    assert reading.files == (tmp_path / "deep" / "events.jsonl",)
    assert reading.num_skipped == 0


@pytest.mark.parametrize(
    "line",
    [
        b'{"time": 1.0, "pid": 1, "event": "IterationFinished", "iteration": 3, "seco',
        b"\xff\xfe\x00",
        b"[1, 2]",
        b'{"time": 1.0, "pid": 1, "event": "Nonsense"}',
        b'{"loss": 0.5, "step": 3}',
        b'{"time": 1.0, "pid": 1, "event": "StepSkipped"}',
        b'{"time": 1.0, "pid": 1, "event": "StepSkipped", "iteration": true}',
        b'{"time": NaN, "pid": 1, "event": "StepSkipped", "iteration": 1}',
        b'{"time": 1.0, "pid": "x", "event": "StepSkipped", "iteration": 1}',
        b'{"time": 1.0, "pid": 1, "rank": null, "event": "StepSkipped", "iteration": 1}',
        b'{"time": 1.0, "pid": 1, "event": "TokensCounted", "iteration": 1, "tokens": {"a": [1, "2"]}}',
    ],
)
def test_damaged_and_foreign_lines_are_skipped_and_counted(tmp_path: Path, line: bytes) -> None:
    killed(tmp_path / "run")
    file = tmp_path / "run" / "events-0.jsonl"
    whole = read_events(tmp_path / "run")
    file.write_bytes(line + b"\n\n" + file.read_bytes())
    (tmp_path / "run" / "steps.jsonl").write_text('{"loss": 1.0}\n')  # of somebody else
    reading = read_events(tmp_path / "run")
    assert reading.records == whole.records
    assert reading.num_skipped == 1
    assert reading.files == (file,)


def test_nothing_to_read_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="there is no such folder or file"):
        read_events(tmp_path / "nowhere")
    with pytest.raises(ConfigurationError, match=r"no \*\.jsonl file\. Train with events_path="):
        read_events(tmp_path)
    (tmp_path / "steps.jsonl").write_text('{"loss": 1.0}\n')
    with pytest.raises(ConfigurationError, match=r"1 \*\.jsonl files, none of which holds an event"):
        read_events(tmp_path)


# --- history ---------------------------------------------------------------------------------------------------------


def test_time_line_of_a_rank_that_is_killed(tmp_path: Path) -> None:
    lane = killed(tmp_path).history().lanes[0]
    spans = [(s.kind, s.start - START, s.end - START, s.first) for s in lane.spans]
    assert spans == [
        (Kind.STARTING, 0.0, 1.0, None),
        *((Kind.FIRST, float(n), n + 1.0, n) for n in range(1, 9)),
        (Kind.DOWN, 9.0, 12.0, None),
        (Kind.STARTING, 12.0, 12.5, None),
        (Kind.REPLAYED, 12.5, 13.5, 5),
        (Kind.DOWN, 13.5, 15.5, None),
        (Kind.STARTING, 15.5, 16.0, None),
        (Kind.REPLAYED, 16.0, 17.0, 5),
        (Kind.REPLAYED, 17.0, 18.0, 6),
        (Kind.AGAIN, 18.0, 19.0, 7),
        (Kind.AGAIN, 19.0, 20.0, 8),
        (Kind.FIRST, 20.0, 21.0, 9),
        (Kind.FIRST, 21.0, 22.0, 10),
    ]
    assert lane.commits == ((START + 22.0, 10),)


def test_failures_of_a_rank_that_is_killed_twice(tmp_path: Path) -> None:
    first, second = killed(tmp_path).history().failures
    assert first.time == START + 9.0
    assert (first.iteration, first.restored, first.replayed, first.again) == (8, 4, 1, 0)
    assert first.seconds is None
    assert first.lost_again
    assert first.verified is None
    assert second.sources == ("host memory",)
    assert (second.iteration, second.restored, second.replayed, second.again) == (8, 4, 2, 2)
    assert second.seconds == 21.0 - 13.5
    assert second.verified is True


def test_ratio_counts_each_iteration_once(tmp_path: Path) -> None:
    history = killed(tmp_path).history()
    assert history.ratio[0] == (0.0, 0.0)
    assert (9.0, 8 * 0.75 / 9.0) in history.ratio
    assert (13.5, 5 * 0.75 / 13.5) in history.ratio  # four that were kept, and one that was replayed
    assert history.ratio[-1] == (22.0, 10 * 0.75 / 22.0)
    assert history.stalls == dict.fromkeys(range(1, 11), 0.25)
    assert history.iterations == 10


def test_tokens_that_were_taken_back_do_not_count(tmp_path: Path) -> None:
    assert killed(tmp_path).history().tokens == {"a": [6, 10], "b": [0, 1, 3, 4]}


def test_a_job_that_begins_anew(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.emit(FOUND, pid=1)
    run.iterate([1, 2], pid=1)
    run.emit(FOUND, pid=2, after=1.0)
    run.iterate([1, 2, 3], pid=2)
    history = run.history()
    (failure,) = history.failures
    assert failure.sources == ()
    assert (failure.restored, failure.replayed, failure.again, failure.seconds) == (0, 0, 2, 4.0)
    assert history.ratio[-1] == (6.0, 3 * 0.75 / 6.0)


def pipeline(path: Path, *, verified: bool = True) -> Run:
    """Three ranks; the middle one is lost at iteration 6 and replays its window of 4 alone."""
    run = Run(path)
    for rank in range(3):
        run.emit(FOUND, pid=10 + rank, rank=rank)
    run.iterate(range(1, 7), pid=10, ranks=range(3))
    started = RestoreStarted(first_iteration=4, last_iteration=6, tier="neighbours' logs", nbytes=1)
    run.emit(started, pid=20, rank=1, after=2.0)
    done = StageReplayFinished(stage=1, first_iteration=4, last_iteration=6, seconds=1.5, verified=verified)
    run.emit(done, pid=20, rank=1, after=2.0)
    applied = RestoreApplied(iteration=6, replay=0, seconds=1.5)
    for rank in range(3):
        run.emit(applied, pid=20 if rank == 1 else 10 + rank, rank=rank)
    run.now += 1.0
    for rank in range(3):
        finished = IterationFinished(iteration=7, seconds=1.0, stall_seconds=0.0)
        run.emit(finished, pid=20 if rank == 1 else 10 + rank, rank=rank)
    return run


def test_a_stage_that_is_replayed_alone_while_the_others_wait(tmp_path: Path) -> None:
    history = pipeline(tmp_path).history()
    (failure,) = history.failures
    assert failure.ranks == (1,)
    assert (failure.restored, failure.replayed, failure.again) == (4, 2, 0)
    assert (failure.seconds, failure.verified) == (5.0, True)
    survivor, lost, _ = history.lanes
    assert [(s.kind, s.start - START, s.end - START) for s in survivor.spans[6:]] == [
        (Kind.WAITING, 6.0, 10.0),
        (Kind.FIRST, 10.0, 11.0),
    ]
    assert [(s.kind, s.start - START, s.end - START) for s in lost.spans[6:]] == [
        (Kind.DOWN, 6.0, 8.0),
        (Kind.STARTING, 8.0, 8.5),
        (Kind.STAGE_REPLAY, 8.5, 10.0),
        (Kind.FIRST, 10.0, 11.0),
    ]


def test_a_stage_replay_that_was_given_up_verifies_nothing(tmp_path: Path) -> None:
    (failure,) = pipeline(tmp_path, verified=False).history().failures
    assert failure.verified is None
    assert failure.replayed == 0


def test_ranks_that_are_lost_together_are_one_failure(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for start, numbers in ((10, range(1, 4)), (20, range(2, 6)), (30, range(6, 8))):
        for rank in range(2):
            run.emit(FOUND, pid=start + rank, rank=rank, after=0.5)
        run.iterate(numbers, pid=start, ranks=range(2))
    first, second = run.history().failures
    assert first.ranks == second.ranks == (0, 1)
    assert (first.iteration, second.iteration) == (3, 5)


# --- the page --------------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """All elements, with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def page(run: Run) -> str:
    out = run.path / "page" / "report.html"
    write_report(run.path, out)
    return out.read_text(encoding="utf-8")


def figures(text: str) -> dict[str, ElementTree.Element]:
    parsed = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    return {str(svg.get("id")): svg for svg in parsed}


def of_class(svg: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [e for e in svg.iter() if name in str(e.get("class", "")).split()]


def test_page_needs_nothing_else(tmp_path: Path) -> None:
    text = page(killed(tmp_path))
    tags = Tags(text).found
    assert not {tag for tag, _ in tags} & {"script", "link", "img", "iframe", "object", "embed"}
    assert not [attributes for _, attributes in tags if attributes.keys() & {"src", "href", "onload", "style"}]
    assert "url(" not in text
    assert "@import" not in text
    assert set(re.findall(r"https?://[^\"< ]+", text)) == {"http://www.w3.org/2000/svg"}
    assert "prefers-color-scheme: dark" in text
    assert len([1 for tag, _ in tags if tag == "h1"]) == 1


def test_bars_of_the_time_line_are_where_and_as_long_as_the_events_say(tmp_path: Path) -> None:
    run = killed(tmp_path)
    history, svg = run.history(), figures(page(run))["timeline"]
    per_second = (WIDTH - LEFT - RIGHT) / history.wall_seconds
    spans = [(span, span.kind.value) for span in history.lanes[0].spans]
    drawn = of_class(svg, "span")
    drawn = [bar for bar in drawn if "capture" not in str(bar.get("class"))]
    # Iterations that follow each other without a gap are one bar.
    bars = [
        (b.get("class"), b.get("data-first"), b.get("data-last"), float(b.get("x", 0)), float(b.get("width", 0)))
        for b in drawn
    ]
    assert [(kind, first, last) for kind, first, last, _, _ in bars] == [
        ("span starting", None, None),
        ("span first", "1", "8"),
        ("span down", None, None),
        ("span starting", None, None),
        ("span replayed", "5", "5"),
        ("span down", None, None),
        ("span starting", None, None),
        ("span replayed", "5", "6"),
        ("span again", "7", "8"),
        ("span first", "9", "10"),
    ]
    for kind in {kind for _, kind in spans}:
        seconds = sum(span.end - span.start for span, name in spans if name == kind)
        width = sum(width for name, *_, width in bars if name == f"span {kind}")
        assert width == pytest.approx(seconds * per_second, abs=0.05), kind  # positions are rounded to 0.01
    assert bars[2][3] == pytest.approx(LEFT + 9.0 * per_second, abs=0.01)
    assert len(of_class(svg, "failure")) == 2
    assert len(of_class(svg, "commit")) == 1


def test_bars_of_stall_and_bytes(tmp_path: Path) -> None:
    drawn = figures(page(killed(tmp_path)))
    for name, expected in (("stall", [0.25] * 10), ("bytes", [100.0 * n for n in range(1, 11)])):
        bars = of_class(drawn[name], "bar")
        assert [float(bar.get("data-value", 0)) for bar in bars] == expected
        heights = [float(bar.get("height", 0)) for bar in bars]
        assert heights == pytest.approx([value / max(expected) * max(heights) for value in expected], abs=0.02)
    (reference,) = of_class(drawn["bytes"], "reference")
    assert float(reference.get("data-value", 0)) == 1000.0
    highest = of_class(drawn["bytes"], "bar")[-1]  # 1000 bytes, too
    assert float(reference.get("y1", 0)) == pytest.approx(float(highest.get("y", 0)), abs=0.01)


def test_very_many_iterations_share_bars(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.emit(FOUND, pid=1)
    for number in range(1, 1001):
        run.iterate([number], pid=1, stall=0.5 if number == 777 else 0.25)
    drawn = figures(page(run))
    bars = of_class(drawn["stall"], "bar")
    assert len(bars) == 200
    assert [bar.get("data-iteration") for bar in bars if bar.get("data-value") == "0.500000"] == ["777"]
    assert len(of_class(drawn["timeline"], "span")) == 1
    (line,) = of_class(drawn["ratio"], "line")
    assert len(str(line.get("points")).split()) < 650


def test_load_is_a_map_of_layers_and_experts(tmp_path: Path) -> None:
    cells = [c for c in of_class(figures(page(killed(tmp_path)))["load"], "cell") if c.get("data-layer")]
    found = {(c.get("data-layer"), int(c.get("data-expert", 0))): int(c.get("data-tokens", 0)) for c in cells}
    expected = {"a": [6, 10], "b": [0, 1, 3, 4]}
    assert found == {(layer, e): n for layer, row in expected.items() for e, n in enumerate(row)}
    by_load = sorted(cells, key=lambda c: float(c.get("fill-opacity", 0)))
    assert (by_load[0].get("data-tokens"), by_load[-1].get("data-tokens")) == ("0", "4")


def test_ratio_curve_ends_at_the_ratio(tmp_path: Path) -> None:
    run = killed(tmp_path)
    svg = figures(page(run))["ratio"]
    (line,) = of_class(svg, "line")
    assert float(line.get("data-last", 0)) == pytest.approx(10 * 0.75 / 22.0, abs=1e-6)  # six digits are written
    ys = [float(point.split(",")[1]) for point in str(line.get("points")).split()]
    top, bottom = 30.0, 180.0
    assert ys[-1] == pytest.approx(bottom - (bottom - top) * 10 * 0.75 / 22.0, abs=0.01)


def test_table_and_tiles(tmp_path: Path) -> None:
    text = page(killed(tmp_path))
    rows = re.findall(r"<tr data-failure=.*?</tr>", text, re.DOTALL)
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows]
    assert cells == [
        ["1", "9 s (22:13:29)", "rank 0", "8", "host memory", "4", "1", "0", "lost again before", "not finished"],
        ["2", "13.5 s (22:13:33)", "rank 0", "8", "host memory", "4", "2", "2", "7.5 s", "exact"],
    ]
    tiles = dict(re.findall(r'data-tile="(\w+)"><b>(.*?)</b>', text))
    assert tiles == {
        "ettr": "34.1%",
        "iterations": "10",
        "failures": "2",
        "recovery": "7.5 s",
        "stall": "250 ms",
        "bytes": "550 B",
    }


def test_lossy_runs_show_what_was_lost(tmp_path: Path) -> None:
    run = killed(tmp_path)
    run.emit(FOUND, pid=4, after=1.0)
    run.restore(9, 0, pid=4)
    lost = PartialExpertsRestored(iteration=9, stale={}, lost_tokens=12, lost_by_layer={"a": 12, "b": 0}, plt=0.125)
    run.emit(lost, pid=4)
    run.iterate([10, 11], pid=4)
    text = page(run)
    assert ">Lost tokens</th>" in text
    assert re.findall(r'<td class="n">(\d*)</td></tr>', text) == ["", "", "12"]
    assert dict(re.findall(r'data-tile="(\w+)"><b>(.*?)</b>', text))["plt"] == "12.50%"


def test_names_are_escaped(tmp_path: Path) -> None:
    run = Run(tmp_path / "a<b>&c")
    run.emit(FOUND, pid=1)
    run.iterate([1], pid=1)
    run.emit(TokensCounted(iteration=1, tokens={"<script>": [1]}), pid=1)
    text = page(run)
    assert "<script>" not in text
    assert "<h1>Run report: a&lt;b&gt;&amp;c</h1>" in text


def test_a_run_without_any_iteration_is_drawn(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.emit(FOUND, pid=1)
    assert "No rank was lost." in page(run)


# --- the command -----------------------------------------------------------------------------------------------------


def test_command_writes_beside_the_events(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    killed(tmp_path / "run")
    assert main(["report", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert "events from 1 files" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "run" / "events-0.jsonl"), "--out", str(tmp_path / "new" / "x.html")]) == 0
    assert (tmp_path / "new" / "x.html").exists()


def test_command_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "moetion report: error:" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_page_that_cannot_be_written_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    killed(tmp_path / "run")
    for out in (tmp_path, tmp_path / "run" / "events-0.jsonl" / "x.html"):
        assert main(["report", str(tmp_path / "run"), "--out", str(out)]) == 2
        assert f"{out}: cannot write the report there" in capsys.readouterr().err


def test_sink_that_cannot_write_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "events.jsonl"):
        with pytest.raises(ConfigurationError, match="events_path=.*cannot append to this file"):
            JsonlSink(path)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (2e-6, "2 \u00b5s"), (0.0125, "12.5 ms"), (1.5, "1.5 s"), (119, "119 s"), (150, "2 min 30 s"),
     (180, "3 min"), (3600, "1 h"), (9000, "2 h 30 min")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def test_sizes_and_steps() -> None:
    assert [size_text(n) for n in (12, 1500, 2.5e6, 3e9, 4e12)] == ["12 B", "1.5 kB", "2.5 MB", "3 GB", "4 TB"]
    assert round_steps(7.0) == [0.0, 2.0, 4.0, 6.0, 8.0]
    assert round_steps(0.0) == [0.0, 1.0]
    for high in (0.003, 1.0, 9.99, 10.0, 123456.0):
        steps = round_steps(high)
        assert steps[-1] >= high
        assert len(steps) <= 6
