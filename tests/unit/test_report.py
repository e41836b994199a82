"""The report over runs that are written by hand: every number that is drawn is known before."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moetion_lightning.badput import NANOSECONDS, Use
from moetion_lightning.cli import main
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.events import (
    CaptureFinished,
    CaptureStarted,
    Event,
    IterationFinished,
    JsonlSink,
    LastIterationFinished,
    LossRecorded,
    OperatorsFound,
    PartialExpertsRestored,
    ProcessEnded,
    ProcessStarted,
    ReplayFinished,
    ReplayIteration,
    RestoreApplied,
    RestoreStarted,
    ScheduleMade,
    StageReplayFinished,
    TokensCounted,
    WindowCommitted,
)
from moetion_lightning.report import History, as_json, read_events, reading, tell, write_report
from moetion_lightning.report import history as histories
from moetion_lightning.report.figures import Run as Drawn
from moetion_lightning.report.figures import short_names
from moetion_lightning.report.history import Curve
from moetion_lightning.report.lanes import Lane, Piece
from moetion_lightning.report.page import make_page
from moetion_lightning.report.words import seconds_text
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
        return tell(read_events(self.path))


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
    records = tuple(reading)
    assert tuple(record.event for record in records) == written
    assert {record.rank for record in records} == {3}
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
    whole = list(read_events(tmp_path / "run"))
    file.write_bytes(line + b"\n\n" + file.read_bytes())
    (tmp_path / "run" / "steps.jsonl").write_text('{"loss": 1.0}\n')  # of somebody else
    reading = read_events(tmp_path / "run")
    assert list(reading) == whole
    assert reading.num_skipped == 1
    assert reading.files == (file,)


def test_a_line_that_a_kill_cut_off_costs_no_other_one(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for end in (10, None):
        sink = JsonlSink(path)
        sink(TokensCounted(iteration=5, tokens={"a": [1, 2]}))
        sink.close()
        path.write_bytes(path.read_bytes()[:end])
    found = read_events(tmp_path)
    assert [record.event.iteration for record in found if isinstance(record.event, TokensCounted)] == [5]
    assert found.num_skipped == 1


@pytest.mark.parametrize("rank", [None, 3])
def test_the_fast_way_of_reading_says_what_json_does(tmp_path: Path, rank: int | None) -> None:
    sink = JsonlSink(tmp_path / "events.jsonl", rank=rank)
    for seconds, stall in ((0.1 + 0.2, 1e-05), (1e16, 0.0), (-0.25, 5e-324), (2, 1)):
        sink(IterationFinished(iteration=7, seconds=seconds, stall_seconds=stall))
    sink.close()
    lines = sink.path.read_bytes().splitlines(keepends=True)
    assert [reading._ITERATION(line) is not None for line in lines] == [True, False, True, False]
    assert [reading._parse(line) for line in lines] == [
        reading._parse(line[:-1]) for line in lines
    ]  # not as the sink writes it
    assert reading._parse(lines[0].replace(b"7,", b"07,")) is None


def test_nothing_to_read_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="there is no such folder or file"):
        read_events(tmp_path / "nowhere")
    with pytest.raises(ConfigurationError, match=r"no \*\.jsonl file\. Train with events_path="):
        read_events(tmp_path)
    (tmp_path / "steps.jsonl").write_text('{"loss": 1.0}\n')
    with pytest.raises(ConfigurationError, match=r"1 \*\.jsonl files, none of which holds an event"):
        read_events(tmp_path)


# --- history ---------------------------------------------------------------------------------------------------------


def seconds(history: History, rank: int) -> list[tuple[Use, float, float, int]]:
    """Pieces of a rank's time line, seconds since the start."""
    pieces = next(lane for lane in history.lanes if lane.rank == rank).pieces
    return [(p.use, p.start / NANOSECONDS - START, p.end / NANOSECONDS - START, p.first) for p in pieces]


