"""Signals that ask a training to stop: noted when they come, obeyed where nothing is half done.

This file imports nothing heavy: a scheduler may signal a minute early, so that the first thing that `recsys fit` does
is to listen.
"""

import os
import signal
import threading
from types import FrameType
from typing import Any

REQUEUE = (signal.SIGUSR1, signal.SIGUSR2)  # what a scheduler is told to send before it takes a machine away
_STDERR = 2
_STOPS = (*REQUEUE, signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """What this process was asked for.

    Until `begin`, a signal ends the process at once, since there is nothing to save: SIGINT by `KeyboardInterrupt`, all
    others by `SystemExit` with 128 and the number of the signal, as shells have it. After it, a signal is only noted.
    A second SIGINT always ends the process.

    Attributes:
        received: the first signal that has come, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._training = False
        self._before: dict[signal.Signals, Any] = {}  # handlers

    def listen(self) -> None:
        """Begin to listen; in any thread but the first, where Python allows no handlers, nothing happens."""
        self.received, self._training = None, False
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._came) for number in _STOPS}

    def restore(self) -> None:
        """Listen no more; the handlers of before are back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def begin(self) -> None:
        """From now on there is something to save."""
        self._training = True

    def _came(self, number: int, _: FrameType | None) -> None:
        first, self.received = self.received is None, self.received or signal.Signals(number)
        if number == signal.SIGINT and (not self._training or not first):
            raise KeyboardInterrupt
        if not self._training:
            raise SystemExit(128 + number)
        if first and os.environ.get("LOCAL_RANK", "0") == "0":
            again = "; once more ends it at once" if number == signal.SIGINT else ""
            # Not a logger: its lock may be held by the code that this has interrupted.
            os.write(_STDERR, f"{self.received.name}: saving after this step{again}\n".encode())


stop_signals = StopSignals()
