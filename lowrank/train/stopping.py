"""SIGTERM and SIGINT: the first asks the loop to finish its step and leave, a second one ends the process."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol


class Stoppable(Protocol):
    stop: bool


@contextmanager
def stopping_on_signals(loop: Stoppable) -> Iterator[None]:
    """While inside, signals set ``loop.stop``; the handlers that were there come back afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals: a run started from another is its caller's to stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        loop.stop = True
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        print("stopping after this step; once more ends at once", file=sys.stderr, flush=True)

    for number in before:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