def test_time_line_of_a_rank_that_is_killed(tmp_path: Path) -> None:
    run = killed(tmp_path)
    assert [piece for piece in seconds(run.history(), 0) if piece[0] is not Use.STALL] == [
        (Use.START, 0.0, 1.0, 0),
        *((Use.PRODUCTIVE, float(n), n + 0.75, n) for n in range(1, 9)),
        (Use.DETECTION, 9.0, 12.0, 0),
        (Use.RESTORE, 12.0, 12.5, 0),
        (Use.REPLAY, 12.5, 13.5, 5),
        (Use.DETECTION, 13.5, 15.5, 0),
        (Use.RESTORE, 15.5, 16.0, 0),
        (Use.REPLAY, 16.0, 18.0, 5),
        (Use.REDO, 18.0, 20.0, 7),
        (Use.PRODUCTIVE, 20.0, 20.75, 9),
        (Use.PRODUCTIVE, 21.0, 21.75, 10),
    ]


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


def test_ratio_counts_each_iteration_once_and_never_before_other_ranks_have(tmp_path: Path) -> None:
    history = killed(tmp_path).history()
    assert history.ettr == 10 * 0.75 / 22.0
    times, ratio, _ = history.ratio
    assert ratio[-1] == pytest.approx(10 * 0.75 / 22.0)
    assert np.interp(9.0, times, ratio) == pytest.approx(8 * 0.75 / 9.0, abs=0.01)
    run = Run(tmp_path / "two")  # the second rank's events come later
    for rank in range(2):
        run.emit(FOUND, pid=1 + rank, rank=rank)
    for number in range(1, 101):
        for rank, after in ((0, 1.0), (1, 0.4)):
            done = IterationFinished(iteration=number, seconds=1.4, stall_seconds=0.0)
            run.emit(done, pid=1 + rank, rank=rank, after=after)
    course = run.history().ratio[1][50:]
    assert np.abs(np.diff(course)).max() < 2e-3  # no saw-tooth


