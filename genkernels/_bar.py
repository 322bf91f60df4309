"""How a run shows itself while it goes on: drawn over and over on a terminal, plain lines elsewhere."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Mapping
from typing import TextIO

MARKS = 256  # moments of a run that the time left is told by
SHORT = 2.0  # seconds, over less of which no pace is taken


def bar_on(stream: TextIO | None, total: int, start: int = 0, *, quiet: bool = False) -> Bar:
    """Rich's bar on a terminal where rich is installed; else plain lines; nothing where stderr is closed."""
    if not quiet and getattr(stream, "isatty", lambda: False)():
        try:
            return RichBar(total, start, stream)
        except ImportError:
            pass
    return Bar(total, start, stream, quiet=quiet or stream is None)


class Bar:
    """A line every so many seconds, for a run of `total` steps of which `start` are done.

    Attributes:
        ahead: when so many steps are done, how many pauses of each kind, evaluations or sheets, are still to come.
    """

    ahead: Callable[[int], Mapping[str, float]] = staticmethod(lambda done: {})

    def __init__(self, total: int, start: int, stream: TextIO, every: float = 10.0, quiet: bool = False) -> None:
        self.total, self.start, self.done, self.stream, self.quiet = total, start, start, stream, quiet
        self._every, self._drawn, self._marks = every, -float("inf"), [(time.monotonic(), start)]
        self._pauses: dict[str, list[float]] = {}
        self._paused = 0.0

    def update(self, done: int, parts: Callable[[], list[str]]) -> None:
        """Shows that `done` steps are finished, with ``parts()`` beside it; not where it was shown just now."""
        self.done, now = done, time.monotonic()
        if len(self._marks) >= MARKS:
            del self._marks[1::2]
        self._marks.append((now - self._paused, done))
        if self.quiet or (now - self._drawn < self._every and done < self.total):
            return
        self._drawn = now
        self._draw(parts(), f"{duration(self._left(now))} left")

    def pause(self, kind: str, seconds: float) -> None:
        """Something beside the steps has taken so long."""
        self._pauses.setdefault(kind, []).append(seconds)
        self._paused += seconds

    def _left(self, now: float) -> float:
        """Seconds that are left: the steps at the pace of the newest, over half as long as they will take, but of no
        more than half of them, for what the first of all have to wait for says nothing of the others; and each pause
        that is ahead at the mean of its kind."""
        now, steps = now - self._paused, 0.0
        for then, step in reversed(self._marks):
            if step < self.done:
                steps = (now - then) / (self.done - step) * (self.total - self.done)
                if now - then >= max(SHORT, steps / 2) or 2 * step <= self.start + self.done:
                    break
        ahead = self.ahead(self.done)
        return steps + sum(ahead.get(kind, 0) * sum(took) / len(took) for kind, took in self._pauses.items())

    def _draw(self, parts: list[str], left: str) -> None:
        head = f"{self.done / max(1, self.total):4.0%} {self.done}/{self.total}"
        self.note("  ".join([head, *parts, *([left] if self.done < self.total else [])]))

    def note(self, text: str) -> None:
        """Prints a line that stays."""
        if not self.quiet:
            try:
                self.stream.write(f"{text}\n")
                self.stream.flush()
            except OSError:  # whoever read it has gone: the run goes on
                self.quiet = True

    def close(self) -> None:
        """Leaves the cursor on a line of its own."""


class RichBar(Bar):
    """A bar with the time passed and the time left; below it all that is shown, on as many lines as it takes."""

    def __init__(self, total: int, start: int, stream: TextIO) -> None:
        from rich import progress
        from rich.console import Console
        from rich.text import Text

        super().__init__(total, start, stream, every=0.1)
        self._parts: list[str] = []
        bar, console = self, Console(file=stream, highlight=False)

        class Display(progress.Progress):
            def get_renderables(self):
                yield self.make_tasks_table(self.tasks)
                whole = "  ".join(part.replace(" ", "\0") for part in bar._parts)  # no part is torn apart
                yield from (
                    Text(line.replace("\0", " "))
                    for line in textwrap.wrap(whole, console.width, break_on_hyphens=False)
                )

        times = progress.TimeElapsedColumn(), progress.TextColumn("{task.fields[left]}")
        counts = progress.TaskProgressColumn(), progress.MofNCompleteColumn()
        # no thread of its own: processes that load data are forked while it would hold a lock
        self._display = Display(
            progress.BarColumn(None), *counts, *times, console=console, auto_refresh=False, expand=True
        )
        self._task = self._display.add_task("", total=total, completed=start, left="")

    def _draw(self, parts: list[str], left: str) -> None:
        self._parts = parts
        self._display.start()
        self._display.update(self._task, completed=self.done, left=left, refresh=True)

    def note(self, text: str) -> None:
        self._display.console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        self._display.stop()


class Waiting:
    """What is being done to data and how much of it is done, from the second second on: one line over and over on a
    `terminal`, a line every ten seconds elsewhere."""

    def __init__(self, stream: TextIO | None, head: str, terminal: bool, quiet: bool = False) -> None:
        self._stream, self._head, self._terminal = stream, head, terminal
        self._quiet, self._drawn = quiet or stream is None, False
        self._next = time.monotonic() + 1.0

    def update(self, what: str, done: int, total: int) -> None:
        if self._quiet or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + (0.1 if self._terminal else 10.0)
        text = f"{self._head}: {what} {done:,} of {total:,} images"
        self._write(f"\r\x1b[K{text}" if self._terminal else f"{text}\n")
        self._drawn = True

    def close(self) -> None:
        if self._drawn and self._terminal:
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            self._quiet = True


def duration(seconds: float) -> str:
    """``1:23:45``, ``3:07``: hours only where there are any."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def rate_text(per_second: float | None, noun: str = "images") -> str:
    """``1,234 images/s``."""
    return "" if per_second is None else f"{per_second:,.{0 if per_second >= 100 else 1}f} {noun}/s"


def number(value: float) -> str:
    """Three decimals, or as many digits as a very large or very small number takes."""
    return f"{value:.3f}" if value == 0 or 1e-2 <= abs(value) < 1e5 else f"{value:.3g}"
