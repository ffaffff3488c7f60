"""SIGINT, SIGTERM and SIGHUP: the first asks, in the way that suits the moment; a second one ends the process.

No torch here: an entry point catches signals before it imports any.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Protocol

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
WAITING = b"stopping after this step; once more ends at once\n"


class Stoppable(Protocol):
    stop: bool


class Stopping:
    """A signal raises KeyboardInterrupt at once or, where it would do harm, is remembered until that is asked for."""

    def __init__(self) -> None:
        self.asked = False
        self.waiting = False
        self.loop: Stoppable | None = None

    def install(self) -> None:
        """From now on; outside of the main thread, which alone may handle signals, nothing."""
        if threading.current_thread() is threading.main_thread():
            for number in handled():
                signal.signal(number, self.ask)

    @contextmanager
    def installed(self) -> Iterator[Stopping]:
        """While inside; the handlers that were there come back afterwards."""
        before = {number: signal.getsignal(number) for number in handled()}
        self.install()
        try:
            yield self
        finally:
            if threading.current_thread() is threading.main_thread():
                for number, handler in before.items():
                    signal.signal(number, handler)

    def ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        for each in handled():
            signal.signal(each, signal.SIG_DFL)
        if not self.waiting:
            raise KeyboardInterrupt
        if self.loop is not None:
            self.loop.stop = True
            with suppress(OSError):
                os.write(2, WAITING)  # print might be what the signal has interrupted, and cannot be entered twice

    def check(self) -> None:
        """Raises KeyboardInterrupt where a signal has come: held back, or raised and swallowed by somebody's code."""
        if self.asked:
            raise KeyboardInterrupt

    @contextmanager
    def held(self) -> Iterator[None]:
        """What is inside is finished first."""
        before, self.waiting = self.waiting, True
        try:
            yield
        finally:
            self.waiting = before

    @contextmanager
    def after_step(self, loop: Stoppable) -> Iterator[None]:
        """Held, and the loop is told to leave after its step."""
        with self.held():
            self.loop, loop.stop = loop, loop.stop or self.asked
            try:
                yield
            finally:
                self.loop = None

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """What is inside need not be finished, not even where others are held."""
        before, self.waiting = self.waiting, False
        try:
            self.check()
            yield
        finally:
            self.waiting = before


def handled() -> list[signal.Signals]:
    """All three, but a hang-up only where nobody (nohup) has said that it is to be ignored."""
    return [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