def test_curves_hold_each_iteration_once_and_what_was_taken_back(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for pid, numbers in ((1, range(1, 6)), (2, range(4, 8))):
        run.emit(FOUND, pid=pid)
        for number in numbers:
            run.iterate([number], pid=pid)
            run.emit(LossRecorded(iteration=number, loss=9.0 - number, learning_rate=0.5), pid=pid)
    run.emit(LastIterationFinished(iteration=8, seconds=1.0, stall_seconds=0.0), pid=2, after=1.0)
    history = run.history()
    assert history.loss.iterations.tolist() == list(range(1, 8))
    assert history.loss.values.tolist() == [9.0 - number for number in range(1, 8)]
    assert history.lost_loss.iterations.tolist() == [4, 5]
    assert history.stalls.values.tolist() == [0.25] * 7
    assert history.iterations == 8
    assert history.uses[Use.REDO] == 2 * NANOSECONDS


def test_a_stop_that_was_said_is_told_and_a_completed_fit_is_no_failure(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for pid, reason, predecessor in ((1, "ValueError: no", ""), (2, "", "exit code 1"), (3, "", "")):
        made = START + run.now + 1.0
        environment = {"host": "here", "torch": "2.13"}
        run.emit(
            ProcessStarted(
                created_at=made, groups_seconds=0.0, predecessor=predecessor, environment=environment, settings={}
            ),
            pid=pid, after=3.0,
        )  # fmt: skip
        run.iterate([pid], pid=pid)
        if pid != 1:
            run.emit(ProcessEnded(completed=True, reason=reason), pid=pid)
        else:
            run.emit(ProcessEnded(completed=False, reason=reason), pid=pid)
    history = run.history()
    (failure,) = history.failures
    assert failure.cause == "ValueError: no"  # the launcher has only seen an exit code
    assert history.uses[Use.START] == 3 * 2 * NANOSECONDS
    assert (history.uses[Use.DETECTION], history.uses[Use.IDLE]) == (NANOSECONDS, NANOSECONDS)
    assert as_json("run", history)["environment"] == {"host": "here", "torch": "2.13"}


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
    assert history.ettr == 3 * 0.75 / 6.0


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
    survivor, lost = seconds(history, 0), seconds(history, 1)
    assert survivor[-3:] == [(Use.START, 6.0, 8.5, 0), (Use.RESTORE, 8.5, 10.0, 0), (Use.PRODUCTIVE, 10.0, 11.0, 7)]
    assert lost[-4:] == [
        (Use.DETECTION, 6.0, 8.0, 0),
        (Use.START, 8.0, 8.5, 0),
        (Use.REPLAY, 8.5, 10.0, 0),
        (Use.PRODUCTIVE, 10.0, 11.0, 7),
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


def test_parts_that_are_read_at_once_make_the_same_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = pipeline(tmp_path)
    run.emit(TokensCounted(iteration=7, tokens={"a": [1, 2]}), pid=10)
    whole = run.history()
    monkeypatch.setattr(reading, "_LONG", 0)
    monkeypatch.setattr(histories, "ProcessPoolExecutor", lambda count, context: ThreadPoolExecutor(count))
    events = read_events(tmp_path)
    assert len(events.parts(2)) == 2
    together = tell(events, processes=2)
    assert as_json("run", together) == as_json("run", whole)
    assert together.tokens == whole.tokens == {"a": [1, 2]}
    assert events.num_events == len(list(read_events(tmp_path)))
    (tmp_path / "more.jsonl").write_bytes((tmp_path / "events-0.jsonl").read_bytes())  # one rank in several files
    assert tell(read_events(tmp_path), processes=4).num_processes == whole.num_processes


# --- the page --------------------------------------------------------------------------------------------------------


def page(run: Run) -> str:
    out = run.path / "page" / "report.html"
    write_report(run.path, out)
    return out.read_text(encoding="utf-8")


def drawn(text: str) -> dict[str, dict[str, Any]]:
    """The figures, as Bokeh will read them, by their places."""
    data = re.search(r'<script type="application/json" id="figures">(.*?)</script>', text, re.DOTALL)
    assert data is not None
    documents, (item,) = json.loads(data[1].replace(r"<\/", "</"))
    (document,) = documents.values()
    roots = {root["id"]: root for root in document["roots"]}
    return {place: roots[root] for root, place in item["roots"].items()}


def test_page_needs_nothing_else(tmp_path: Path) -> None:
    text = page(killed(tmp_path))
    own = "".join(part for part in text.split("</script>") if len(part) < 1_000_000)  # without Bokeh
    assert len(text) - len(own) > 1_000_000
    assert not re.findall(r"<(?:link|img|iframe|object|embed)\b|\bsrc=|\bhref=|@import|https?://", own)
    assert "prefers-color-scheme: dark" in own
    assert set(drawn(text)) == {"badput", "timeline-0", "ratio", "stalls", "bytes", "load-0"}  # no loss was recorded


def test_page_of_many_ranks_and_iterations_stays_small(tmp_path: Path) -> None:
    """As large as it becomes: 64 ranks with 100,000 iterations each."""
    count = 100_000
    lane = Lane(0)
    for number in range(count // 10):  # each span another use than the one before
        lane.add(tuple(Use)[number % 7], number * NANOSECONDS, (number + 1) * NANOSECONDS, number)
    lane.shorten(625)
    assert 200 < len(lane.pieces) <= 625
    assert (lane.pieces[0].start, lane.pieces[-1].end) == (0, count // 10 * NANOSECONDS)
    pieces = [Piece(n, n + 1, {tuple(Use)[n % 10]: 1}) for n in range(625)]
    lanes = tuple(Lane(rank) for rank in range(64))
    for each in lanes:
        each.pieces = pieces
    values = np.random.default_rng(0).random(count)
    curve = Curve(iterations=np.arange(1, count + 1), values=values, highest=values + 1)
    curves = dict.fromkeys(("loss", "lost_loss", "rates", "stalls", "nbytes"), curve)
    tokens = {f"model.layers.{n}.experts": list(range(256)) for n in range(60)}
    history = dataclasses.replace(killed(tmp_path).history(), lanes=lanes, tokens=tokens, **curves)
    assert 1_300_000 < len(make_page([Drawn(name="many", history=history)])) < 3_000_000


def test_table_and_tiles(tmp_path: Path) -> None:
    text = page(killed(tmp_path))
    rows = re.findall(r"<tr data-failure=.*?</tr>", text, re.DOTALL)
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows]
    word = "no word: killed, or lost with its machine"
    assert cells == [
        ["1", "9 s (22:13:29)", "rank 0", word, "8", "host memory", "4", "1", "0", "lost again before", "not finished"],
        ["2", "13.5 s (22:13:33)", "rank 0", word, "8", "host memory", "4", "2", "2", "7.5 s", "exact"],
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
    run.emit(TokensCounted(iteration=1, tokens={"</script><script>": [1]}), pid=1)
    text = page(run)
    assert "</script><script>" not in text.replace("</script><script>\nconst", "")
    assert "<h1>Run report: a&lt;b&gt;&amp;c</h1>" in text


def test_a_run_without_any_iteration_is_drawn(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.emit(FOUND, pid=1)
    assert "No rank was lost." in page(run)


def test_two_runs_side_by_side(tmp_path: Path) -> None:
    first, second = killed(tmp_path / "first"), killed(tmp_path / "second")
    with (second.path / "events-0.jsonl").open("a") as file:
        file.write("torn\n")
    assert [reading.num_skipped for reading in write_report(first.path, tmp_path / "x.html", second.path)] == [0, 1]
    text = (tmp_path / "x.html").read_text()
    assert "<h1>Run report: first and second</h1>" in text
    assert {"timeline-0", "timeline-1", "badput", "load-0", "load-1"} <= drawn(text).keys()
    assert text.count('<tr data-failure="2">') == 2
    assert "no line was skipped. second: " in text
    assert "lines that were skipped: 1" in text


# --- the command -----------------------------------------------------------------------------------------------------


def test_command_writes_beside_the_events(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    killed(tmp_path / "run")
    assert main(["report", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert "events from 1 file" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "run" / "events-0.jsonl"), "--out", str(tmp_path / "new" / "x.html")]) == 0
    assert (tmp_path / "new" / "x.html").exists()


def test_command_prints_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = killed(tmp_path)
    run.emit(CaptureStarted(iteration=10, slot=0, num_slots=3), pid=3, after=1.0)  # the page does not read it, either
    assert main(["report", str(tmp_path), "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["productive_seconds"] == 7.5
    assert numbers["badput_seconds"]["detection"] == 5.0
    assert numbers["productive_seconds"] + sum(numbers["badput_seconds"].values()) == pytest.approx(22.0)
    assert [failure["iteration"] for failure in numbers["failures"]] == [8, 8]
    assert not (tmp_path / "report.html").exists()


def test_a_missing_library_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    killed(tmp_path)
    monkeypatch.setitem(sys.modules, "moetion_lightning.report.figures", None)
    assert main(["report", str(tmp_path)]) == 2
    assert "pip install 'moetion-lightning[report]'" in capsys.readouterr().err


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


def test_sizes_and_names() -> None:
    assert [size_text(n) for n in (12, 1500, 2.5e6, 3e9, 4e12)] == ["12 B", "1.5 kB", "2.5 MB", "3 GB", "4 TB"]
    layers = [f"body.blocks.{number}.experts" for number in (0, 7)]
    assert [short for short, _ in short_names(layers)] == ["0", "7"]
