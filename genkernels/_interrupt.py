"""Ctrl-C and SIGTERM, heard between two steps.

An exception in the midst of an optimiser step would leave weights half updated, which no checkpoint may hold. So the
first signal only raises a flag; the loop finishes the step at hand, saves and stops. A second Ctrl-C stops at once.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading


class Interrupt:
    """Listens for SIGINT and SIGTERM inside a ``with`` block, in the main thread (elsewhere Python delivers none);
    `signal` is the number of the first that came, or None."""

    def __init__(self, speak: bool = True) -> None:
        self.signal: int | None = None
        self._speak, self._before = speak, {}

    def __bool__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._heard) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _heard(self, number: int, _frame) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number
        if self._speak:
            with contextlib.suppress(OSError, AttributeError):  # stderr may be closed, or its reader gone
                sys.stderr.write("\nfinishing this step, then saving (Ctrl-C again stops at once)\n")
                sys.stderr.flush()
