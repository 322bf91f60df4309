"""What a run shows and leaves: the table, the JSON file, the picture."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import IO

from genkernels._files import refuse_unwritable, replacing
from genkernels._words import UsageError
from genkernels.benchmarks.results import milliseconds

WIDTH = 100
ONE_PASS = "one pass"
_PICTURES = (".png", ".svg", ".pdf")
_HEAD = (
    "  "
    f"{'provider':<14}{'median ms':>11}{'20 – 80 % ms':>19}{'× reference':>13}{'× compiled':>12}"
    f"{'of peak':>9}{'peak MiB':>11}"
)
_HEAD_WITH_PASS = (
    "  "
    f"{'provider':<14}{'median ms':>11}{'20 – 80 % ms':>19}{'× reference':>13}{'× compiled':>12}"
    f"{'× one pass':>12}{'of peak':>8}{'peak MiB':>9}"
)
SAME = (
    "The same as the reference, operation by operation and bit for bit, there being no kernel that would win; both "
    "rows have the samples of both"
)
PARTED = (
    "Held to the reference in fp64 over all steps of the gate, losses in fp32 leaving it by rounding after the first "
    "round"
)
_LEGEND = (
    "Medians and 20/80 % quantiles of interleaved calls. × reference, × compiled: how many times as fast as eager and "
    "compiled PyTorch. Of peak: bytes/s (or flop/s) as a share of the copy (or product) above. Peak MiB: "
    "memory held at once beyond the inputs. × one pass: likewise, where a case names a yardstick (one forward "
    "pass of its network, or the same step without what is measured), "
    "which has no gate. A provider whose values are wrong shows no speed."
)


# --- the table ----------------------------------------------------------------------------------------------------


def lines(results) -> Iterator[tuple[str, str]]:
    """The table, line by line: ``(style, text)``, no text wider than `WIDTH`."""
    for line in conditions(results.machine):
        yield from (("note", part) for part in textwrap.wrap(line, WIDTH))
    for title, group in groupby(results.rows, key=lambda row: row.title):
        rows = list(group)
        yield "", ""
        yield "title", title
        yield "head", _HEAD_WITH_PASS if any(row.provider == ONE_PASS for row in rows) else _HEAD
        times = {row.provider: row.median_s for row in rows if row.median_s}
        best = min((seconds for name, seconds in times.items() if name != ONE_PASS), default=None)
        for row in rows:
            if row.gate == "fail":
                text = textwrap.wrap(f"FAIL {row.fault}; no speed is shown", WIDTH - 20)
                yield "fail", f"  {row.provider:<14}  {text[0]}"
                yield from (("fail", " " * 20 + part) for part in text[1:])
            else:
                yield ("best" if row.median_s == best else "row"), _line(row, times)
    yield "", ""
    notes = [*unsteady(results.rows), *(f"not measured: {note}" for note in results.notes)]
    if same := [row for row in results.rows if row.same_as]:
        notes.append(f"{SAME}: {'; '.join(f'{row.provider} of {row.title}' for row in same)}")
    if parted := [row for row in results.rows if row.parted]:
        notes.append(f"{PARTED}: {'; '.join(f'{row.provider} of {row.title}: {row.parted}' for row in parted)}")
    notes += [_LEGEND] if results.rows else ["nothing was measured"]
    for note in notes:
        yield from (("note", part) for part in textwrap.wrap(note, WIDTH, subsequent_indent="  "))


def unsteady(rows) -> list[str]:
    """A warning where many samples disagree with each other: the machine had other work to do."""
    timed = [row for row in rows if row.median_s]
    spread = [row for row in timed if row.q80_s > 1.5 * row.q20_s]
    if 4 * len(spread) <= len(timed):
        return []
    return [
        f"UNSTEADY: {len(spread)} of {len(timed)} timings spread by more than half; measure again on a quiet machine"
    ]


def _line(row, times: dict[str, float]) -> str:
    def ratio(base: str) -> str:
        if base not in times:
            return "–"
        times_as_fast = times[base] / row.median_s
        return f"{times_as_fast:.2f}" if times_as_fast >= 0.1 else f"{times_as_fast:.2g}"

    spread = f"{milliseconds(row.q20_s)} – {milliseconds(row.q80_s)}"
    share = "–" if row.share_of_peak is None else f"{100 * row.share_of_peak:.0f} %"
    peak = "–" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}"
    common = (
        "  "
        f"{row.provider:<14}{milliseconds(row.median_s):>11}{spread:>19}{ratio('reference'):>13}{ratio('compiled'):>12}"
    )
    if ONE_PASS in times:
        return f"{common}{ratio(ONE_PASS):>12}{share:>8}{peak:>9}"
    return f"{common}{share:>9}{peak:>11}"


def conditions(machine: dict) -> list[str]:
    """Where and when the numbers were taken, in two or three lines."""
    if not machine:
        return []
    count = machine["threads"]
    on_cpu = machine["device_type"] == "cpu"
    threads = f"{count} thread{'s' * (count > 1)}" if on_cpu else ""
    instructions = {"avx512": "AVX-512", "avx2": "AVX2"}.get(machine.get("cpu_variant"), "") if on_cpu else ""
    versions = machine["versions"]
    commit = f"commit {machine['commit']}" if machine["commit"] else ""
    date = machine["date"].replace("T", " ").replace("+00:00", " UTC")
    products = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in machine["product_flops_per_s"].items())
    return [
        " · ".join(filter(None, (machine["device"], instructions, threads, f"torch {versions['torch']}"))),
        " · ".join(filter(None, (f"genkernels {versions['genkernels']}", commit, date))),
        f"reached in this run: copy {machine['copy_bytes_per_s'] / 1e9:,.1f} GB/s (read + written), "
        f"matrix product {products} Gflop/s"
        + ("; what is freed stays with the process" if machine.get("keeps_freed_memory") else ""),
    ]


def show(results, file: IO[str] | None = None) -> None:
    """Prints the table, in colours where `file` is a terminal and rich is installed."""
    file = file or sys.stdout
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        Console = None
    styles = {"title": "bold", "head": "dim", "best": "bold green", "fail": "bold red", "note": "dim"}
    if Console is None or not file.isatty():
        print("\n".join(text for _, text in lines(results)), file=file)
        return
    console = Console(file=file, highlight=False)
    for style, text in lines(results):
        console.print(Text(text, style=styles.get(style, "")), soft_wrap=True)


# --- whole training steps, for the documentation ---------------------------------------------------------------------

_STEPS = {"reference": "eager", "compiled": "compiled", "fused": "fused", "fused compiled": "fused compiled"}
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}


def training_step_table(results_json: dict | str | os.PathLike) -> str:
    """What ``genkernels bench training_step --json`` wrote as a Markdown table, a line for each model, preset, dtype.

    Milliseconds a step (medians). × eager: how many times as fast as eager PyTorch the fused step is; × compiled: how
    many times as fast as compiled PyTorch it is inside ``torch.compile``; "same": the fused step is the eager one,
    operation by operation and bit for bit; run: of which of the file's ``runs`` the line is, where it has several.

    Args:
        results_json: what the file holds, or its path.
    """
    if not isinstance(results_json, dict):
        results_json = json.loads(Path(results_json).read_text())
    lines: dict[tuple, dict[str, dict]] = {}
    for row in results_json["rows"]:
        _, model, preset = row["case"].split("/")
        lines.setdefault((model, preset, row["dtype"]), {})[row["provider"]] = row
    peers = sorted({name for by_provider in lines.values() for name in by_provider} - set(_STEPS))
    heads = ["model", "preset", "precision", "batch", *(f"{name} ms" for name in [*_STEPS.values(), *peers])]
    heads += ["× eager", "× compiled", *(["run"] if results_json.get("runs") else [])]
    table = [_markdown(heads), _markdown(["---"] * len(heads))]
    for (model, preset, dtype), by_provider in lines.items():
        times = {name: row["median_s"] for name, row in by_provider.items() if row["median_s"]}
        cells = [_cell(by_provider.get(name)) for name in [*_STEPS, *peers]]
        ratios = [
            f"{times[base] / times[ours]:.2f}" if base in times and ours in times else "–"
            for base, ours in (("reference", "fused"), ("compiled", "fused compiled"))
        ]
        if by_provider.get("fused", {}).get("same_as"):
            ratios[0] = "same"
        first = next(iter(by_provider.values()))
        if results_json.get("runs"):
            ratios.append(first.get("run", "–"))
        batch = str(first["shape"][0])
        table.append(_markdown([model, preset, PRECISIONS.get(dtype, dtype), batch, *cells, *ratios]))
    return "\n".join(table) + "\n"


def _cell(row: dict | None) -> str:
    if row is None:
        return "–"
    return milliseconds(row["median_s"]) if row["gate"] == "pass" and row["median_s"] else "fails the gate"


def _markdown(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


# --- files --------------------------------------------------------------------------------------------------------


def check_plot(path: str | os.PathLike) -> None:
    """Likewise for the picture, which also needs a known ending and matplotlib."""
    refuse_unwritable(path, f"bench: plot {str(path)!r}")
    if Path(path).suffix.lower() not in _PICTURES:
        raise UsageError(f"bench: plot must end in {', '.join(_PICTURES)}, got {str(path)!r}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError(
            "bench: plot needs matplotlib, which is not installed (pip install 'genkernels[train]')"
        ) from None


def write_plot(results, path: str | os.PathLike) -> None:
    from genkernels.benchmarks.plot import draw

    with replacing(path) as file:
        draw(
            groups(results.rows),
            conditions(results.machine) + unsteady(results.rows),
            file,
            Path(path).suffix.lstrip(".").lower(),
        )


def groups(rows: Iterable) -> list[tuple[str, list]]:
    """``(title, rows)`` for each case, in the table's order."""
    return [(title, list(group)) for title, group in groupby(rows, key=lambda row: row.title)]
