"""Ctrl-C and SIGTERM while a run has something to save: the signal is noted, and the loop saves and stops.

The second signal acts as it would have without us, so a run that hangs can still be stopped at once.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Interrupt:
    """Whether a signal has come."""

    asked: bool = False


@contextmanager
def noted_interrupts() -> Iterator[Interrupt]:
    """Note SIGINT and SIGTERM as long as this lasts; the handlers that were there come back at the first, or at the end.

    Outside the main thread Python has no say over signals, and nothing is noted.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def note(number: int, frame: FrameType | None) -> None:
        interrupt.asked = True
        restore()

    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield interrupt
    finally:
        restore()
