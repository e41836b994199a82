"""Comparing recorded runs: what differs first, and what was still equal there."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from moetion_lightning.cli import main
from moetion_lightning.commands import drill
from moetion_lightning.commands.divergence_text import causes, remedy, where
from moetion_lightning.commands.drill_page import Page, restarts
from moetion_lightning.integrations import SparseCheckpointing
from moetion_lightning.testing.divergence import QUANTITIES, compare_recordings
from moetion_lightning.testing.drill_plan import Kill
from moetion_lightning.testing.records import read_recording, step_of_iteration
from moetion_lightning.testing.scratch import Scratch


def line(kind: str, **fields: Any) -> dict[str, Any]:
    return {"kind": kind, **fields}


def step(number: int, *, replay: bool = False, **changed: Any) -> dict[str, Any]:
    """A step whose every value follows from its number."""
    record = line(
        "step",
        step=number,
        replay=replay,
        losses=[float(number).hex()],
        inputs=[f"input-{number}"],
        settings={"optimizer:0:group0:lr": (0.5**number).hex()},
        rng={"torch": f"torch-{number}", "python": f"python-{number}"},
        tensors={
            "parameter:w": [f"w-{number}", "1.5"],
            "buffer:mean": [f"mean-{number}", "2.5"],
            "optimizer:0:w:exp_avg": [f"avg-{number}", "3.5"],
        },
    )
    if replay:
        del record["tensors"]
    for key, value in changed.items():
        record[key] = {**record[key], **value} if isinstance(value, dict) else value
    return record


def write(folder: Path, *starts: list[dict[str, Any]], rank: int = 0) -> Path:
    """Records of a rank, a list for each of its processes."""
    folder.mkdir(exist_ok=True)
    for number, records in enumerate(starts):
        lines = [line("start", pid=100 + number), *records]
        path = folder / f"rank-{rank:05d}-{number}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in lines))
    return folder


def ended(fit: int, iteration: int, step: int) -> dict[str, Any]:
    return line("iteration", fit=fit, iteration=iteration, step=step)


def compare(first: Path, second: Path) -> Any:
    return compare_recordings(read_recording(first), read_recording(second))


@pytest.fixture
def twin(tmp_path: Path) -> Path:
    return write(tmp_path / "twin", [step(n) for n in range(1, 7)])


#: A run that is killed behind step 4 and continues behind step 2: one step is replayed, one executed again.
BEFORE = [*(step(n) for n in range(1, 5)), line("committed")]
CONTINUED = [line("found", tier="host memory"), line("restored", iteration=2, step=2, replay=1)]


def test_steps_done_again_that_are_as_before_are_exact(tmp_path: Path, twin: Path) -> None:
    again = [*CONTINUED, step(3, replay=True), step(4), step(5), step(6)]
    outcome = compare(write(tmp_path / "a", BEFORE, again), twin)
    assert outcome.exact
    assert (outcome.steps, outcome.executions) == (6, 8)
    assert outcome.compared["losses"] == 8
    assert outcome.compared["parameter"] == 7, "of the replayed step there is no whole state"


@pytest.mark.parametrize(
    ("changed", "quantity", "name"),
    [
        ({"inputs": ["other"]}, "inputs", "micro-batch 1"),
        ({"settings": {"optimizer:0:group0:lr": (1.0).hex()}}, "settings", "optimizer:0:group0:lr"),
        ({"losses": [(9.0).hex()]}, "losses", "micro-batch 1"),
        ({"tensors": {"optimizer:0:w:exp_avg": ["other", "1"]}}, "optimizer", "optimizer:0:w:exp_avg"),
        ({"tensors": {"parameter:w": ["other", "1"]}}, "parameter", "parameter:w"),
        ({"tensors": {"buffer:mean": ["other", "1"]}}, "buffer", "buffer:mean"),
        ({"rng": {"torch": "other"}}, "rng", "torch"),
    ],
)
def test_each_quantity_alone_is_found_at_its_step_and_start(
    tmp_path: Path, twin: Path, changed: dict[str, Any], quantity: str, name: str
) -> None:
    again = [*CONTINUED, step(3, replay=True), step(4), step(5, **changed), step(6)]
    found = compare(write(tmp_path / "a", BEFORE, again), twin).divergence
    assert (found.step, found.start, found.quantity, found.name) == (5, 2, quantity, name)
    assert found.equal == tuple(q for q in QUANTITIES if q not in (quantity, "gradient"))
    assert name.removeprefix(f"{quantity}:") in where(found, "A", "B")[0]
    assert causes(found)
    assert remedy(found)


def test_what_comes_first_in_a_step_is_named_first(tmp_path: Path, twin: Path) -> None:
    """The loss follows from the inputs, the weights from the loss."""
    parted = step(4, inputs=["x"], losses=[(0.1).hex()], tensors={"parameter:w": ["x", "7"]})
    found = compare(write(tmp_path / "a", [*(step(n) for n in range(1, 4)), parted, step(5), step(6)]), twin).divergence
    assert (found.quantity, found.others) == ("inputs", 2)


def test_a_replay_that_differs_is_found_though_its_first_execution_was_right(tmp_path: Path, twin: Path) -> None:
    again = [*CONTINUED, step(3, replay=True, losses=[(0.0).hex()]), step(4), step(5), step(6)]
    found = compare(write(tmp_path / "a", BEFORE, again), twin).divergence
    assert (found.step, found.start, found.is_replay, found.quantity) == (3, 2, True, "losses")
    assert found.first == "0.0"
    assert found.second == "3.0"


def test_a_generator_that_nobody_seeds_is_compared_with_the_run_itself(tmp_path: Path, twin: Path) -> None:
    def own(number: int, **changed: Any) -> dict[str, Any]:
        return step(number, **{"rng": {"python": f"own-{number}"}, **changed})

    before = [*(own(n) for n in range(1, 5)), line("committed")]
    again = [*CONTINUED, own(3, replay=True), own(4), own(5), own(6)]
    outcome = compare(write(tmp_path / "a", before, again), twin)
    assert outcome.exact
    assert outcome.unseeded == ("python",)
    again[3] = own(4, rng={"python": "drawn anew"})
    found = compare(write(tmp_path / "b", before, again), twin).divergence
    assert (found.step, found.quantity, found.name) == (4, "rng", "python")


def test_a_generator_that_nobody_draws_from_is_not_named(tmp_path: Path, twin: Path) -> None:
    idle = write(tmp_path / "a", [step(n, rng={"python": "idle"}) for n in range(1, 7)])
    other = write(tmp_path / "b", [step(n, rng={"python": "idle too"}) for n in range(1, 7)])
    outcome = compare(idle, other)
    assert outcome.exact
    assert outcome.unseeded == ()
    assert compare(idle, twin).unseeded == ("python",), "the other run draws from it"


def test_runs_that_do_not_begin_alike_are_told_to_seed(
    tmp_path: Path, twin: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their generators stand elsewhere from the first step on: they are not compared, and not called equal."""
    apart = {"losses": ["0x1p-3"], "rng": {"torch": "x", "python": "y"}}
    other = write(tmp_path / "a", [step(n, **apart) for n in range(1, 7)])
    found = compare(other, twin).divergence
    assert "rng" not in found.equal
    assert found.skipped == ("python", "torch")
    assert "do not begin alike: another seed or none" in causes(found)[0]
    assert remedy(found).startswith("Seed with a fixed seed first")
    assert main(["diff", str(other), str(twin)]) == 1
    said = capsys.readouterr().out
    assert "6 steps in both, compared up to the first difference" in said
    assert "random generators" not in said.partition("still equal")[2]
    assert "another seed or none" in said


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"losses": ["0x1p-3"]}, "computes something else from what was equal"),
        ({"losses": ["0x1p-3"], "rng": {"python": "not seeded"}}, "computes something else from what was equal"),
        ({"settings": {"lr": "0x1p-3"}}, "learning rates or other settings follow from something"),
        ({"inputs": ["x"]}, "the data follow from something"),
        ({"inputs": ["x"], "rng": {"python": "not seeded"}}, "another seed or none"),
    ],
)
def test_without_a_failure_no_restore_is_blamed_and_no_seed_that_is_equal(
    tmp_path: Path, twin: Path, changed: dict[str, Any], words: str
) -> None:
    found = compare(write(tmp_path / "a", [step(n, **changed) for n in range(1, 7)]), twin).divergence
    assert words in causes(found)[0]
    assert ("seed" in remedy(found).split()[:6]) is ("seed" in words)


