from __future__ import annotations

import os
import signal
import threading

import pytest

from evalsuite.signals import SIGNALS, ignore_signals, signals


@pytest.fixture(autouse=True)
def _handlers():
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}  # as without nohup
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_its_handler_given_back(number):
    before = signal.getsignal(number)
    with signals() as told:
        os.kill(os.getpid(), number)
        assert told.signal == number
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_an_ignored_signal_stays_ignored_as_nohup_wants(number):
    signal.signal(number, signal.SIG_IGN)
    with signals() as told:
        os.kill(os.getpid(), number)
        assert not told.signal
    assert signal.getsignal(number) is signal.SIG_IGN


def test_a_launchers_own_handler_hears_of_its_signal():
    heard = []
    signal.signal(signal.SIGUSR2, lambda number, frame: heard.append(number))
    with signals() as told:
        os.kill(os.getpid(), signal.SIGUSR2)
    assert heard == [signal.SIGUSR2]
    assert not told.signal


def test_only_the_main_thread_can_listen():
    codes = []

    def work() -> None:
        with signals() as told:
            codes.append(told.signal)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert codes == [0]


def test_a_data_worker_hears_nothing():
    ignore_signals()
    for number in SIGNALS:
        os.kill(os.getpid(), number)
