"""The report of real runs that were killed: its numbers against their events, and what a browser makes of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from moetion_lightning.badput import NANOSECONDS, Use
from moetion_lightning.cli import main
from moetion_lightning.report import read_events as read
from moetion_lightning.report import tell
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


def numbers(out: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["report", str(out), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def failures(text: str) -> list[list[str]]:
    rows = re.findall(r"<tr data-failure=.*?</tr>", text, re.DOTALL)
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows]


def killed(drill: Drill) -> Path:
    return drill.killed(SPEC, [{"hook": "backward", "step": 11}, {"hook": "batch_end", "step": 21}])


def test_report_of_a_killed_run_agrees_with_its_events_and_its_monitor(
    drill: Drill, capsys: pytest.CaptureFixture[str]
) -> None:
    """The monitor knows nothing of the last iteration, nor of the end: half a second."""
    out = killed(drill)
    text, found = report(out), numbers(out, capsys)
    restored = read_events(out, "RestoreApplied")
    rows = failures(text)
    assert [row[5:8] for row in rows] == [["host memory", str(e["iteration"]), str(e["replay"])] for e in restored]
    assert [row[10] for row in rows] == ["exact", "exact"]
    assert [failure["iteration"] for failure in found["failures"]] == [11, 20]
    assert (found["iterations"], found["completed"], found["num_processes"]) == (30, True, 3)
    assert found["environment"]["torch"] == torch.__version__
    assert "<b>30</b><span>iterations" in text
    last = monitored.read(out)[-1]["values"]
    for cause, seconds in found["badput_seconds"].items():
        if cause != "idle":
            assert seconds == pytest.approx(last[f"moetion/badput/{cause}_seconds"], abs=0.5), cause
    assert found["productive_seconds"] + sum(found["badput_seconds"].values()) == pytest.approx(found["wall_seconds"])


@pytest.mark.slow
def test_report_of_a_pipeline_shows_the_stage_that_was_replayed_and_the_others_waiting(drill: Drill) -> None:
    out, ended, _ = drill.elastic(
        STAGES, [{"hook": "backward", "step": 8, "rank": 1, "committed": {"last_iteration": 8}}]
    )
    assert ended.good, f"{ended}\n{read_logs(out)}"
    (finished,) = read_events(out, "StageReplayFinished")
    history = tell(read(out))

    def seconds(rank: int, use: Use) -> float:
        return sum(piece.parts.get(use, 0) for piece in history.lanes[rank].pieces) / NANOSECONDS

    assert seconds(1, Use.REPLAY) == pytest.approx(finished["seconds"], abs=0.01)  # of two clocks
    for rank in (0, 2):
        assert seconds(rank, Use.REPLAY) == 0
        assert seconds(rank, Use.DETECTION) > 0
    (row,) = failures(report(out))
    assert (row[2], row[4]) == ("rank 1", "8")
    assert row[5].startswith("stage replayed from its neighbours&#x27; logs")
    assert row[6:9] == ["5", "3", "0"]
    assert row[10] == "exact"


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
