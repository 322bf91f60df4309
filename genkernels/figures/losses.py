"""The losses of one or more runs, step by step, and what was measured on held-out examples along the way."""

from __future__ import annotations

import json
from pathlib import Path

from genkernels._words import UsageError, nearest

TITLE = "Losses of one or more runs, with their held-out values"


def add_arguments(parser) -> None:
    parser.add_argument("--run", required=True, nargs="+", metavar="RUN", help="the runs' folders")
    parser.add_argument(
        "--column",
        nargs="+",
        metavar="C",
        help="of losses.csv: grad_norm, lr, another term of the loss (default: the loss, each player's where several)",
    )
    parser.add_argument("--log", action="store_true", help="a logarithmic axis")
    parser.add_argument(
        "--smooth", type=int, metavar="N", help="mean of so many values (default: a fiftieth of the run; 0: none)"
    )


def draw(arguments):
    if arguments.smooth is not None and arguments.smooth < 0:
        raise UsageError(f"--smooth must be at least 0, got {arguments.smooth}")
    from genkernels import pictures

    series, measures, longest, columns = {}, set(), 0, []
    labels = _labels(arguments.run)
    for folder, label in zip(map(Path, arguments.run), labels, strict=True):
        found = _columns(folder / "losses.csv", arguments.column)
        columns += [name for name in found if name not in columns]
        for name, (steps, values) in found.items():
            series[f"{label}: training" if len(found) == 1 else f"{label}, {name}"] = steps, values
            longest = max(longest, len(values))
        measure, *points = _held_out(folder / "metrics.json")
        if list(found) == ["loss"] and measure:
            measures.add(measure)
            series[f"{label}: held out"] = tuple(points)
    smooth = longest // 50 if arguments.smooth is None else arguments.smooth
    what = columns[0] if len(columns) == 1 else "losses" if arguments.column is None else "terms"
    title = f"{labels[0]}: {what} by step" if len(labels) == 1 else f"{what[0].upper()}{what[1:]} by step"
    title += f", mean of {smooth} values" if smooth > 1 else ""
    y_label = measures.pop().replace("bits_per_dim", "bits/dim") if len(measures) == 1 else what
    try:
        return pictures.curves(series, log=arguments.log, smooth=smooth, title=title, y_label=y_label)
    except ValueError as error:
        raise UsageError(f"losses of {', '.join(arguments.run)}: {error}") from None


def _labels(folders: list[str]) -> list[str]:
    """``Glow on digits`` where that tells the runs apart, else their folders."""
    from genkernels.training import RunDirectory

    configs = [RunDirectory(folder).read_config() for folder in folders]
    what = [f"{c['model'].get('class')} on {c['data'].get('spec')}" for c in configs]
    return what if len(set(what)) == len(what) else [str(folder) for folder in folders]


def _columns(path: Path, wanted: list[str] | None) -> dict[str, tuple[list[float], list[float]]]:
    """Steps and values by column of ``losses.csv``, what is no row of numbers left out; a cell is empty where a player
    did not move."""
    if not path.is_file():
        raise UsageError(f"{path} cannot be read: no such file")
    from genkernels._loss_file import LossFile

    rows = LossFile.read(path)
    columns = [name for name in rows[0] if name != "step"] if rows else []
    if not columns:
        raise UsageError(f"{path} holds no step yet")
    for name in wanted or ():
        if name not in columns:
            hint = nearest(name, columns, listed=True)
            raise UsageError(f"--column must be one of {', '.join(columns)} in {path}, got {name!r}{hint}")
    chosen = wanted or [name for name in columns if name.split("/")[-1] == "loss"] or columns[:1]
    found = {}
    for name in chosen:
        cells = [(float(row["step"]), float(row[name])) for row in rows if row[name]]
        found[name] = [step for step, _ in cells], [value for _, value in cells]
    return found


def _held_out(path: Path) -> tuple[str, list[float], list[float]]:
    """What was measured during a run, steps and values; nothing before the run has ended."""
    try:
        evaluations = json.loads(path.read_text())["evaluations"]
    except (OSError, ValueError, KeyError, TypeError):
        return "", [], []
    measure = next((name for row in evaluations for name in row if name != "step"), "")
    rows = [(row["step"], row[measure]) for row in evaluations if row.get(measure) is not None]
    return measure, [step for step, _ in rows], [value for _, value in rows]
