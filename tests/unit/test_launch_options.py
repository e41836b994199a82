"""Options, variables and numbers of `moetion launch`, without a process."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException

from moetion_lightning.cli import main
from moetion_lightning.distributed import launch
from moetion_lightning.distributed.exits import describe_exit
from moetion_lightning.distributed.launch import StopSignal, add_options, derive_job_id
from moetion_lightning.errors import ConfigurationError


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "a b.py"
    path.touch()
    return str(path)


def params(*args: str) -> tuple[str, int, int, object]:
    """Endpoint, nodes, the place that is wanted."""
    options = add_options("moetion launch", "").parse_args(args)
    found = launch._check(options, launch._job_id(options))
    return found.endpoint, found.min_nodes, found.max_nodes, found.get("node_rank")


def test_nodes_and_endpoints(script: str) -> None:
    assert params(script) == ("", 1, 1, None)
    assert params("--nnodes", "2:3", "--rdzv-endpoint", "h:1", script) == ("h:1", 2, 3, None)
    assert params("--nnodes", "2", "--master-addr", "h", "--node-rank", "1", script) == ("h:29500", 2, 2, 1)
    assert params("--nnodes", "2", "--master-addr", "fd00::1", "--master-port", "7", script)[0] == "[fd00::1]:7"


def test_variables_of_torchrun_are_defaults(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the trainer of Kubeflow sets them."""
    values = {"NNODES": "4", "NPROC_PER_NODE": "8", "NODE_RANK": "2", "MASTER_ADDR": "head", "MASTER_PORT": "29400"}
    for name, value in values.items():
        monkeypatch.setenv(f"PET_{name}", value)
    assert params(script) == ("head:29400", 4, 4, None)
    monkeypatch.setenv("PET_MAX_RESTARTS", "0")
    options = add_options("moetion launch", "").parse_args([script])
    assert (options.nproc_per_node, options.max_restarts) == ("8", 0)
    monkeypatch.delenv("PET_MAX_RESTARTS")
    assert add_options("moetion launch", "").parse_args([script]).max_restarts == 10


def test_place_by_the_numbers_of_schedulers(monkeypatch: pytest.MonkeyPatch) -> None:
    from moetion_lightning.config import node_hint

    for name in ("SLURM_NODEID", "PET_NODE_RANK", "JOB_COMPLETION_INDEX", "GROUP_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert node_hint() is None
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "3")
    assert node_hint() == 3
    monkeypatch.setenv("SLURM_NODEID", "1")
    assert node_hint() == 1


def test_identity_of_a_job(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOETION_JOB_ID", raising=False)
    first = derive_job_id([script, "--x", "1"], is_module=False)
    assert first == derive_job_id([script, "--x", "1"], is_module=False)
    assert first != derive_job_id([script, "--x 1"], is_module=False)
    assert first.startswith("a_b-")

    def given(*args: str) -> str:
        return launch._job_id(add_options("moetion launch", "").parse_args(args))

    assert given(script, "--x", "1") == first
    assert given("--rdzv-id", "seven", script) == "seven"
    monkeypatch.setenv("MOETION_JOB_ID", "eight")
    assert given("--rdzv-id", "seven", script) == "eight"
    assert given("--job-id", "nine", script) == "nine"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--nnodes", "3:2"], "--nnodes '3:2': expected N or MIN:MAX"),
        (["--nnodes", "x"], "--nnodes 'x': expected N or MIN:MAX"),
        (["--nnodes", "2"], "--rdzv-endpoint '': expected HOST:PORT with --nnodes"),
        (["--rdzv-endpoint", "h:x"], "'h:x': expected HOST:PORT"),
        (["--rdzv-backend", "etcd"], "--rdzv-backend 'etcd': expected none, or torchrun"),
        (["--no-python"], "--no-python True: expected a Python script"),
        (["--nproc-per-node", "0"], "--nproc-per-node '0': expected at least 1"),
        (["--nproc-per-node", "many"], "Unsupported nproc_per_node value: many"),
        (["--max-restarts", "-1"], "--max-restarts -1: expected 0 or more"),
        (["--hang-timeout", "0.5"], "--hang-timeout '0.5': expected at least 2 seconds"),
        (["--node-timeout", "0.5"], "--node-timeout 0.5: expected at least 2 seconds"),
        (["--job-id", "../x"], "--job-id '../x'"),
        (["--node-rank", "1"], "--node-rank 1: expected 0 to 0"),
        (["--interface", "no0", "--nnodes", "2", "--rdzv-endpoint", "127.0.0.1:1"], "interface 'no0': expected"),
    ],
)
def test_wrong_usage_is_told(args: list[str], message: str, script: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", *args, script]) == 2
    assert message in capsys.readouterr().err


def test_missing_script_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "no_such_script.py"]) == 2
    assert "no file 'no_such_script.py'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["launch"])
    assert "training_script" in capsys.readouterr().err


def test_rendezvous_on_a_foreign_address_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rendezvous", "--host", "192.0.2.1", "--port", "0"]) == 2
    assert "expected an address of this machine" in capsys.readouterr().err


def test_exits_in_words() -> None:
    assert [describe_exit(s) for s in (1, -9, -200)] == ["exit code 1", "killed by SIGKILL", "killed by signal 200"]


def test_configuration_errors_name_the_directory(script: str) -> None:
    with pytest.raises(ConfigurationError, match=f"no file 'x.py' in {os.getcwd()}"):
        params("x.py")


def test_signal_raises_nothing_where_it_arrives() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    stop = StopSignal("SIGUSR1,SIGTERM")
    try:
        stop.install()
        stop.pause(0.0)
        for number in before:
            signal.raise_signal(number)
        with pytest.raises(SignalException, match=f"stopped by {signal.SIGTERM.name}"):
            stop.pause(60.0)
        with pytest.raises(SignalException):
            stop.check()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