def test_a_loop_that_counts_for_itself_is_named_where_data_and_generators_differ_behind_a_restart(
    tmp_path: Path, twin: Path
) -> None:
    again = [*CONTINUED, step(3, replay=True), step(4), step(5, inputs=["x"], rng={"torch": "x"}), step(6)]
    found = compare(write(tmp_path / "a", BEFORE, again), twin).divergence
    assert "counts its steps or epochs for itself" in causes(found)[-1]
    assert "attach(accelerator)" in remedy(found)
    assert "run.steps(loader)" in remedy(found)
    again[3] = step(5, inputs=["x"])
    found = compare(write(tmp_path / "b", BEFORE, again), twin).divergence
    assert "attach(accelerator)" not in remedy(found), "the generators are where they were"


def test_a_step_that_one_run_lacks_is_a_difference(tmp_path: Path, twin: Path) -> None:
    found = compare(write(tmp_path / "a", [step(n) for n in range(1, 6)]), twin).divergence
    assert (found.step, found.quantity) == (6, "steps")
    assert "run.steps(loader)" in remedy(found)
    assert "was not executed by A (its last step 5), unlike B (its last step 6)" in where(found, "A", "B")[0]


def test_a_rank_may_lack_the_step_in_which_it_died_where_another_one_gave_its_state(tmp_path: Path) -> None:
    twin = write(tmp_path / "twin", [step(n) for n in range(1, 5)])
    taken = [line("found", tier="live state"), line("restored", iteration=3, step=3, replay=0), step(4)]
    assert compare(write(tmp_path / "a", [step(1), step(2)], taken), twin).exact
    later = [line("found", tier="live state"), line("restored", iteration=2, step=2, replay=0), step(4)]
    assert not compare(write(tmp_path / "b", [step(1), step(2)], later), twin).exact


