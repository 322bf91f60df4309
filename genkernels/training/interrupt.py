"""Ctrl-C and SIGTERM, heard between two steps.

An exception in the midst of an optimiser step would leave weights half updated, which no checkpoint may hold. So the
first signal only raises a flag; the loop finishes the step at hand, saves and stops. A second Ctrl-C stops at once.
"""

from __future__ import annotations

import signal
import sys
import threading


class Interrupt:
    """Listens for SIGINT and SIGTERM inside a ``with`` block, in the main thread (elsewhere Python delivers no
    signals).

    Attributes:
        signal: the number of the first signal that came, or None.
        forced: whether a second Ctrl-C came.
    """

    def __init__(self, speak: bool = True) -> None:
        self.signal: int | None = None
        self.forced, self._speak, self._before = False, speak, {}

    def __bool__(self) -> bool:
        return self.signal is not None

    def listen(self) -> None:
        """Takes the signals over, also from a library that took them in the meantime."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            present = signal.getsignal(number)
            if present != self._heard:
                self._before.setdefault(number, present)
                signal.signal(number, self._heard)

    def __enter__(self) -> Interrupt:
        self.listen()
        return self

    def __exit__(self, *_exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before.clear()

    def _heard(self, number: int, _frame) -> None:
        if self.signal is not None and number == signal.SIGINT:
            self.forced = True
            raise KeyboardInterrupt
        self.signal = self.signal or number
        if self._speak:
            sys.stderr.write("\nfinishing this step, then saving (Ctrl-C again stops at once)\n")
            sys.stderr.flush()
