"""The picture of a run: one bar a provider, grouped by case, its length the speed relative to eager PyTorch."""

from __future__ import annotations

import textwrap
from typing import BinaryIO

from genkernels.benchmarks.results import milliseconds

_COLOURS = {"genkernels": "#1667b7", "PyTorch": "#8d97a3", "other libraries": "#d3b98c", "yardstick": "#c9d6c4"}
_NAMES = {
    "reference": "eager PyTorch",
    "compiled": "torch.compile",
    "one pass": "its yardstick",
    "fused": "genkernels",
    "fused compiled": "genkernels compiled",
    **{name: f"genkernels {name}" for name in ("cpu", "triton", "cuda")},
}
_BAR, _GAP, _COLUMN = 0.24, 0.46, 45  # inches a bar, inches for a group's heading, bars in one column


def draw(groups: list[tuple[str, list]], conditions: list[str], file: BinaryIO, kind: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # no pyplot: neither a display nor global state

    groups = [(title, rows) for title, rows in groups if any(row.median_s for row in rows)]
    columns = _columns(groups)
    tallest = max((_height(column) for column in columns), default=1.0)
    caption = [part for line in conditions for part in textwrap.wrap(line, 125 * max(len(columns), 1))]
    head, foot = 0.6, 0.65 + 0.17 * len(caption)
    width, height = 8.6 * max(len(columns), 1), head + tallest + foot
    figure = Figure(figsize=(width, height), dpi=150)
    FigureCanvasAgg(figure)
    speeds = [speed for _, rows in groups for speed in _speeds(rows).values()]
    log = bool(speeds) and max(speeds) / min(speeds) > 30
    for place, column in enumerate(columns):
        tall = _height(column)
        start, span = (place * 8.6 + 1.3) / width, 7.1 / width
        axes = figure.add_axes((start, (foot + tallest - tall) / height, span, tall / height))
        _fill(axes, column, speeds, log)
    figure.text(
        0.15 / width, 1 - 0.16 / height, "How many times as fast as eager PyTorch", fontsize=14, weight="bold", va="top"
    )
    subtitle = "longer is better; at each bar: milliseconds a call (median), speed relative to eager PyTorch"
    figure.text(0.15 / width, 1 - 0.44 / height, subtitle, fontsize=9, va="top", color="#444444")
    _legend(figure, width, height, {_kind(row) for _, rows in groups for row in rows})
    figure.text(0.15 / width, 0.1 / height, "\n".join(caption), fontsize=7.5, va="bottom", color="#444444")
    figure.savefig(file, format=kind, facecolor="white")


def _columns(groups):
    """Splits the groups over as many columns as keep the picture readable."""
    bars = sum(len(rows) for _, rows in groups)
    count = max(1, -(-bars // _COLUMN))
    columns, filled = [[] for _ in range(count)], 0
    for group in groups:
        columns[min(count - 1, filled * count // max(bars, 1))].append(group)
        filled += len(group[1])
    return [column for column in columns if column]


def _height(column) -> float:
    return sum(_GAP + _BAR * len(rows) for _, rows in column) + 0.1


def _speeds(rows) -> dict[str, float]:
    """Speed by provider, relative to the reference; to the slowest where the reference was not measured."""
    times = {row.provider: row.median_s for row in rows if row.median_s}
    base = times.get("reference") or max(times.values())
    return {provider: base / seconds for provider, seconds in times.items()}


def _kind(row) -> str:
    if row.provider in ("reference", "compiled"):
        return "PyTorch"
    if row.gate == "none":
        return "yardstick"
    return "genkernels" if row.ours else "other libraries"


def _fill(axes, column, speeds, log) -> None:
    low = 0.8 * min(speeds) if log else 0.0
    room = 1.35  # for the labels at the bars' ends
    top = low * (max(speeds) / low) ** room if log else max(speeds) * room
    y, ticks = 0.0, []
    for title, rows in column:
        y += _GAP
        name, shape, rest = title.split("  ", 2)
        white = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}  # over the line at 1
        axes.text(0.006, y - 0.09, name, transform=_mixed(axes), fontsize=9, weight="bold", va="bottom", bbox=white)
        axes.annotate(
            f"{shape}, {rest.replace('  ', ', ')}",
            (1, y - 0.09),
            xycoords=_mixed(axes),
            fontsize=8,
            ha="right",
            va="bottom",
            color="#444444",
        )
        relative = _speeds(rows)
        for row in rows:
            middle = y + _BAR / 2
            ticks.append((middle, _NAMES.get(row.provider, row.provider)))
            if row.provider in relative:
                speed = relative[row.provider]
                axes.barh(middle, speed - low, left=low, height=_BAR * 0.8, color=_COLOURS[_kind(row)])
                text, colour = f"{milliseconds(row.median_s)} ms · {_times(speed)}", "#222222"
            else:
                speed, text, colour = low, "its values differ: no speed is shown", "#b00020"
            axes.annotate(
                text,
                (speed, middle),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=colour,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
            )
            y += _BAR
    if log:
        axes.set_xscale("log")
    axes.set_xlim(low, top)
    axes.set_ylim(y + 0.06, 0)
    axes.axvline(1.0, color="#555555", linewidth=0.8, linestyle=(0, (3, 2)), zorder=0)
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel(f"speed, eager PyTorch = 1{', logarithmic' if log else ''}", fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _times(speed: float) -> str:
    """Three significant digits."""
    return f"{speed:.{3 if speed < 0.1 else 2 if speed < 10 else 1 if speed < 100 else 0}f}×"


def _mixed(axes):
    """x as a share of the axes, y in its data."""
    return axes.get_yaxis_transform()


def _legend(figure, width, height, kinds) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=label) for label, colour in _COLOURS.items() if label in kinds]
    figure.legend(
        handles=handles,
        loc="upper right",
        ncols=3,
        fontsize=8,
        frameon=False,
        bbox_to_anchor=(1 - 0.15 / width, 1 - 0.08 / height),
        borderaxespad=0,
        columnspacing=1.0,
        handlelength=1.2,
    )
