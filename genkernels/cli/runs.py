"""``genkernels runs [DIR]``: the runs below a folder, beside each other."""

from __future__ import annotations

import json
from pathlib import Path

from genkernels._words import UsageError
from genkernels.cli.info import table


def run(arguments) -> int:
    base = Path(arguments.folder).expanduser()
    if not base.is_dir():
        raise UsageError(f"runs: there is no folder {base}")
    found = sorted(path.parent for pattern in ("", "*/", "*/*/") for path in base.glob(f"{pattern}config.json"))
    rows = [row for folder in found if (row := _row(folder)) is not None]
    if not rows:
        raise UsageError(f"runs: there is no run in {base}, nor in its folders")
    print(table(["run", "model", "data", "parameters", "step", "held out", "images/s", ""], rows))
    return 0


def _row(folder: Path) -> list[str] | None:
    """None where the folder is no run."""
    from genkernels.training.checkpoint import list_checkpoints, step_of
    from genkernels.training.rundir import RunDirectory

    run = RunDirectory(folder)
    try:
        config = run.read_config()
    except UsageError as error:
        return None if "must have the parts" in str(error) else [str(folder), *[""] * 6, "config.json is damaged"]
    model, data = config["model"], config["data"].get("spec") or ""
    head = [str(folder), model.get("name") or model.get("class") or "", data, f"{model.get('parameters') or 0:,}"]
    try:
        results = json.loads(run.metrics.read_bytes())
        first = next(iter(results["held_out"].values()))
        held = f"{first['value']:.4f} {first['unit']}".rstrip() if first["value"] is not None else "NaN"
        rate = f"{results['images_per_second']:,.0f}" if results.get("images_per_second") else ""
        return [*head, f"{results['steps']:,}", held, rate, "stopped early" if results.get("stopped_early") else ""]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration):
        kept = list_checkpoints(run.checkpoints)
        return [*head, f"{step_of(kept[0]):,}" if kept else "0", "", "", "not finished"]
