"""The picture of a run: one bar a provider, grouped by case, its length the speed relative to eager PyTorch. Of a run
too large for bars: a line a case, a mark a provider."""

from __future__ import annotations

import io
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
_MOST = 3 * _COLUMN  # bars; more of them are drawn as marks
_LINE, _LINES = 0.2, 64  # inches a case drawn as marks, and how many in one column


def draw(groups: list[tuple[str, list]], conditions: list[str], file: BinaryIO, kind: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    groups = [(title, rows) for title, rows in groups if any(row.median_s for row in rows)]
    if sum(len(rows) for _, rows in groups) > _MOST:
        figure = _as_marks(groups, conditions)
    else:
        figure = _as_bars(groups, conditions)
    FigureCanvasAgg(figure)
    if kind != "png":
        figure.savefig(file, format=kind, facecolor="white")
        return
    from PIL import Image  # which matplotlib needs too

    whole = io.BytesIO()
    figure.savefig(whole, format=kind, facecolor="white")
    few = Image.open(whole).convert("RGB").quantize(64, dither=Image.Dither.NONE)  # a third of the bytes
    few.save(file, "PNG", optimize=True)


def _as_bars(groups, conditions):
    columns = _columns(groups)
    tallest = max((_height(column) for column in columns), default=1.0)
    figure, foot = _page(
        8.6 * max(len(columns), 1),
        tallest,
        0.6,
        "longer is better; at each bar: milliseconds a call (median), speed relative to eager PyTorch",
        conditions,
    )
    speeds = [speed for _, rows in groups for speed in _speeds(rows).values()]
    log = bool(speeds) and max(speeds) / min(speeds) > 30
    width, height = figure.get_size_inches()
    for place, column in enumerate(columns):
        tall = _height(column)
        start, span = (place * 8.6 + 1.3) / width, 7.1 / width
        axes = figure.add_axes((start, (foot + tallest - tall) / height, span, tall / height))
        _fill(axes, column, speeds, log)
    from matplotlib.patches import Patch

    kinds = {_kind(row) for _, rows in groups for row in rows}
    _legend(figure, [Patch(color=colour, label=label) for label, colour in _COLOURS.items() if label in kinds], 0.08, 3)
    return figure


def _page(width: float, tall: float, head: float, subtitle: str, conditions):
    """A figure with its heading and its caption, and the inches below what is drawn."""
    from matplotlib.figure import Figure  # no pyplot: neither a display nor global state

    caption = [part for line in conditions for part in textwrap.wrap(line, round(14.5 * width))]
    foot = 0.65 + 0.17 * len(caption)
    height = head + tall + foot
    figure = Figure(figsize=(width, height), dpi=150)
    title = "How many times as fast as eager PyTorch"
    figure.text(0.15 / width, 1 - 0.16 / height, title, fontsize=14, weight="bold", va="top")
    figure.text(0.15 / width, 1 - 0.44 / height, subtitle, fontsize=9, va="top", color="#444444")
    figure.text(0.15 / width, 0.1 / height, "\n".join(caption), fontsize=7.5, va="bottom", color="#444444")
    return figure, foot


def _as_marks(groups, conditions):
    from matplotlib.lines import Line2D

    count = -(-len(groups) // _LINES)
    each = -(-len(groups) // count)
    tall = each * _LINE + 0.1
    subtitle = (
        "further to the right is better; at each line: milliseconds a call (median), eager and genkernels' best; "
        "wrong: how many providers' values differ, whose speed is not shown"
    )
    width = 8.6 * count
    figure, foot = _page(width, tall, 0.95, subtitle, conditions)
    speeds = [speed for _, rows in groups for speed in _speeds(rows).values()]
    height = figure.get_size_inches()[1]
    for place in range(count):
        column = groups[place * each : (place + 1) * each]
        high = len(column) * _LINE + 0.1
        box = ((place * 8.6 + 3.1) / width, (foot + tall - high) / height, 4.1 / width, high / height)
        _mark(figure.add_axes(box), column, (min(speeds), max(speeds)))
    names = dict.fromkeys(row.provider for _, rows in groups for row in rows if row.provider != "reference")
    marks = [(name, next(row for _, rows in groups for row in rows if row.provider == name)) for name in names]
    handles = [Line2D([], [], linestyle="", label=_NAMES.get(name, name), **_style(row)) for name, row in marks]
    _legend(figure, handles, 0.62, 6)
    return figure


def _style(row) -> dict:
    """What a provider's mark looks like: its form says which, its colour whose; hollow where it is compiled."""
    kind = _kind(row)
    forms = {"compiled": "D", "nflows": "^", "normflows": "v", "FrEIA": "<", "zuko": ">", "one pass": "|"}
    forms |= {"triton": "s", "cuda": "P"}
    fill = "white" if row.provider == "fused compiled" else _COLOURS[kind]
    size = 6 if kind == "genkernels" else 4.5
    return {
        **{"marker": forms.get(row.provider, "o"), "markersize": size, "markerfacecolor": fill},
        **{"markeredgecolor": _COLOURS[kind], "markeredgewidth": 1.3},
    }


def _mark(axes, column, speeds) -> None:
    labels = []
    for y, (title, rows) in enumerate(column):
        name, shape, rest = title.split("  ", 2)
        labels.append(f"{name.removeprefix('training_step/')}, {shape}, {rest.replace('  ', ', ')}")
        relative = _speeds(rows)
        axes.plot([min(relative.values()), max(relative.values())], [y, y], color="#d5d9de", linewidth=1.2, zorder=1)
        for row in sorted(rows, key=lambda row: row.ours):  # ours above the others
            if row.provider in relative and row.provider != "reference":
                axes.plot(relative[row.provider], y, clip_on=False, zorder=3 + row.ours, **_style(row))
        wrong = sum(row.provider not in relative for row in rows)
        ours = min((r.median_s for r in rows if r.ours and r.median_s and r.provider != "reference"), default=None)
        eager = next((r.median_s for r in rows if r.provider == "reference"), None)
        text = " → ".join(milliseconds(seconds) for seconds in (eager, ours) if seconds)
        text = f"{text} ms" + (f", {wrong} wrong" if wrong else "")
        axes.text(
            1.02, y, text, transform=_mixed(axes), fontsize=7.5, va="center", color="#b00020" if wrong else "#222222"
        )
    axes.set_xscale("log")
    axes.set_xlim(0.9 * speeds[0], 1.1 * speeds[1])
    axes.set_ylim(len(column) - 0.5, -0.5)
    axes.axvline(1.0, color="#555555", linewidth=0.8, linestyle=(0, (3, 2)), zorder=0)
    axes.set_yticks(range(len(column)), labels, fontsize=7.5)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8, which="both")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "235" else "")
    axes.set_xlabel("speed, eager PyTorch = 1, logarithmic", fontsize=8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


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


def _legend(figure, handles, top: float, columns: int) -> None:
    width, height = figure.get_size_inches()
    figure.legend(
        handles=handles,
        loc="upper right",
        ncols=columns,
        fontsize=8,
        frameon=False,
        bbox_to_anchor=(1 - 0.15 / width, 1 - top / height),
        borderaxespad=0,
        columnspacing=1.0,
        handlelength=1.2,
    )