def test_the_first_difference_of_all_ranks_counts(tmp_path: Path) -> None:
    twin = write(tmp_path / "twin", [step(1), step(2), step(3)])
    write(twin, [step(1), step(2), step(3)], rank=1)
    mine = write(tmp_path / "a", [step(1), step(2), step(3, losses=["0x0p+0"])])
    write(mine, [step(1), step(2, rng={"torch": "x"}), step(3)], rank=1)
    found = compare(mine, twin).divergence
    assert (found.rank, found.step, found.quantity) == (1, 2, "rng")
    assert ", rank 1, as start 1 of A executed it" in where(found, "A", "B")[0]


def test_a_line_that_a_kill_has_cut_off_is_not_there(tmp_path: Path, twin: Path) -> None:
    folder = write(tmp_path / "a", [step(n) for n in range(1, 7)])
    with (folder / "rank-00000-0.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')
    assert compare(folder, twin).exact


def test_an_iteration_is_looked_up_where_it_was_written(tmp_path: Path) -> None:
    """Two optimizers step in each iteration; rank 1 died before it wrote of the second one."""
    write(tmp_path / "a", [ended(1, 1, 2), ended(1, 2, 4)])
    write(tmp_path / "a", [ended(1, 1, 2)], rank=1)
    assert step_of_iteration(tmp_path / "a", 1, 1, 1) == 2
    assert step_of_iteration(tmp_path / "a", 1, 1, 2) == 4
    assert step_of_iteration(tmp_path / "a", 1, 1, 7) == 7


def test_each_fit_of_a_script_has_iterations_of_its_own(tmp_path: Path) -> None:
    write(tmp_path / "a", [ended(1, 1, 1), ended(1, 2, 2), ended(2, 1, 3)])
    assert [step_of_iteration(tmp_path / "a", 0, *key) for key in ((1, 1), (1, 2), (2, 1))] == [1, 2, 3]
    assert step_of_iteration(tmp_path / "a", 0, 2, 2) == 4, "so far behind the first fit, where nobody wrote of it"


def test_diff_says_step_tensor_values_and_cause(tmp_path: Path, twin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write(tmp_path / "a", [*(step(n) for n in range(1, 6)), step(6, tensors={"parameter:w": ["x", "1.25"]})])
    assert main(["diff", str(other), str(twin)]) == 1
    said = capsys.readouterr().out
    for text in (
        "step 6",
        "parameters, w",
        "norm 1.25 (x)",
        "norm 1.5 (w-6)",
        "still equal",
        "computes something else",
    ):
        assert text in said
    assert main(["diff", str(twin), str(twin)]) == 0
    assert "the same, bit for bit" in capsys.readouterr().out
    assert main(["diff", str(other), str(twin), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["divergence"]["step"] == 6
    assert main(["diff", str(tmp_path), str(tmp_path)]) == 2
    assert "neither records" in capsys.readouterr().err


def page(disturbed: Path, twin: Path) -> Page:
    recording = read_recording(disturbed)
    return Page(
        command="train.py",
        outcome=compare_recordings(recording, read_recording(twin)),
        recording=recording,
        kills=(Kill(step=4, phase="capture"),),
        planned=1,
        twin="its twin",
        divergence=(),
        causes=(),
        remedy="",
        warnings=("<none>",),
        seconds=(2.0, 1.0),
        refused=("seed 3 there, 4 here",),
    )


class WrittenRun:
    """A run of a drill whose records are given."""

    def __init__(self, folder: Path, starts: list[list[dict[str, Any]]]) -> None:
        self.folder, self.log = folder, folder / "output.log"
        folder.mkdir()
        self.log.touch()
        write(folder / "records", *starts)

    def execute(self, plan: Path | None = None) -> int:
        return 1

    def recording(self) -> Any:
        return read_recording(self.folder / "records")


@pytest.mark.parametrize(
    ("parted", "second", "said"),
    [
        (5, 5, "DIFFERS even without a failure"),  # nothing executed step 5 before the kill
        (5, 3, "DIFFERS even without a failure"),
        (5, 6, "DIFFERS: after"),
        (5, None, "DIFFERS: after"),
        (4, 0, "DIFFERS: after"),  # step 4 was that of the twin before the kill: no second twin is needed
    ],
)
def test_a_script_that_is_not_reproducible_is_told_from_one_that_does_not_recover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parted: int, second: int | None, said: str
) -> None:
    def course(first: int, other: int | None) -> list[dict[str, Any]]:
        return [step(n, **({"losses": ["0x1p-3"]} if n >= (other or 7) else {})) for n in range(first, 7)]

    runs = {"twin": [course(1, None)], "disturbed": [BEFORE, [*CONTINUED, step(3, replay=True), *course(4, parted)]]}
    if second != 0:
        runs["second-twin"] = [course(1, second)]

    def made(options: Any, folder: Path, *args: Any, captured: bool) -> tuple[WrittenRun, Scratch]:
        return WrittenRun(folder, runs.pop(folder.name)), Scratch(folder=folder)

    monkeypatch.setattr(drill, "_run", made)
    options = drill._options(drill._parser().parse_args(["--kills", "1", "--", __file__]))
    found = drill._carry_out(options, tmp_path, tmp_path, drill._Progress(6, quiet=True))
    assert found.verdict.startswith(said)
    assert not runs
    assert any("not reproducible" in line for line in found.divergence) is bool(second)
    assert found.divergence[0].startswith(f"step {second if second in (3, 5) else parted}, as start ")


def test_page_says_what_a_restart_did_again(tmp_path: Path, twin: Path) -> None:
    again = [*CONTINUED, step(3, replay=True), step(4), step(5), step(6)]
    found = page(write(tmp_path / "a", BEFORE, again), twin)
    assert found.exact
    assert found.verdict.startswith("EXACT: after 1 kill ")
    text = found.text()
    assert re.search(r"\n  in capture +4 +2 +2 +1  host memory\n", text)
    assert max(map(len, text.splitlines())) <= 80
    assert "&lt;none&gt;" in found.html()
    assert "# Drill" in found.markdown()
    assert json.loads(json.dumps(found.data()))["restarts"][0]["again"] == 2


def test_a_restart_from_the_beginning_is_no_recovery_though_all_steps_are_equal(tmp_path: Path, twin: Path) -> None:
    found = page(write(tmp_path / "a", BEFORE, [step(n) for n in range(1, 7)]), twin)
    assert found.outcome.exact
    assert not found.exact
    assert found.verdict.startswith("NOT RECOVERED")
    assert "must find the windows of the same job" in found.text()
    assert "began anew: seed 3 there, 4 here" in found.text()
    assert [restart.source for restart in restarts(found.recording)] == [""]


def test_a_start_that_is_killed_before_it_trains_did_not_begin_anew(tmp_path: Path, twin: Path) -> None:
    again = [*CONTINUED, step(3, replay=True), step(4), step(5), step(6)]
    found = page(write(tmp_path / "a", BEFORE, [], again), twin)
    assert found.exact
    assert [(r.trained, r.source) for r in restarts(found.recording)] == [(False, ""), (True, "host memory")]
    assert "killed again before it trained" in found.text()


def test_a_difference_before_any_failure_is_said_to_be_one(tmp_path: Path, twin: Path) -> None:
    found = page(write(tmp_path / "a", [step(1, losses=["0x0p+0"]), *(step(n) for n in range(2, 7))]), twin)
    assert found.verdict.startswith("DIFFERS even without a failure")


class Interrupted(Exception):
    """Ends a loop that leaves its windows."""


def leave_windows(memory: Path, job: str, *, parted_at: int) -> None:
    """A short training whose gradients are others in one step."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(torch.arange(80.0).reshape(20, 4) / 80))
    settings = {"window": 2, "memory_dir": str(memory), "job_id": job}
    with contextlib.suppress(Interrupted), SparseCheckpointing(model, optimizer, **settings) as run:
        for number, (batch,) in run.steps(loader):
            loss = model(batch).square().mean() * (2.0 if number == parted_at else 1.0)
            run.record_loss(loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if number == 9:
                raise Interrupted


def test_two_jobs_that_nobody_recorded_are_compared_by_their_windows(
    memory_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for job, parted_at in (("one", 99), ("same", 99), ("other", 7)):
        leave_windows(memory_dir, job, parted_at=parted_at)
    base = ["--memory-dir", str(memory_dir)]
    assert main(["diff", "one", "same", *base]) == 0
    capsys.readouterr()
    assert main(["diff", "one", "other", *base, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["divergence"]
    assert (found["step"], found["quantity"]) == (8, "losses")
    assert {"inputs", "settings", "rng"} <= set(found["equal"])
    write(memory_dir / "records", [step(1)])
    assert main(["diff", "one", str(memory_dir / "records"), *base]) == 2
    assert "give two of one kind" in capsys.readouterr().err
