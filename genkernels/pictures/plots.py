"""Points of the plane and curves over a run, by matplotlib: neither a display nor global state is touched."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

COLOURS = ("#1667b7", "#d1602c", "#2f8f5b", "#8a4fb0", "#b8860b", "#5b6670")  # told apart in print, too
UNEQUAL = 5.0  # times the span of one feature, from where on the other has a scale of its own
_DOTS = 40  # a curve of fewer points is drawn with a dot at each


def scatter(
    points: Tensor | Mapping[str, Tensor], real: Tensor | None = None, *, title: str = "", note: str = ""
) -> np.ndarray:
    """Draws points of the plane, beside real ones on the same axes where given.

    Args:
        points: ``[N, D]``, the first two features are drawn (D = 1: a histogram), which is told where there are more;
            or several such by name, a panel each.
        real: ``[M, D]`` real examples, in a last panel. They set the frame: a few wild samples must not shrink
            everything else. Axes have one scale, unless one feature spans several times what the other does.
        title: a line above the panels.
        note: smaller lines below the title.

    Returns:
        ``[rows, columns, 3]`` bytes.
    """
    panels = dict(points) if isinstance(points, Mapping) else {"samples": points}
    if real is not None:
        panels["data"] = real
    panels = {name: x.detach().cpu().float().reshape(len(x), -1).numpy() for name, x in panels.items()}
    columns = min(len(panels), 4) if len(panels) != 6 else 3
    lines = math.ceil(len(panels) / columns)
    side = 5.0 if len(panels) <= 2 else 3.6  # inches
    width, height = side * columns, (side + 0.3 * (lines > 1)) * lines  # square panels, and room for their titles
    *_, frame = panels.values()
    features = frame.shape[1]
    if features > 2:
        note = f"{note}; " * bool(note) + f"the first 2 of {features} features"
    text = heading(title, note, width)
    head = 0.25 * len(text)  # inches
    figure = figure_of(width, height + head)
    frame = frame[np.isfinite(frame).all(1)].astype(float)
    low, high = (frame[:, :2].min(0), frame[:, :2].max(0)) if len(frame) else (np.zeros(2), np.ones(2))
    spans = np.maximum(high - low, 1e-6 * np.maximum(1.0, np.maximum(abs(low), abs(high))))
    one_scale = features < 2 or spans.max() < UNEQUAL * spans.min()
    for i, (name, x) in enumerate(panels.items()):
        axes = figure.add_subplot(lines, columns, i + 1, title=f"{name} ({len(x):,})")
        x = x[np.isfinite(x).all(1)]
        if x.shape[1] == 1:
            inside = (x[:, 0] >= low[0] - 0.05 * spans[0]) & (x[:, 0] <= high[0] + 0.05 * spans[0])
            axes.hist(x[inside, 0], bins=80, color=COLOURS[0])
            continue
        axes.scatter(x[:, 0], x[:, 1], s=3, alpha=0.5, linewidths=0, color=COLOURS[0])
        if len(frame):
            half = 0.55 * np.full(2, spans.max()) if one_scale else 0.55 * spans
            middle = (low + high) / 2
            axes.set(xlim=(middle[0] - half[0], middle[0] + half[0]), ylim=(middle[1] - half[1], middle[1] + half[1]))
        if one_scale:
            axes.set_aspect("equal", adjustable="box")
        if features > 2:
            axes.set(xlabel="feature 1", ylabel="feature 2")
        axes.locator_params(nbins=5)
    for i, (part, size, weight, colour) in enumerate(text):
        y = 1 - (0.08 + 0.25 * i) / (height + head)
        figure.text(0.1 / width, y, part, fontsize=size, weight=weight, color=colour, va="top")
    figure.tight_layout(rect=(0, 0, 1, height / (height + head)))
    return pixels_of(figure)


def curves(
    series: Mapping[str, Sequence[float] | tuple[Sequence[float], Sequence[float]]],
    *,
    log: bool = False,
    smooth: int = 0,
    title: str = "",
    x_label: str = "step",
    y_label: str = "loss",
) -> np.ndarray:
    """Draws values over the steps of a run: a column of ``losses.csv``, held-out values.

    Args:
        series: values by name, one a step from 0, or ``(steps, values)``. Values that are not finite leave a gap.
            ``A: B`` has the colour of every other ``A: …``, and a dashed line from the second one on.
        log: a logarithmic axis.
        smooth: draws the mean of so many values around each, and the values themselves pale behind it; 0 draws the
            values alone. Series of fewer than 40 points are drawn as they are, with a dot at each.
        title, x_label, y_label: what stands at the axes.

    Returns:
        ``[rows, columns, 3]`` bytes.

    Raises:
        ValueError: there is nothing to draw, steps and values are not equally many, or `log` and no value is positive.
    """
    from matplotlib.ticker import LogLocator

    figure = figure_of(8.0, 4.8)
    axes = figure.add_subplot()
    colours: dict[str, str] = {}
    shown = []
    for name, values in series.items():
        steps, values = values if isinstance(values, tuple) else (range(len(values)), values)
        steps, values = np.asarray(steps, float), np.asarray(values, float)
        if len(steps) != len(values):
            raise ValueError(f"curves: {name} must have a step for each value, got {len(steps)} for {len(values)}")
        values = np.where(np.isfinite(values) & ((values > 0) | (not log)), values, np.nan)
        run = name.partition(": ")[0]
        dashed = run in colours
        colour = colours.setdefault(run, COLOURS[len(colours) % len(COLOURS)])
        dots = len(values) < _DOTS
        if smooth > 1 and not dots:
            axes.plot(steps, values, color=colour, alpha=0.2, linewidth=0.7)
            values = _running_mean(values, smooth)
        style = {"linestyle": (0, (4, 2)) if dashed else "-", "marker": "o" if dots else None, "markersize": 3.5}
        axes.plot(steps, values, color=colour, linewidth=1.7, label=name, **style)
        shown.append(values[np.isfinite(values)])
    drawn = np.concatenate(shown) if shown else np.empty(0)
    if not len(drawn):
        raise ValueError(f"curves: a value must be {'positive' if log else 'finite'}, got none that is")
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_plain_number)
        if drawn.max() < 1000 * drawn.min():  # over few decades the powers of ten alone say little
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            axes.yaxis.set_minor_formatter(_plain_number)
    else:
        _frame(axes, shown)
    axes.set_xlabel(x_label)
    axes.set_ylabel(f"{y_label}, logarithmic" if log else y_label)
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.legend(frameon=False)
    if title:
        axes.set_title(title, loc="left", fontsize=12, weight="bold")
    figure.tight_layout()
    return pixels_of(figure)


def _plain_number(value: float, _) -> str:
    return f"{value:g}"


def _frame(axes, shown: list[np.ndarray]) -> None:
    """Cuts off the first steps of a fresh model, whose losses would flatten everything after them: the axis ends at
    what is reached after a fiftieth of the run."""
    tops = [float(values[len(values) // 50 :].max()) for values in shown if len(values)]
    bottom, top = min(float(values.min()) for values in shown if len(values)), max(tops)
    room = 0.05 * (top - bottom) or 0.05 * abs(top) or 1.0
    axes.set_ylim(bottom - room, top + room)


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of the `width` values around each, of fewer at the ends. What is not finite does not count."""
    fine = np.isfinite(values)
    totals = np.concatenate([[0.0], np.where(fine, values, 0.0).cumsum()])
    counts = np.concatenate([[0], fine.cumsum()])
    at = np.arange(len(values))
    first, end = np.maximum(at - width // 2, 0), np.minimum(at + (width + 1) // 2, len(values))
    with np.errstate(invalid="ignore"):
        return (totals[end] - totals[first]) / (counts[end] - counts[first])


def figure_of(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100)
    FigureCanvasAgg(figure)
    return figure


def heading(title: str, note: str, width: float) -> list[tuple[str, int, str, str]]:
    """A title and a note in lines for `width` inches: words, size, weight, colour."""
    lines = [(part, 12, "bold", "#222222") for part in textwrap.wrap(title, round(9 * width))]
    return lines + [(part, 10, "normal", "#606060") for part in textwrap.wrap(note, round(12 * width))]


def pixels_of(figure) -> np.ndarray:
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
