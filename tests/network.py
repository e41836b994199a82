"""Machines for tests: network namespaces on a bridge, whose packets can be dropped without anybody being told."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest

_numbers = itertools.count(1)


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True, text=True)


class Network:
    """Namespaces ``A``, ``B``, ... with one address each, and a bridge between them.

    Args:
        names: Of the machines.
    """

    def __init__(self, names: str) -> None:
        if shutil.which("ip") is None or os.geteuid() != 0:
            pytest.skip("network namespaces need `ip` and root")
        self._id = f"mo{os.getpid() % 10000}{next(_numbers)}"
        self._bridge = f"{self._id}b"
        self._names = names
        try:
            _ip("link", "add", self._bridge, "type", "bridge")
            _ip("link", "set", self._bridge, "up")
            for number, name in enumerate(names, 1):
                space, outer = self._id + name, f"{self._id}{name}o"
                _ip("netns", "add", space)
                _ip("link", "add", outer, "type", "veth", "peer", "name", "data0", "netns", space)
                _ip("link", "set", outer, "master", self._bridge, "up")
                _ip("-n", space, "addr", "add", f"10.77.0.{number}/24", "dev", "data0")
                _ip("-n", space, "link", "set", "data0", "up")
                _ip("-n", space, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            self.close()
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")

    def address(self, name: str) -> str:
        """Of a machine."""
        return f"10.77.0.{self._names.index(name) + 1}"

    def path(self, name: str) -> str:
        """Of a machine's namespace, for ``setns``."""
        return str(Path("/run/netns", self._id + name))

    def cut(self, name: str) -> None:
        """From now on packets from and to this machine are lost: no connection ends, nothing answers."""
        _ip("link", "set", f"{self._id}{name}o", "nomaster")

    def mend(self, name: str) -> None:
        """Let them pass again."""
        _ip("link", "set", f"{self._id}{name}o", "master", self._bridge)

    def close(self) -> None:
        """Remove everything."""
        for name in self._names:
            subprocess.run(["ip", "netns", "del", self._id + name], capture_output=True)
            subprocess.run(["ip", "link", "del", f"{self._id}{name}o"], capture_output=True)
        subprocess.run(["ip", "link", "del", self._bridge], capture_output=True)
