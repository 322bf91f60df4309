"""``genkernels info``: which backends run here, and why the others do not."""

from __future__ import annotations

import importlib.util
import platform

#: What training, data and pictures need beside torch: by module, the package.
_EXTRAS = {"lightning": "lightning", "tensorboard": "tensorboard", "rich": "rich", "matplotlib": "matplotlib"}
_EXTRAS |= {"PIL": "pillow", "sklearn": "scikit-learn", "datasets": "datasets"}


def run(arguments) -> int:
    import torch

    from genkernels import backends
    from genkernels._machine import cpu_text
    from genkernels._version import __version__

    print(f"genkernels {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(cpu_text().replace("CPU,", "CPU:"))
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(i)
            memory = facts.total_memory / 2**30
            print(f"GPU {i}: {facts.name}, {memory:.0f} GiB, compute capability {facts.major}.{facts.minor}")
    else:
        print(f"GPU: none ({backends.why_missing('triton')})")
    print(f"backend in force: {backends.current_backend()}")
    facts = backends.built()
    for kind in ("cpu", "cuda"):
        if kind in facts:
            by, source = facts[kind]["compiler"], facts["commit"] or "sources without a commit"
            print(f"{kind.upper()} library: built by {by} for torch {facts['torch']} from {source}")
    print()
    if missing := [package for module, package in _EXTRAS.items() if importlib.util.find_spec(module) is None]:
        print(f"not installed: {', '.join(missing)} (pip install 'genkernels[train]')\n")
    rows = backends.describe()
    print(table(["backend", "runs", ""], [[row["backend"], row["runs"], row["why"]] for row in rows]))
    if arguments.ops:
        print()
        _operators()
    return 0


def _operators() -> None:
    from genkernels import backends
    from genkernels.ops import FEATURES, OPERATORS

    devices = [name for name in ("cpu", "cuda") if name == "cpu" or not backends.why_missing("triton")]
    rows = []
    for operator in OPERATORS.values():
        for name in backends.NAMES[1:]:
            reason = "" if name == "reference" else operator.kernels[name] or backends.why_missing(name) or ""
            chosen = [d for d in devices if _chosen(operator, d) == name]
            runs = f"on {' and '.join(d.upper() for d in chosen)}" if chosen else "no" if reason else "on request"
            note = "" if name == "reference" else operator.left_to_reference(name)
            rows.append(
                [operator.name if name == "reference" else "", name, runs, "; ".join(filter(None, (reason, note)))]
            )
    print(table(["operator", "backend", "runs", "why not"], rows))
    print()
    marks = [[operator.name, *(operator.composability.get(f, "") for f in FEATURES)] for operator in OPERATORS.values()]
    print(table(["operator", *FEATURES], marks))


def _chosen(operator, device: str) -> str:
    from genkernels import backends

    try:
        return operator.backend_on(device)
    except backends.BackendUnavailable:
        return ""


def table(head: list[str], rows: list[list[str]]) -> str:
    """Columns as wide as their widest cell, two spaces apart; the last is not padded."""
    widths = [max(len(str(row[i])) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [head, *rows]
    ]
    return "\n".join(lines)
