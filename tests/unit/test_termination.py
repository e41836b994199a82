"""SIGTERM is noticed at once, also inside a long step, and is never taken from anybody."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from moetion_lightning.engine.termination import TerminationWatch


@pytest.fixture(autouse=True)
def _handlers():
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.set_wakeup_fd(-1) == -1


class Handled:
    """A user's handler."""

    def __init__(self) -> None:
        self.count = 0
        self._before = signal.signal(signal.SIGTERM, self)

    def __call__(self, number, frame) -> None:
        self.count += 1

    def restore(self) -> None:
        signal.signal(signal.SIGTERM, self._before)


@pytest.fixture
def handled():
    handler = Handled()
    yield handler
    handler.restore()


def test_a_signal_inside_a_long_step_persists_before_the_step_ends(handled):
    read, write = os.pipe()
    watch = TerminationWatch(lambda: os.write(write, b"x"))
    assert watch.install()
    # The kernel gives the signal to another thread: nothing interrupts the main thread, as nothing interrupts a kernel.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        assert os.read(read, 1) == b"x"
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        watch.remove()
        os.close(read)
        os.close(write)
    assert handled.count == 1


def test_the_handler_before_is_called_each_time_and_persisting_happens_once(handled):
    calls = []
    watch = TerminationWatch(lambda: calls.append(threading.current_thread().name))
    watch.install()
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGTERM)
    watch.remove()
    assert handled.count == 3
    assert calls == ["moetion-sigterm"]
    os.kill(os.getpid(), signal.SIGTERM)
    assert handled.count == 4
    assert calls == ["moetion-sigterm"]


def test_other_signals_and_other_readers_of_the_wakeup_descriptor_are_served(handled):
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    user = signal.signal(signal.SIGUSR1, lambda *_: None)
    watch = TerminationWatch(lambda: None)
    watch.install()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert os.read(read, 1) == bytes([signal.SIGUSR1])
    watch.remove()
    assert signal.set_wakeup_fd(-1) == write
    signal.signal(signal.SIGUSR1, user)
    os.close(read)
    os.close(write)


def test_a_handler_put_over_it_decides_what_the_signal_means():
    persisted = threading.Event()
    watch = TerminationWatch(persisted.set)
    watch.install()
    below = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda number, frame: below(number, frame))  # as Lightning composes them
    os.kill(os.getpid(), signal.SIGTERM)  # would end this process
    assert persisted.wait(60)
    watch.remove()
    signal.signal(signal.SIGTERM, below)
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGTERM)  # left there by whoever restores what it found
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.mark.parametrize("forks", [False, True])
def test_without_any_handler_the_process_ends_by_the_signal_after_persisting(forks):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        watch = TerminationWatch(lambda: os.write(write, b"x"))
        watch.install()
        if forks:  # a worker of a data loader, which has nothing to persist
            ready, tell = os.pipe()
            worker = os.fork()
            if worker == 0:
                os.write(tell, b"r")
                while True:
                    signal.pause()
            os.read(ready, 1)
            os.kill(worker, signal.SIGTERM)
            os.write(write, b"w" if os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == -15 else b"?")
        os.kill(os.getpid(), signal.SIGTERM)
        while True:  # training goes on meanwhile
            pass
    os.close(write)
    status = os.waitpid(child, 0)[1]
    assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM
    assert os.read(read, 10) == (b"wx" if forks else b"x")
    os.close(read)


def test_no_handler_is_set_where_none_can_be():
    results = []
    thread = threading.Thread(target=lambda: results.append(TerminationWatch(lambda: None).install()))
    thread.start()
    thread.join()
    assert results == [False]
