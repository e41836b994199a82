"""`moetion plan` and `moetion simulate`."""

from __future__ import annotations

import io
import json
import re
import shlex
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from moetion_lightning.cli import main
from moetion_lightning.commands import tables

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
    for policy in ("sparse W=", "gradient log W=8", "dense N=", "partial N=", "two-phase N=", "files N="):
        assert f"\n{policy}" in out
    table = out.split("\n\n")[1]
    assert max(len(line.rstrip()) for line in table.splitlines()) <= 80
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
    assert "The trace has 19 failures of 88 nodes in 6 h" in out
    assert "detection" in out
    assert picture.read_text().count("<rect") > len(POLICIES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a target"),
        (["--parameters", "7B"], "--iteration-time"),
        (["some.module:Model", *MODEL], "give one of them"),
        ([*MODEL, "--trace", "trace.csv"], "--mtbf and --trace"),
        ([*MODEL, "--node-mtbf", "1d"], "--mtbf and --node-mtbf"),
        ([*MODEL, "--trace-span", "1h,2h"], "expected --trace FILE"),
        ([*MODEL[:-2], "--trace", "x.csv", "--trace-span", "2h,1h"], "an end after the beginning"),
        ([*MODEL[:-2], "--trace", "no-such-file.csv"], "cannot be read as a trace"),
        ([*MODEL[:-2], "--trace", "x.csv", "--trace-span", "3"], "expected two times"),
        ([*MODEL, "--ranks", "0"], "--ranks 0: expected"),
        ([*MODEL[:2], *MODEL[6:], "--experts", "8"], "--active-parameters is needed"),
        ([*MODEL[:4], *MODEL[6:]], "--active-parameters is needed"),
        ([*MODEL[:2], *MODEL[4:]], "--experts is needed"),
        ([*MODEL, "--experts-per-token", "256"], "--experts-per-token 256: expected fewer than --experts 256"),
        ([*MODEL, "--experts", "8"], "--experts 8 (it is 8 where it is not given)"),
        ([*MODEL, "--experts", "-1"], "--experts -1: expected"),
        ([*MODEL, "--experts", "1"], "--experts 1: expected at least 2"),
        ([*MODEL, "--active-parameters", "700B"], "--active-parameters 7e+11: expected fewer than --parameters"),
        ([*MODEL, "--parameters", "0"], "--parameters 0: expected"),
        ([*MODEL, "--full-bytes", "0"], "--full-bytes 0: expected"),
        ([*MODEL, "--full-bytes", "nan"], "--full-bytes nan: expected"),
        ([*MODEL, "--compute-bytes", "0"], "--compute-bytes 0: expected"),
        ([*MODEL, "--gradient-bytes=-1"], "--gradient-bytes -1: expected"),
        ([*MODEL, "--iteration-time", "0"], "--iteration-time 0: expected"),
        ([*MODEL, "--mtbf", "0"], "--mtbf 0: expected"),
        ([*MODEL, "--mtbf", "1e25d"], "--mtbf 8.64e+29: expected"),
        ([*MODEL[:-2], "--node-mtbf", "0"], "--node-mtbf 0: expected"),
        ([*MODEL, "--interference", "5"], "--interference 5: expected a share"),
        ([*MODEL, "--node-losses", "2"], "--node-losses 2: expected a share"),
        ([*MODEL, "--replicas", "-1"], "--replicas -1: expected"),
        ([*MODEL, "--replicas", "2048"], "--replicas 2048: expected from 0 to 2047"),
        ([*MODEL, "--ranks", "1", "--replicas", "1"], "--replicas 1: expected 0"),
        ([*MODEL, "--ranks-per-node", "0"], "--ranks-per-node 0: expected"),
        ([*MODEL, "--model-ranks", "0"], "--model-ranks 0: expected"),
        ([*MODEL, "--model-ranks", "16385"], "--model-ranks 16385: expected"),
        ([*MODEL, "--host-memory", "0"], "--host-memory 0: expected"),
        ([*MODEL, "--copy-bandwidth", "0"], "--copy-bandwidth 0: expected"),
        ([*MODEL, "--network-bandwidth", "0"], "--network-bandwidth 0: expected"),
        ([*MODEL, "--storage-bandwidth", "0"], "--storage-bandwidth 0: expected"),
        ([*MODEL, "--persist-every", "0"], "--persist-every 0: expected"),
        ([*MODEL, "--window", "0"], "--window 0: expected"),
        (["--parameters", "1", "--iteration-time", "1s", "--ranks", "64"], "at least one byte of state on each"),
        (["recipe:tiny_moe_cpu", "--experts", "8"], "give one of them"),
        (["recipe:tiny_moe_cpu", "--picture", "x.png"], "--picture x.png: expected a name that ends in .svg"),
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--time", "0"], "--time 0: expected"),
        (["--time", "300000d"], "failures, expected at most"),
        (["--shape", "0"], "--shape 0: expected"),
        (["--burst-nodes", "0"], "--burst-nodes 0: expected"),
        (["--repeats", "1"], "--repeats 1: expected"),
        (["--burst-nodes", "2000"], "--burst-nodes 2000: expected"),
        (["--scale", "0"], "--scale 0: expected"),
        (["--scale", "1.5"], "--scale 1.5: expected"),
        (["--scale", "8", "--model-ranks", "16"], "--scale 8: expected at least --model-ranks 16"),
        (["--scale", "8", "--replicas", "1"], "--replicas 1: expected 0"),
    ],
)
def test_wrong_simulations_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    wrong = [*MODEL, "--mtbf", "1ms"] if "300000d" in arguments else MODEL
    assert main(["simulate", *wrong, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", ["plan", "simulate"])
def test_value_that_cannot_be_read_is_told_below_one_line_of_usage(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([command, *MODEL, "--mtbf", "often"])
    usage, error = capsys.readouterr().err.splitlines()
    assert usage.startswith(f"usage: moetion {command}")
    assert "--mtbf: 'often': expected a time" in error


def test_job_is_told_in_words_that_fit_its_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--parameters", "1B", "--iteration-time", "100h", "--mtbf", "100ms"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "on 1 rank, " in out
    assert "takes 4.17 d; a failure every 100 ms" in out
    assert "No policy makes progress" in out
    assert "Take " not in out


def test_ratios_that_are_both_zero_have_no_difference(capsys: pytest.CaptureFixture[str]) -> None:
    job = ["--parameters", "1B", "--iteration-time", "1h", "--mtbf", "1s", "--time", "1min", "--policy", "files"]
    assert main(["simulate", *job]) == 0
    row = next(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("files"))
    assert row[2:5] == ["0.0000", "0.0000", "-"]


def test_prose_is_broken_where_the_terminal_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    printed = tables.text(tables.paragraph("word " * 40)).splitlines()
    assert 60 < max(len(line.rstrip()) for line in printed) <= 100  # not a terminal

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    tables.show(tables.paragraph("word " * 40))
    assert max(len(line.rstrip()) for line in sys.stdout.getvalue().splitlines()) <= 60  # type: ignore[attr-defined]


def test_unknown_policy_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *MODEL, "--policy", "wishful"]) == 2
    assert "wishful" in capsys.readouterr().err
    assert main(["simulate", *MODEL[:2], *MODEL[6:], "--policy", "partial"]) == 2
    assert "--policy partial: expected a model with routed experts" in capsys.readouterr().err


def test_documentation_shows_what_the_commands_print(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "planning.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```bash\n(moetion (?:plan|simulate) [^`]*)^```\n\n^```text\n(.*?)^```", page, re.M | re.S)
    assert len(shown) == 2
    for command, text in shown:
        assert main(shlex.split(command.replace("\\\n", " "))[1:]) == 0
        printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
        assert printed == text.splitlines()
