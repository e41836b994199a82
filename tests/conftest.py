"""Settings and fixtures of all tests: one thread, no network, and no test leaves anything behind."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import logging
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from moetion_lightning.errors import ConfigurationError

if TYPE_CHECKING:
    from tests.runs.drill import Drill, Zygote
    from tests.runs.references import References

# Set by libraries themselves when they are first used; not a test's doing.
_LIBRARY_VARIABLES = {
    "ACCELERATE_MIXED_PRECISION",
    "ACCELERATE_USE_IPEX",
    "CRC32C_SW_MODE",
    "KMP_DUPLICATE_LIB_OK",
    "KMP_INIT_AT_FORK",
    "PYTORCH_NVML_BASED_CUDA_CHECK",
    "PYTEST_CURRENT_TEST",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
}
# Daemon threads that belong to a library and live as long as the process.
_LIBRARY_THREADS = ("asyncio_", "fsspec", "pytest_timeout", "tqdm", "TMonitor", "InductorSubproc", "execnet")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Iterator[None]:
    """What this version of torch cannot do, as the package says itself, is no failure of a test."""
    try:
        return (yield)
    except ConfigurationError as error:
        if "need torch 2.10 or newer, and this is" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture(autouse=True, scope="session")
def _single_threaded_torch() -> None:
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_stale_log_streams() -> None:
    """Lightning's handlers keep the stream of the test that imported it first, closed by now; pytest captures too."""
    for name in ("lightning", "lightning.fabric", "lightning.pytorch", "lightning.pytorch.core"):
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            if type(handler) is logging.StreamHandler:
                logger.removeHandler(handler)


@pytest.fixture(autouse=True)
def _leaves_no_environment_variable() -> Iterator[None]:
    """A test that changes the environment fails, and the change is undone."""
    before = dict(os.environ)
    yield
    after = dict(os.environ)
    os.environ.clear()
    os.environ.update(before)
    changed = {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)} - _LIBRARY_VARIABLES
    # `seed_everything` announces its seed to worker processes by this variable: Lightning's own protocol.
    changed -= {"PL_GLOBAL_SEED", "PL_SEED_WORKERS"}
    assert not changed, f"the test changed environment variables: {sorted(changed)}"


@pytest.fixture(autouse=True)
def _puts_signal_handlers_back() -> Iterator[None]:
    """torch's agent takes signals for good, in whatever process it runs."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) != handler:
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@pytest.fixture(autouse=True)
def _leaves_no_thread() -> Iterator[None]:
    """A test that leaves a thread running fails."""
    before = set(threading.enumerate())
    yield
    left = [t for t in threading.enumerate() if t not in before and not t.name.startswith(_LIBRARY_THREADS)]
    for thread in left:
        thread.join(timeout=5.0)
    alive = [thread.name for thread in left if thread.is_alive()]
    assert not alive, f"the test left threads running: {alive}"


@pytest.fixture(autouse=True)
def _leaves_no_child_process() -> Iterator[None]:
    """A test that leaves a child process running fails; the child is ended."""
    me = psutil.Process()
    before = {(p.pid, p.create_time()) for p in me.children(recursive=True)}
    yield
    left = [p for p in me.children(recursive=True) if (p.pid, p.create_time()) not in before]
    # Python's own helpers of multiprocessing live as long as the process.
    left = [p for p in left if not _is_multiprocessing_helper(p)]
    _, alive = psutil.wait_procs(left, timeout=5.0)
    names = [f"{p.pid} {p.name()}" for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    for process in alive:
        process.kill()
    assert not names, f"the test left child processes running: {names}"


def _is_multiprocessing_helper(process: psutil.Process) -> bool:
    try:
        line = " ".join(process.cmdline())
    except psutil.Error:  # it ended meanwhile
        return False
    return "resource_tracker" in line or "forkserver" in line or "compile_worker" in line


@pytest.fixture
def memory_dir() -> Iterator[Path]:
    """An empty base directory for the host-memory tier: in /dev/shm where there is one."""
    shared = Path("/dev/shm")
    base = shared if os.access(shared, os.W_OK | os.X_OK) else None
    path = Path(tempfile.mkdtemp(prefix="moetion-test-", dir=base))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """Starts training runs quickly: everything is imported once for the whole session."""
    from tests.runs.drill import Zygote

    process = Zygote()
    yield process
    process.close()


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> References:
    """Runs that never fail, shared by all tests and by all workers of pytest-xdist."""
    from tests.runs.references import References

    base = tmp_path_factory.getbasetemp()
    return References((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "references")


@pytest.fixture
def drill(
    zygote: Zygote,
    tmp_path_factory: pytest.TempPathFactory,
    references: References,
    memory_dir: Path,
    request: pytest.FixtureRequest,
) -> Drill:
    """Runs to kill, start again and compare; all tests share the runs that never fail."""
    from tests.runs.drill import Drill

    name = "".join(c if c.isalnum() else "_" for c in request.node.name)[:60]
    return Drill(zygote, tmp_path_factory.mktemp(name), memory_dir, references)
