#!/usr/bin/env python3
"""Takes cases that were measured again into a committed file of results.

    python tools/merge_results.py benchmarks/results/training_step-cpu.json again.json [more.json …]

A case is replaced as a whole, all of its providers, so that what is compared was measured in one run; the rows say of
which: ``run`` is a key of the file's ``runs``, where that run's machine stands. Rows without it are of the file's own
``machine``. Refuses a case that would lose a provider. The picture beside the file is drawn again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import string
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a fresh clone, nothing installed

from genkernels._files import replacing, write_json
from genkernels.backends import NAMES
from genkernels.benchmarks import plot, report
from genkernels.benchmarks.results import Row

OURS = {"fused", "fused compiled", *NAMES}


def case_of(row: dict) -> tuple:
    return row["case"], tuple(row["shape"]), row["dtype"], row["direction"]


def title(case: tuple) -> str:
    """As notes and tables have it."""
    name, shape, dtype, direction = case
    return "  ".join((name, "×".join(map(str, shape)), dtype, direction))


def read(path: Path) -> dict:
    try:
        results = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} must be a file of JSON: {error}") from None
    if not isinstance(results, dict) or not {"machine", "rows"} <= set(results):
        raise ValueError(f"{path} must hold a machine and rows, as `genkernels bench --json` writes them")
    return results


def merge(old: dict, new: dict) -> dict:
    """`old` with the cases of `new` in their places.

    Raises:
        ValueError: a case is none of `old`'s, or lacks a provider that `old` has there.
    """
    again: dict[tuple, list[dict]] = {}
    for row in new["rows"]:
        again.setdefault(case_of(row), []).append(row)
    providers = {case: {row["provider"] for row in rows} for case, rows in again.items()}
    known = {case_of(row) for row in old["rows"]}
    if strange := [title(case) for case in again if case not in known]:
        raise ValueError(f"a case must be one of the file's, got {'; '.join(strange)}")
    for row in old["rows"]:
        case = case_of(row)
        if case in again and row["provider"] not in providers[case]:
            raise ValueError(f"{title(case)} must be measured with {row['provider']} too, which the file has there")
    runs = dict(old.get("runs", {}))
    letters = string.ascii_lowercase
    key = next(key for key in (*letters, *(a + b for a in letters for b in letters)) if key not in runs)
    runs[key] = {name: value for name, value in new["machine"].items() if name != "notes"}
    rows, done = [], set()
    for row in old["rows"]:
        case = case_of(row)
        if case not in again:
            rows.append(row)
        elif case not in done:
            done.add(case)
            rows += [{**fresh, "run": key} for fresh in again[case]]
    told = [n for n in old["machine"].get("notes", ()) if not n.startswith(tuple(f"{title(case)}:" for case in again))]
    told += [note for note in new["machine"].get("notes", ()) if note not in told]
    used = {row.get("run") for row in rows}
    runs = {key: run for key, run in runs.items() if key in used}
    return {**old, "machine": {**old["machine"], "notes": told}, "runs": runs, "rows": rows}


def draw(results: dict, path: Path) -> None:
    """The picture of a file; its caption says how many cases are of another run."""
    names = {field.name for field in dataclasses.fields(Row)}
    rows = [
        Row(**{name: value for name, value in row.items() if name in names}, ours=row["provider"] in OURS)
        for row in results["rows"]
    ]
    groups = report.groups(rows)
    caption = report.conditions(results["machine"])
    if others := len({case_of(row) for row in results["rows"] if "run" in row}):
        caption.append(
            f"{others} of the {len(groups)} cases were measured at another time: the table says when and where"
        )
    with replacing(path) as file:
        plot.draw(groups, caption, file, path.suffix.lstrip("."))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="the file that is rewritten")
    parser.add_argument("again", nargs="*", type=Path, help="what `genkernels bench --json` wrote")
    arguments = parser.parse_args()
    try:
        results = read(arguments.file)
        for file in arguments.again:
            results = merge(results, read(file))
    except (OSError, ValueError) as error:
        print(f"merge_results: {error}", file=sys.stderr)
        return 2
    write_json(arguments.file, results, indent=1)
    draw(results, arguments.file.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
