"""The report of real runs that were killed: its numbers against their events, and what a browser makes of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from moetion_lightning.cli import main
from tests.runs import monitored
from tests.runs.drill import Drill, read_events, read_logs

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SPEC: dict[str, Any] = {"block": "fused", "samples": 40, "callbacks": ["monitor"]}
STAGES: dict[str, Any] = {
    "module": "decoder",
    "strategy": "moetion",
    "ranks": 3,
    "num_layers": 4,
    "batch_size": 8,
    "samples": 40,
    "epochs": 3,
    "pipeline": {"pipeline_parallel_size": 3, "num_microbatches": 4},
    "boundary_log": {},
}


def report(out: Path) -> str:
    assert main(["report", str(out)]) == 0
    return (out / "report.html").read_text(encoding="utf-8")


def figure(text: str, name: str) -> ElementTree.Element:
    parsed = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    return next(svg for svg in parsed if svg.get("id") == name)


def lanes(text: str) -> list[list[ElementTree.Element]]:
    groups = [e for e in figure(text, "timeline").iter() if e.get("class") == "lane"]
    return [[bar for bar in group if str(bar.get("class", "")).startswith("span")] for group in groups]


def seconds(bars: list[ElementTree.Element], kind: str) -> float:
    return sum(float(bar.get("data-seconds", 0)) for bar in bars if bar.get("class") == f"span {kind}")


def failures(text: str) -> list[list[str]]:
    rows = re.findall(r"<tr data-failure=.*?</tr>", text, re.DOTALL)
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows]


def killed(drill: Drill) -> Path:
    return drill.killed(SPEC, [{"hook": "backward", "step": 11}, {"hook": "batch_end", "step": 21}])


def test_page_of_a_killed_run_agrees_with_its_events_and_its_monitor(drill: Drill) -> None:
    """The monitor reads the clock a moment later than the events, and starts a moment earlier: 0.05 of the ratio."""
    out = killed(drill)
    text = report(out)
    (bars,) = lanes(text)
    pids = list(dict.fromkeys(event["pid"] for event in read_events(out)))
    assert len(pids) == 3
    times = [[event["time"] for event in read_events(out) if event["pid"] == pid] for pid in pids]
    without = sum(after[0] - before[-1] for before, after in zip(times, times[1:]))
    assert seconds(bars, "down") == pytest.approx(without, abs=1e-5)
    replayed = [bar for bar in bars if bar.get("class") == "span replayed"]
    restored = read_events(out, "RestoreApplied")
    assert sum(int(b.get("data-last", 0)) - int(b.get("data-first", 0)) + 1 for b in replayed) == sum(
        event["replay"] for event in restored
    )
    rows = failures(text)
    assert [row[4:7] for row in rows] == [["host memory", str(e["iteration"]), str(e["replay"])] for e in restored]
    assert [row[9] for row in rows] == ["exact", "exact"]
    captured = {event["iteration"]: event["nbytes"] for event in read_events(out, "CaptureFinished")}
    drawn = [bar for bar in figure(text, "bytes").iter() if bar.get("class") == "bar bytes"]
    assert {int(b.get("data-iteration", 0)): float(b.get("data-value", 0)) for b in drawn} == captured
    last = monitored.read(out)[-1]
    assert f"<b>{last['num_iterations']}</b><span>iterations" in text
    (line,) = [e for e in figure(text, "ratio").iter() if e.get("class") == "line"]
    assert float(line.get("data-last", 0)) == pytest.approx(last["values"]["moetion/ettr"], abs=0.05)
    cells = [c for c in figure(text, "load").iter() if c.get("data-layer")]
    assert [int(c.get("data-tokens", 0)) for c in cells] == [n for row in last["tokens"].values() for n in row]


@pytest.mark.slow
def test_page_of_a_pipeline_shows_the_stage_that_was_replayed_and_the_others_waiting(drill: Drill) -> None:
    out, ended, _ = drill.elastic(
        STAGES, [{"hook": "backward", "step": 8, "rank": 1, "committed": {"last_iteration": 8}}]
    )
    assert ended.good, f"{ended}\n{read_logs(out)}"
    text = report(out)
    (finished,) = read_events(out, "StageReplayFinished")
    first, lost, third = lanes(text)
    assert seconds(lost, "stage") == pytest.approx(finished["seconds"], abs=0.01)  # of two clocks
    assert seconds(lost, "down") > 0
    for bars in (first, third):
        assert seconds(bars, "waiting") > seconds(lost, "stage")
        assert seconds(bars, "down") == seconds(bars, "stage") == 0
    (row,) = failures(text)
    assert row[2:4] == ["rank 1", "8"]
    assert row[4].startswith("stage replayed from its neighbours' logs")
    assert row[5:8] == ["5", "3", "0"]
    assert row[9] == "exact"


def test_page_in_a_browser(drill: Drill, tmp_path: Path) -> None:
    """In light and in dark surroundings the page has another ground, and marks on it in both."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no headless browser: none of {', '.join(BROWSERS)} is installed")
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    out = killed(drill)
    report(out)
    grounds = []
    for scheme in (1, 0):  # light, dark
        shot = tmp_path / f"{scheme}.png"
        subprocess.run(
            [
                browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1120,2000",
                f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={scheme}",
                f"--screenshot={shot}", (out / "report.html").as_uri(),
            ],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip
        with image.open(shot) as picture:
            colours = picture.convert("RGB").getcolors(1 << 24)
        grounds.append(max(colours)[1])
        assert len([count for count, _ in colours if count > 200]) > 8  # bars, lines, panels, cells
    assert grounds == [(255, 255, 255), (15, 18, 22)]
