"""Nodes in network namespaces, whose packets get lost: no connection ends, and nobody is told."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.command import Command, until
from tests.distributed.test_launch import LAST, STEPS, Job
from tests.network import Network
from tests.runs.drill import Zygote

pytestmark = pytest.mark.slow


@pytest.fixture
def network() -> Iterator[Network]:
    network = Network("ABCS")
    yield network
    network.close()


@pytest.fixture
def job(tmp_path: Path, zygote: Zygote) -> Iterator[Job]:
    job = Job(tmp_path, zygote)
    yield job
    job.close()


def start(job: Job, network: Network, name: str, endpoint: str, *options: object) -> Command:
    common = ("--rdzv-endpoint", endpoint, "--node-timeout", 6, "--job-id", "job", "--failure-domain", name)
    return job.start(
        "launch", *common, *options, STEPS, job.folder, LAST, netns=network.path(name), GLOO_SOCKET_IFNAME="data0"
    )


def serve(job: Job, network: Network) -> str:
    server = job.start("rendezvous", "--port", 0, "--host", network.address("S"), netns=network.path("S"))
    return str(until(lambda: re.search(r"serving at (\S+)\n", server.text), "the rendezvous")[1])


def test_node_that_is_cut_off_ends_before_a_spare_takes_its_place(job: Job, network: Network) -> None:
    endpoint = serve(job, network)
    nodes = {name: start(job, network, name, endpoint, "--nnodes", "2:3") for name in "ABC"}
    spare = until(lambda: [n for n in nodes if "waiting as a spare" in nodes[n].text], f"a spare; {job.logs()}")[0]
    lost, other = (name for name in nodes if name != spare)
    before = job.wait_for_step(2)
    rank = next(r for r in (0, 1) if job.starts(r)[0]["env"]["MOETION_FAILURE_DOMAIN"] == lost)
    assert job.starts(rank)[0]["env"]["MOETION_LOCAL_ADDR"] == network.address(lost)
    network.cut(lost)
    assert nodes[lost].wait() == 1
    assert "the rendezvous does not answer any more" in nodes[lost].text
    assert not psutil.pid_exists(before[rank]), "its rank has ended"
    until(lambda: len(job.starts(rank)) == 2, f"the spare's rank; {job.logs()}")
    job.go()
    assert [nodes[name].wait() for name in (other, spare)] == [0, 0], job.logs()
    assert {job.step(r)[0] for r in (0, 1)} == {LAST}
    assert job.starts(rank)[1]["env"]["MOETION_FAILURE_DOMAIN"] == spare


def test_silence_of_the_stores_machine_ends_the_job(job: Job, network: Network) -> None:
    endpoint = serve(job, network)
    nodes = {name: start(job, network, name, endpoint, "--nnodes", "2") for name in "AB"}
    before = job.wait_for_step(2)
    network.cut("S")
    assert [node.wait() for node in nodes.values()] == [1, 1]
    assert all("the rendezvous does not answer any more" in node.text for node in nodes.values()), job.logs()
    assert not [pid for pid in before if psutil.pid_exists(pid)]


def test_short_interruption_ends_nothing(job: Job, network: Network) -> None:
    endpoint = serve(job, network)
    nodes = {name: start(job, network, name, endpoint, "--nnodes", "2") for name in "AB"}
    before = job.wait_for_step(2)
    network.cut("A")
    network.mend("A")
    job.go()
    assert [node.wait() for node in nodes.values()] == [0, 0], job.logs()
    assert [p[0] for p in job.pids(2)] == before
