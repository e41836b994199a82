"""`moetion plan` and `moetion simulate`."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from xml.etree import ElementTree

import pytest

from moetion_lightning.cli import main

TRACES = Path(__file__).resolve().parents[2] / "benchmarks" / "papers" / "traces"
MODEL = [
    "--parameters", "671B", "--experts", "256", "--active-parameters", "37B", "--ranks", "16384",
    "--iteration-time", "5s", "--mtbf", "10min",
]  # fmt: skip
POLICIES = {"sparse", "gradient_log", "dense", "partial", "two_phase", "files"}


def test_plan_of_a_described_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "plan.svg"
    assert main(["plan", *MODEL, "--picture", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "671B parameters on 16,384 ranks, 491 MB of state" in out
    for callback in (
        "SparseExpertCheckpoint",
        "GradientLogCheckpoint(window=8)",
        "TwoPhaseCheckpoint",
        "ModelCheckpoint",
    ):
        assert callback in out
    assert "\nTake " in out
    assert len(ElementTree.parse(picture).findall(".//{*}polyline")) == len(POLICIES)


def test_plan_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *MODEL, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {policy["name"] for policy in found["policies"]} == POLICIES
    assert found["recommended"] in POLICIES - {"partial"}
    assert all(
        policy["ettr"] + sum(policy["badput"].values()) == pytest.approx(1.0) for policy in found["policies"]
    )  # fmt: skip


def test_plan_of_a_module_takes_its_own_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    target = ["moetion_lightning.recipes.models:ByteMoE", "--meta", "--iteration-time", "100ms", "--mtbf", "1h"]
    assert main(["plan", *target, "--json"]) == 0
    one = json.loads(capsys.readouterr().out)["policies"]
    assert main(["plan", *target, "--ranks", "4", "--json"]) == 0
    four = json.loads(capsys.readouterr().out)["policies"]
    for alone, shared in zip(one, four, strict=True):
        if alone["interval"] == shared["interval"] and alone["name"] != "sparse":
            assert shared["bytes_per_iteration"] == pytest.approx(alone["bytes_per_iteration"] / 4, rel=0.01)
    assert {policy["name"] for policy in one} == POLICIES


def test_simulation_by_scale(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The more nodes, the more failures, and the less of the state on each."""
    picture = tmp_path / "scale.svg"
    job = [*MODEL[:-2], "--node-mtbf", "100d", "--time", "60d", "--policy", "gradient_log", "files"]
    assert main(["simulate", *job, "--scale", "512", "16384", "--json", "--picture", str(picture)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["512", "16384"]
    small, large = (rows[0] for rows in found.values())
    assert large["failures"] == pytest.approx(32 * small["failures"], rel=0.5)
    assert large["simulated"]["badput"]["groups"] > 10 * small["simulated"]["badput"]["groups"]
    assert large["simulated"]["badput"]["stall"] < 0.1 * small["simulated"]["badput"]["stall"]
    assert [row["name"] for row in found["512"]] == ["gradient_log", "files"]
    assert len(ElementTree.parse(picture).findall(".//{*}circle")) == 4


def test_simulation_of_a_trace(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = ["--trace", str(TRACES / "bamboo-gcp-a100x1-east1b.txt"), "--trace-span", "470min,830min"]
    picture = tmp_path / "bars.svg"
    assert main(["simulate", *MODEL[:-2], *trace, "--picture", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "a failure every 18.9 min" in " ".join(out.split())
    assert "The trace has 19 failures of 88 nodes in 6.0 h" in out
    assert "detection" in out
    assert picture.read_text().count("<rect") > len(POLICIES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a target"),
        (["--parameters", "7B"], "--iteration-time"),
        (["some.module:Model", *MODEL], "give one of them"),
        ([*MODEL, "--trace", "trace.csv"], "--mtbf and --trace"),
        ([*MODEL[:-2], "--trace", "no-such-file.csv"], "cannot be read as a trace"),
        ([*MODEL[:-2], "--trace", "x.csv", "--trace-span", "3"], "expected two times"),
        ([*MODEL, "--ranks", "0"], "expected >= 1"),
        ([*MODEL[:2], *MODEL[6:], "--experts", "8"], "--active-parameters is needed"),
        ([*MODEL, "--experts-per-token", "256"], "expected fewer"),
        ([*MODEL, "--picture", "/no/such/folder/x.svg"], "cannot be written"),
        (["moetion_lightning.recipes.models:ByteMoE", "--meta"], "--iteration-time is needed"),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_unknown_policy_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *MODEL, "--policy", "wishful"]) == 2
    assert "wishful" in capsys.readouterr().err


def test_documentation_shows_what_the_commands_print(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "planning.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```bash\n(moetion (?:plan|simulate) [^`]*)^```\n\n^```text\n(.*?)^```", page, re.M | re.S)
    assert len(shown) == 2
    for command, text in shown:
        assert main(shlex.split(command.replace("\\\n", " "))[1:]) == 0
        printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
        assert printed == text.splitlines()
