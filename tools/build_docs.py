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
    "flows": ("Normalizing flows", "genkernels.models", "genkernels.models", ("NICE", "RealNVP", "Glow", "build")),
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
    parts += [entry(f"genkernels.ops.{f.__name__}", f) for f in operator.functions]
    floors = {
        "reference": f"genkernels/reference/{operator.name}.py",
        "cpu": f"csrc/cpu/{operator.name}.cpp",
        "triton": f"genkernels/triton/{operator.name}.py",
        "cuda": f"csrc/cuda/{operator.name}.cu",
    }
    rows = [(name, operator.backends.get(name) or f"`{file}`") for name, file in floors.items()]
    parts.append("## Backends\n\n" + table(rows, ("backend", "where")))
    parts.append(
        "## Composability\n\n"
        + "What runs under each of torch's features: the kernel, the plain PyTorch reference (right, but slower), or an error.\n\n"
        + table(list(operator.composability.items()), ("feature", "runs"))
    )
    return "\n".join(parts)


def page(title: str, opening: str, module_name: str, names) -> str:
    module = importlib.import_module(module_name)
    names = names or module.__all__
    parts = [f"# {title}\n\n{inspect.cleandoc(importlib.import_module(opening).__doc__ or '')}\n"]
    return "\n".join(parts + [entry(f"{module_name}.{name}", getattr(module, name)) for name in names])


def measured(results: Path) -> str:
    """The README's table, from a committed results file: what the reader sees is what was measured."""
    data = json.loads(results.read_text())
    machine = data["machine"]
    rows: dict[tuple, dict] = {}
    for row in data["rows"]:
        rows.setdefault((row["case"], row["dtype"], row["direction"]), {})[row["provider"]] = row
    peers = ("nflows", "normflows", "FrEIA")
    lines = []
    for (case, dtype, direction), found in rows.items():
        reference, ours = found["reference"]["median_s"], found["cpu"]["median_s"]
        cells = [f"{case.split('/', 1)[1]}, {dtype}, {direction}", f"{reference * 1e3:.2f}"]
        compiled = found["compiled"]["median_s"]
        cells += [f"{compiled * 1e3:.2f}", f"**{ours * 1e3:.2f}**", f"{reference / ours:.2f}", f"{compiled / ours:.2f}"]
        cells.append(f"{100 * found['cpu']['share_of_peak']:.0f} %")
        for peer in peers:
            row = found.get(peer)
            cells.append("" if row is None else "wrong" if row["gate"] == "fail" else f"{row['median_s'] * 1e3:.2f}")
        lines.append(tuple(cells))
    header = ("ms, median", "eager", "compiled", "genkernels", "× eager", "× compiled", "of copy", *peers)
    shape = "×".join(str(n) for n in data["rows"][0]["shape"])
    versions = machine["versions"]
    return (
        f"`genkernels bench affine_coupling`, x {shape}, {machine['threads']} threads of {machine['device']}, torch {versions['torch']}, "
        f"{machine['date'][:10]}, commit {machine['commit']}; copy {machine['copy_bytes_per_s'] / 1e9:.1f} GB/s in the same run "
        f"([`{results.name}`](benchmarks/results/{results.name})). Each provider passed a gate against the fp64 reference first; "
        "'wrong' means that it did not pass. Inputs rotate beyond the last-level cache.\n\n" + table(lines, header)
    )


def readme() -> str:
    text = (ROOT / "README.md").read_text()
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    return before + BEGIN + "\n" + measured(ROOT / "benchmarks/results/affine_coupling-cpu.json") + END + after


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
