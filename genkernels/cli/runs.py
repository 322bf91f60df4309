"""``genkernels runs [DIR]``: the runs below a folder, beside each other."""

from __future__ import annotations

import csv
import json
import statistics
import time
from pathlib import Path

from genkernels._files import locked
from genkernels._words import UsageError
from genkernels.cli.info import table

NEWEST = 1 << 16  # bytes of losses.csv that tell of a run's pace


def run(arguments) -> int:
    base = Path(arguments.folder).expanduser()
    if not base.is_dir():
        raise UsageError(f"runs: there is no folder {base}")
    found = sorted(path.parent for pattern in ("", "*/", "*/*/") for path in base.glob(f"{pattern}config.json"))
    rows = [row for folder in found if (row := _row(folder)) is not None]
    if not rows:
        raise UsageError(f"runs: there is no run in {base}, nor in its folders")
    print(table(["run", "model", "data", "parameters", "step", "held out", "images/s", "written", ""], rows))
    return 0


def _row(folder: Path) -> list[str] | None:
    """None where the folder is no run."""
    from genkernels.training.checkpoint import list_checkpoints, step_of
    from genkernels.training.rundir import RunDirectory

    run = RunDirectory(folder)
    try:
        config = run.read_config()
    except UsageError as error:
        return None if "must have the parts" in str(error) else [str(folder), *[""] * 7, "config.json is damaged"]
    model, data = config["model"], config["data"].get("spec") or ""
    head = [str(folder), model.get("name") or model.get("class") or "", data, f"{model.get('parameters') or 0:,}"]
    written = _ago(run)
    now = locked(folder)
    if not now:
        try:
            results = json.loads(run.metrics.read_bytes())
            name, first = next(iter(results["held_out"].items()))
            held = "NaN" if first["value"] is None else f"{first['value']:.4f} {first['unit'] or name}"
            rate = f"{results['images_per_second']:,.0f}" if results.get("images_per_second") else ""
            early = "stopped early" if results.get("stopped_early") else ""
            return [*head, f"{results['steps']:,}", held, rate, written, early]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration):
            pass
    kept = list_checkpoints(run.checkpoints)
    step, rate = (step_of(kept[0]) if kept else 0), ""
    if newest := _newest(run.losses):
        rate = f"{config['train'].get('batch_size', 64) / max(newest[1], 1e-9):,.0f}"
        step = newest[0] if now else step  # what a stopped run has done since its checkpoint is lost
    total = f" of {most:,}" if (most := config["train"].get("max_steps")) else ""
    return [*head, f"{step:,}{total}", "", rate, written, "trains now" if now else "not finished"]


def _newest(losses: Path) -> tuple[int, float] | None:
    """How many steps ``losses.csv`` has, and the median of the seconds that the newest took."""
    try:
        with losses.open("rb") as file:
            names = file.readline().decode().strip().split(",")
            file.seek(max(file.tell(), losses.stat().st_size - NEWEST))
            lines = file.read().decode().splitlines()
        rows = [dict(zip(names, row, strict=True)) for row in csv.reader(lines) if len(row) == len(names)]
        seconds = [float(row["seconds"]) for row in rows[-100:]]
        return int(rows[-1]["step"]) + 1, statistics.median(seconds)
    except (OSError, ValueError, KeyError, IndexError):
        return None


def _ago(run) -> str:
    """How long ago something was written into a run's folder."""
    files = [path for path in (run.config, run.losses, run.metrics) if path.exists()]
    return ago(time.time() - max(path.stat().st_mtime for path in files))


def ago(seconds: float) -> str:
    """``12 s ago``, ``3 min ago``, ``5 h ago``, ``2 days ago``."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds // size:.0f} {unit} ago"
    return f"{max(0, seconds):.0f} s ago"
