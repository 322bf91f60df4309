"""Curves in several panels side by side, one colour a name in all of them, and what is exact drawn behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from genkernels.pictures.plots import COLOURS, figure_of, heading, pixels_of

#: The name of a series that is known without an estimate.
EXACT = "exact"


def panels(
    series: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
    *,
    captions: Mapping[str, str] | None = None,
    x_label: str = "",
    log: str = "",
    symlog: Sequence[str] = (),
    title: str = "",
    note: str = "",
) -> np.ndarray:
    """Draws curves in a panel each.

    Args:
        series: by the panel's title, ``(x, y)`` by the curve's name. A name has one colour in all panels; ``exact`` is
            a broken grey line behind the others, which have a dot at each point. Values that are not finite leave a
            gap, on a logarithmic axis those that are not positive too.
        captions: lines below a panel, by its title.
        x_label: below every panel.
        log: the axes that are logarithmic, ``"x"``, ``"y"`` or ``"xy"``.
        symlog: titles of panels whose y is logarithmic beyond ±1, and linear between.
        title: a line above the panels.
        note: smaller lines below the title.

    Returns:
        ``[height, width, 3]`` bytes.

    Raises:
        ValueError: there is no panel, or one has no value to draw.
    """
    if not series or not all(any(np.isfinite(y).any() for _, y in curves.values()) for curves in series.values()):
        raise ValueError(f"panels: each panel must have a finite value, got {', '.join(series) or 'no panel'}")
    captions = captions or {}
    lines = max((text.count("\n") + 1 for text in captions.values()), default=0)
    width, below = 4.2 * len(series), 0.55 + 0.22 * lines
    text = heading(title, note, width)
    head = 0.25 * len(text) + 0.75  # inches; the names of the curves and of the panels
    height = 3.2 + below + head
    figure = figure_of(width, height)
    colours: dict[str, str] = {}
    handles = {}
    for i, (name, curves) in enumerate(series.items()):
        axes = figure.add_subplot(1, len(series), i + 1)
        for label, (x, y) in curves.items():
            x, y = (_drawable(values, axis in log) for values, axis in ((x, "x"), (y, "y")))
            style = {"color": "#5b6670", "linestyle": (0, (4, 2)), "linewidth": 2.2}
            if label != EXACT:
                colour = colours.setdefault(label, COLOURS[len(colours) % len(COLOURS)])
                style = {"color": colour, "linewidth": 1.7, "marker": "o", "markersize": 3.5}
            (handles[label],) = axes.plot(x, y, label=label, **style)
        if "x" in log:
            axes.set_xscale("log")
        if "y" in log:
            axes.set_yscale("log")
        if name in symlog:
            axes.set_yscale("symlog", linthresh=1.0)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_title(name, fontsize=11, weight="bold")
        axes.set_xlabel("\n".join(filter(None, (x_label, captions.get(name, "")))), fontsize=9.5, linespacing=1.5)
        axes.grid(color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.subplots_adjust(
        left=0.65 / width, right=1 - 0.2 / width, bottom=below / height, top=1 - head / height, wspace=0.22
    )
    for i, (part, size, weight, colour) in enumerate(text):
        y = 1 - (0.1 + 0.25 * i) / height
        figure.text(0.2 / width, y, part, fontsize=size, weight=weight, color=colour, va="top")
    figure.legend(
        handles.values(),
        handles.keys(),
        ncols=len(handles),
        frameon=False,
        loc="upper left",
        bbox_to_anchor=(0.1 / width, 1 - (head - 0.68) / height),
    )
    return pixels_of(figure)


def _drawable(values: Sequence[float], log: bool) -> np.ndarray:
    """Values with NaN, a gap, for what has no place on the axis."""
    values = np.asarray(values, float)
    return np.where(np.isfinite(values) & ((values > 0) | (not log)), values, np.nan)
