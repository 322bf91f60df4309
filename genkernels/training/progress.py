"""What a user sees while a model trains, and how fast it goes. Neither waits for the device between two looks."""

from __future__ import annotations

import shutil
import statistics
import sys
import time
from collections.abc import Callable
from typing import TextIO

import torch


class StepClock:
    """Seconds between the ends of successive steps.

    On a GPU an event is recorded after each step and the events are read when the losses are, so no step waits. The
    time
    of an evaluation, a sheet or a checkpoint is left out: `restart` after it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list = []
        self.seconds: list[float] = []

    def _now(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def restart(self) -> None:
        self.read()
        self._marks = [self._now()]

    def tick(self) -> None:
        self._marks.append(self._now())

    def read(self) -> list[float]:
        """Seconds of the steps since the last call. Waits for the device."""
        marks, self._marks = self._marks, self._marks[-1:]
        if self.device.type == "cuda" and marks:
            marks[-1].synchronize()
            new = [a.elapsed_time(b) / 1e3 for a, b in zip(marks, marks[1:], strict=False)]
        else:
            new = [b - a for a, b in zip(marks, marks[1:], strict=False)]
        self.seconds.extend(new)
        return new

    def rate(self, images: int, *, warmup: int = 5, last: int = 0) -> float | None:
        """Images a second from the median step, without the first `warmup` steps (where there are more than twice as
        many).

        Args:
            images: examples a step, over all devices.
            warmup: steps to leave out.
            last: looks at the newest `last` steps alone; 0 at all.
        """
        kept = self.seconds[warmup:] if len(self.seconds) > 2 * warmup else self.seconds
        kept = kept[-last:]
        return images / max(statistics.median(kept), 1e-9) if kept else None


class Progress:
    """One line that is drawn over and over on a terminal; elsewhere a line now and then.

    Args:
        total: steps of the run.
        start: steps already done.
        stream: where to (None: stderr).
        every: seconds between two lines where the stream is no terminal.
        quiet: draws nothing.
    """

    def __init__(
        self, total: int, start: int = 0, stream: TextIO | None = None, every: float = 10.0, quiet: bool = False
    ) -> None:
        self.total, self.done, self.stream = total, start, stream or sys.stderr
        self.quiet, self.terminal = quiet, bool(getattr(self.stream, "isatty", lambda: False)())
        self._start, self._began, self._drawn = start, time.monotonic(), -float("inf")
        self._open = False
        self._every = 0.1 if self.terminal else every

    def update(self, done: int, text: Callable[[], str]) -> None:
        """Shows that `done` steps are finished, with ``text()`` behind the bar; drops the call where one was drawn just
        now."""
        self.done = done
        now = time.monotonic()
        if self.quiet or (now - self._drawn < self._every and done < self.total):
            return
        self._drawn = now
        line = f"{self._bar()} {done}/{self.total}  {text()}{self._remaining(now)}"
        if self.terminal:  # a line that wraps could not be wiped
            line = line[: shutil.get_terminal_size().columns - 1]
        self.stream.write(f"\r\x1b[2K{line}" if self.terminal else f"{line}\n")
        self.stream.flush()
        self._open = self.terminal

    def note(self, text: str) -> None:
        """Prints a line that stays."""
        if not self.quiet:
            self.stream.write(f"\r\x1b[2K{text}\n" if self.terminal else f"{text}\n")
            self.stream.flush()
            if self.terminal:
                self._drawn = -float("inf")  # the bar was wiped: draw it again at once
                self._open = False

    def close(self) -> None:
        """Leaves the cursor on a line of its own."""
        if self._open:
            self.stream.write("\n")
            self.stream.flush()
            self._open = False

    def _bar(self) -> str:
        share = self.done / max(1, self.total)
        if not self.terminal:
            return f"{share:4.0%}"
        full = int(share * 24)
        done, ahead = ("━", "─") if "utf" in (getattr(self.stream, "encoding", "") or "").lower() else ("#", "-")
        return f"{done * full}{ahead * (24 - full)} {share:4.0%}"

    def _remaining(self, now: float) -> str:
        steps = self.done - self._start
        if not steps or self.done >= self.total:
            return ""
        return f"  {duration((now - self._began) / steps * (self.total - self.done))} left"


def duration(seconds: float) -> str:
    """``1:23:45``, ``3:07``: hours only where there are any."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def rate_text(images_per_second: float | None, noun: str = "images") -> str:
    """``1,234 images/s``."""
    if images_per_second is None:
        return ""
    digits = 0 if images_per_second >= 100 else 1
    return f"{images_per_second:,.{digits}f} {noun}/s"
