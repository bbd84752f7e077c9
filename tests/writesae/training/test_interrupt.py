"""Signals are noted once, act as before the second time, and leave no handler behind."""

import os
import signal
import threading

import pytest

from writesae.training.interrupt import SIGNALS, noted_interrupts


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_is_noted_and_the_handlers_come_back(number):
    before = {each: signal.getsignal(each) for each in SIGNALS}
    with noted_interrupts() as interrupt:
        assert not interrupt.asked
        assert signal.getsignal(signal.SIGINT) is not before[signal.SIGINT]
        os.kill(os.getpid(), number)
        assert interrupt.asked
        assert {each: signal.getsignal(each) for each in SIGNALS} == before
    assert {each: signal.getsignal(each) for each in SIGNALS} == before


@pytest.fixture
def listening():
    """Python's own handler, whatever this process was started with: a job in a shell's background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("listening")
def test_the_second_stops_at_once():
    with pytest.raises(KeyboardInterrupt), noted_interrupts() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.asked
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second signal did not stop")


def test_an_error_inside_restores_the_handlers():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError), noted_interrupts():
        raise RuntimeError
    assert signal.getsignal(signal.SIGINT) is before


def test_another_thread_leaves_signals_alone():
    found = []

    def work():
        with noted_interrupts() as interrupt:
            found.append((interrupt.asked, signal.getsignal(signal.SIGINT)))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(False, before)]
