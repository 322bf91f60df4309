"""The line, or few lines, in which a run shows itself: drawn over and over on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO


def bar_on(stream: TextIO, total: int, start: int = 0, *, quiet: bool = False) -> Bar:
    """Rich's bar on a terminal where rich is installed; else plain lines."""
    if not quiet and getattr(stream, "isatty", lambda: False)():
        try:
            return RichBar(total, start, stream)
        except ImportError:
            pass
    return Bar(total, start, stream, quiet=quiet)


class Bar:
    """A line now and then.

    Args:
        total: steps of the run.
        start: steps already done.
        stream: where to.
        every: seconds between two lines.
        quiet: draws nothing.
    """

    def __init__(self, total: int, start: int, stream: TextIO, every: float = 10.0, quiet: bool = False) -> None:
        self.total, self.start, self.done, self.stream, self.quiet = total, start, start, stream, quiet
        self._every, self._began, self._drawn = every, time.monotonic(), -float("inf")

    def update(self, done: int, parts: Callable[[], list[str]]) -> None:
        """Shows that `done` steps are finished, with ``parts()`` beside it; drops the call where one was drawn just
        now."""
        self.done, now = done, time.monotonic()
        if self.quiet or (now - self._drawn < self._every and done < self.total):
            return
        self._drawn = now
        self._draw(parts(), now - self._began)

    def _draw(self, parts: list[str], elapsed: float) -> None:
        steps = self.done - self.start
        if steps and self.done < self.total:
            parts = [*parts, f"{duration(elapsed / steps * (self.total - self.done))} left"]
        self.note("  ".join([f"{self.done / max(1, self.total):4.0%} {self.done}/{self.total}", *parts]))

    def note(self, text: str) -> None:
        """Prints a line that stays."""
        if not self.quiet:
            self.stream.write(f"{text}\n")
            self.stream.flush()

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
                yield from map(Text, lines_of(bar._parts, console.width))

        columns = (
            progress.BarColumn(bar_width=None),
            progress.TaskProgressColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("{task.fields[left]}"),
        )
        # no thread of its own: processes that load data are forked while it would hold a lock
        self._display = Display(*columns, console=console, auto_refresh=False, expand=True)
        self._task = self._display.add_task("", total=total, completed=start, left="")

    def _draw(self, parts: list[str], elapsed: float) -> None:
        self._parts, steps = parts, self.done - self.start
        left = f"{duration(elapsed / max(1, steps) * (self.total - self.done))} left"
        self._display.start()
        self._display.update(self._task, completed=self.done, left=left, refresh=True)

    def note(self, text: str) -> None:
        self._display.console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        self._display.stop()


def lines_of(parts: list[str], width: int) -> list[str]:
    """Parts side by side, as many a line as fit: none is torn apart."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + 2 + len(part) <= width:
            lines[-1] += f"  {part}"
        else:
            lines.append(part)
    return lines


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
