"""Writes docs/ from the docstrings: one page an operator, one a family of models, one for data, one for training.

python tools/build_docs.py          writes the pages
python tools/build_docs.py --check  fails where a page is not what the docstrings say now
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

#: page: (title, module whose docstring opens the page, module that lists the names, names or None for __all__)
PAGES = {
    "layers": ("Layers", "genkernels.nn", "genkernels.nn", None),
    "flows": (
        "Normalizing flows",
        "genkernels.models.flows",
        "genkernels.models",
        ("NICE", "RealNVP", "Glow", "MAF", "IAF", "build"),
    ),
    "autoregressive": (
        "Autoregressive models",
        "genkernels.models.autoregressive",
        "genkernels.models",
        ("PixelCNN", "GatedPixelCNN", "PixelModel"),
    ),
    "losses": ("Losses", "genkernels.losses", "genkernels.losses", None),
    "data": ("Data", "genkernels.data", "genkernels.data", ("load", "DataBundle", "DataError")),
    "training": (
        "Training",
        "genkernels.training",
        "genkernels.training",
        ("fit", "TrainConfig", "Result", "load_model"),
    ),
}


BEGIN, END = "<!-- measured: written by tools/build_docs.py -->", "<!-- end of measured -->"


def entry(name: str, thing) -> str:
    try:
        # annotations are strings (they are never evaluated): shown without their quotes
        signature = re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(inspect.signature(thing)))
    except (TypeError, ValueError):
        signature = ""
    return f"## `{name}`\n\n```python\n{name}{signature}\n```\n\n{inspect.cleandoc(thing.__doc__ or '')}\n"


def table(rows: list[tuple[str, ...]], header: tuple[str, ...]) -> str:
    lines = [" | ".join(header), " | ".join("---" for _ in header), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def operator_page(operator) -> str:
    reference = importlib.import_module(f"genkernels.reference.{operator.name}")
    parts = [f"# {operator.name}\n\n{inspect.cleandoc(reference.__doc__)}\n"]
    parts += [entry(f"genkernels.ops.{f.__name__}", f) for f in (*operator.functions, *operator.types)]
    floors = {
        "reference": f"genkernels/reference/{operator.name}.py",
        "cpu": f"csrc/cpu/{operator.name}.cpp",
        "triton": f"genkernels/triton/{operator.name}.py",
        "cuda": f"csrc/cuda/{operator.name}.cu",
    }
    rows = [("reference", f"`{floors.pop('reference')}`")]
    for name, file in floors.items():
        rest = operator.left_to_reference(name)
        rows.append((name, operator.kernels[name] or f"`{file}`" + (f"; {rest}" if rest else "")))
    parts.append("## Backends\n\n" + table(rows, ("backend", "where")))
    parts.append(
        "## Composability\n\n"
        + "What runs under each of torch's features: the kernel, the plain PyTorch reference (right, but "
        "slower), or an error.\n\n" + table(list(operator.composability.items()), ("feature", "runs"))
    )
    return "\n".join(parts)


def page(title: str, opening: str, module_name: str, names) -> str:
    module = importlib.import_module(module_name)
    names = names or module.__all__
    parts = [f"# {title}\n\n{inspect.cleandoc(importlib.import_module(opening).__doc__ or '')}\n"]
    return "\n".join(parts + [entry(f"{module_name}.{name}", getattr(module, name)) for name in names])


def measured(results: Path) -> str:
    """One table of the README, from a committed results file: what the reader sees is what was measured."""
    data = json.loads(results.read_text())
    rows: dict[tuple, dict] = {}
    for row in data["rows"]:
        key = row["case"].partition("/")[2], "×".join(map(str, row["shape"])), row["dtype"], row["direction"]
        rows.setdefault(key, {})[row["provider"]] = row
    present = {provider for found in rows.values() for provider in found}
    peers = [name for name in PEERS if name in present]
    shapes = {shape for _, shape, *_ in rows}
    lines = []
    for (variant, shape, dtype, direction), found in rows.items():
        what = ", ".join([variant, *([shape] if len(shapes) > 1 else []), dtype, direction])
        lines.append((what, *_cells(found, "one pass" in present), *(_time(found.get(peer)) for peer in peers)))
    passes = ("passes",) if "one pass" in present else ()
    header = ("ms, median", "eager", "compiled", "genkernels", "× eager", "× compiled", "of peak", *passes, *peers)
    return _conditions(results, data, shapes) + table(lines, header)


PEERS = ("nflows", "normflows", "FrEIA", "zuko")


#: For results files that say so: the instructions that a CPU has, in words.
INSTRUCTIONS = {"avx512": " with AVX-512", "avx2": " with AVX2"}


def summary(files: list[Path]) -> str:
    """A line an operator: how its rows on another machine compare, the slowest and the fastest of them named by their
    ratios."""
    lines, machines = [], []
    for results in files:
        data = json.loads(results.read_text())
        rows: dict[tuple, dict] = {}
        for row in data["rows"]:
            rows.setdefault((row["case"], *row["shape"], row["dtype"], row["direction"]), {})[row["provider"]] = row
        name = data["rows"][0]["case"].partition("/")[0]
        cells = [f"[{name}](benchmarks/results/{results.name})", f"{len(rows)}"]
        for baseline in ("reference", "compiled"):
            found = [row for row in rows.values() if baseline in row and row[baseline]["median_s"]]
            ratios = sorted(row[baseline]["median_s"] / row["cpu"]["median_s"] for row in found)
            middle = (ratios[(len(ratios) - 1) // 2] + ratios[len(ratios) // 2]) / 2
            cells.append(" · ".join(_ratio(ratio) for ratio in (ratios[0], middle, ratios[-1])))
        lines.append(tuple(cells))
        machine = data["machine"]
        machines.append(
            f"{_device(machine)}, torch {machine['versions']['torch']}, {machine['date'][:10]}, commit "
            f"{machine['commit']}"
        )
    return (
        f"#### On a processor with AVX2 alone\n\nThe same commands, {'; '.join(dict.fromkeys(machines))}: "
        "lowest, middle and highest ratio.\n\n" + table(lines, ("operator", "rows", "× eager", "× compiled"))
    )


def _device(machine: dict) -> str:
    return f"{machine['threads']} threads of {machine['device']}{INSTRUCTIONS.get(machine.get('cpu_variant'), '')}"


def _time(row: dict | None) -> str:
    if row is None:
        return ""
    if row["gate"] == "fail":
        return "wrong"
    milliseconds = row["median_s"] * 1e3
    return f"{milliseconds:,.{2 if milliseconds < 100 else 0}f}"


def _cells(found: dict, with_passes: bool) -> list[str]:
    ours, eager, compiled = found["cpu"], found["reference"], found.get("compiled")
    ratios = ["" if row is None else _ratio(row["median_s"] / ours["median_s"]) for row in (eager, compiled)]
    cells = [_time(eager), _time(compiled), f"**{_time(ours)}**", *ratios]
    cells.append("" if ours["share_of_peak"] is None else f"{100 * ours['share_of_peak']:.0f} %")
    if with_passes:
        unit = found.get("one pass")
        cells.append("" if unit is None else f"{ours['median_s'] / unit['median_s']:.1f}")
    return cells


def _ratio(value: float) -> str:
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _conditions(results: Path, data: dict, shapes: set[str]) -> str:
    machine = data["machine"]
    name = data["rows"][0]["case"].partition("/")[0]
    shape = f"{next(iter(shapes))}, " if len(shapes) == 1 else ""
    product = machine["product_flops_per_s"].get("float32", 0) / 1e9
    return (
        f"#### {name}\n\n`genkernels bench {name}`, {shape}{_device(machine)}, torch "
        f"{machine['versions']['torch']}, {machine['date'][:10]}, commit {machine['commit']}; in the same run copy "
        f"{machine['copy_bytes_per_s'] / 1e9:.1f} GB/s, fp32 product {product:.0f} Gflop/s "
        f"([`{results.name}`](benchmarks/results/{results.name})).\n\n"
    )


def readme() -> str:
    from genkernels.ops import OPERATORS

    text = (ROOT / "README.md").read_text()
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    files = [ROOT / f"benchmarks/results/{name}-cpu.json" for name in OPERATORS]
    tables = "\n".join(measured(file) for file in files if file.exists())
    others = [
        file for file in (ROOT / f"benchmarks/results/{name}-cpu-avx2.json" for name in OPERATORS) if file.exists()
    ]
    if others:
        tables += "\n" + summary(others)
    return before + BEGIN + "\n" + tables + END + after


def pages() -> dict[str, str]:
    from genkernels.ops import OPERATORS

    built = {name: operator_page(operator) for name, operator in OPERATORS.items()}
    built |= {name: page(*what) for name, what in PAGES.items()}
    return {name: text.rstrip() + "\n" for name, text in built.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page is out of date")
    check = parser.parse_args().check
    stale = []
    files = {ROOT / "docs" / f"{name}.md": text for name, text in pages().items()}
    for path, text in {**files, ROOT / "README.md": readme()}.items():
        if check:
            if not path.exists() or path.read_text() != text:
                stale.append(str(path.relative_to(ROOT)))
        else:
            path.write_text(text)
    if stale:
        print(f"{', '.join(stale)}: not what the docstrings say now; run python tools/build_docs.py")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
