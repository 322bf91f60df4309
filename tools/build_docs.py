"""Writes docs/ and the README's tables: a page an operator, a family of models, a room, and what was measured.

python tools/build_docs.py          writes the pages
python tools/build_docs.py --check  fails where a page is not what the docstrings and the results files say now

A page that begins with `MARK` is written here, and removed when nothing asks for it any more. The others in docs/ are
written by hand: they are left alone but for blocks that say what was measured, and the index links them.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable
from pathlib import Path

import _speed
from _markdown import docstring, inline, parameters_of, signature, table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

MARK = "<!-- Written by tools/build_docs.py from the docstrings. -->"

#: What the page of networks tells of, but for two tables.
NETWORKS = ("trace", "traced", "Untraceable", "couples_samples", "Step", "chain", "Link", "is_piecewise_linear") + (
    "penalised",
    "Penalised",
    "forward",
    "linearize",
    "Linearization",
    "parameters",
    "pullback",
    "pushforward",
    "curvatures",
)

#: page: (title, the module whose docstring opens it, the module that lists the names, names or None for __all__).
#: Operators and families of models are found; a family's page is named as its folder.
ROOMS = {
    "models": (
        "Models",
        "genkernels.models",
        "genkernels.models",
        ("Model", "LikelihoodModel", "Player", "Estimate", "build"),
    ),
    "layers": ("Layers", "genkernels.nn", "genkernels.nn", None),
    "losses": ("Losses", "genkernels.losses", "genkernels.losses", None),
    "swap": ("Models of other libraries", "genkernels.swap", "genkernels.swap", None),
    "testing": (
        "Checks of your own networks",
        "genkernels.testing",
        "genkernels.testing",
        ("check_penalty", "PenaltyCheck"),
    ),
    "networks": ("Networks as data", "genkernels.networks", "genkernels.networks", NETWORKS),
    "data": ("Data", "genkernels.data", "genkernels.data", ("load", "DataBundle", "Form", "DataError")),
    "metrics": ("Metrics", "genkernels.metrics", "genkernels.metrics", None),
    "training": (
        "Training",
        "genkernels.training",
        "genkernels.training",
        ("fit", "TrainConfig", "Result", "load_model"),
    ),
    "pictures": ("Pictures, figures and tables", "genkernels.pictures", "genkernels.pictures", None),
}

#: Where the page of other libraries lists those of each.
SWAP_PAGES_AFTER = "What is swapped:"
#: Pages by hand, one a library: the words with which the cases of ``genkernels bench swap`` begin that it shows.
SWAP_PAGES = {
    "swap-nflows": ("nflows",),
    "swap-normflows": ("normflows",),
    "swap-zuko": ("zuko",),
    "swap-freia": ("FrEIA",),
    "swap-pixelcnns": ("pytorch-generative", "pythae"),
    "swap-torch": ("torch",),
}

#: Pages that tell of a base class say what its models have in common.
BASES = ("Model", "LikelihoodModel", "FlowModel", "PixelModel", "AdversarialModel", "VariationalModel")

FAMILIES = {
    "flows": "Normalizing flows",
    "autoregressive": "Autoregressive models",
    "gan": "Generative adversarial networks",
    "vae": "Variational autoencoders",
}


# --- entries and pages --------------------------------------------------------------------------------------------


def entry(name: str, thing, level: int = 2) -> list[str]:
    """One function or class: its heading, how it is called, what it says."""
    text = [f"{'#' * level} `{name}`", signature(name.rpartition(".")[2] if level > 2 else name, thing)]
    return [*text, docstring(thing.__doc__, parameters_of(thing))]


def methods(name: str, kind: type) -> list[str]:
    """What a base class adds: its own public methods, in the order of the file."""
    found = []
    for key, value in vars(kind).items():
        function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        if not key.startswith("_") and inspect.isfunction(function) and function.__doc__:
            found += entry(f"{name}.{key}", getattr(kind, key), level=3)
    return found


def join(parts: list[str]) -> str:
    return "\n\n".join(part for part in [MARK, *parts] if part).rstrip() + "\n"


def operator_page(operator) -> str:
    reference = importlib.import_module(f"genkernels.reference.{operator.name}")
    parts = [f"# {operator.name}", docstring(reference.__doc__)]
    for thing in (*operator.functions, *operator.types):
        parts += entry(f"genkernels.ops.{thing.__name__}", thing)
    floors = {
        "reference": f"genkernels/reference/{operator.name}.py",
        "cpu": f"csrc/cpu/{operator.name}.cpp",
        "triton": f"genkernels/triton/{operator.name}.py",
        "cuda": f"csrc/cuda/{operator.name}.cu",
    }
    kernels = operator.kernels
    rows = [(name, inline(kernels.get(name, "")) or f"[`{file}`](../{file})") for name, file in floors.items()]
    parts += ["## Backends", table(rows, ("backend", "where")), *exceptions(operator, kernels)]
    composability = (
        "What runs under each of torch's features: the kernel, the plain PyTorch reference, or an error. `(eager)`: "
        'inside `torch.compile(…, backend="eager")`; with other backends torch itself raises. `not tried`: it takes a '
        "GPU, and none has been at hand."
    )
    parts += ["## Composability", composability, table(list(operator.composability.items()), ("feature", "runs"))]
    if _speed.operator_files(operator.name):
        parts.append(f"How fast it is: [speed](speed.md#{operator.name}).")
    return join(parts)


def exceptions(operator, kernels: dict[str, str]) -> list[str]:
    """The torch operators that have not the kernels that the others have, and why: a line a reason."""
    groups: dict[str, tuple[dict, dict]] = {}
    for name, torch_op in operator.torch_ops.items():
        for backend, reason in (getattr(torch_op, "kernels", None) or {}).items():
            if bool(reason) != bool(kernels.get(backend)):
                names, places = groups.setdefault(reason or "a kernel", ({}, {}))
                names[f"`{name}`"] = places[backend] = None
    rows = [(", ".join(names), ", ".join(places), inline(reason)) for reason, (names, places) in groups.items()]
    return ["But for:", table(rows, ("torch operator", "backend", "where"))] if rows else []


def room_page(title: str, opening: str, module_name: str, names) -> str:
    module = importlib.import_module(module_name)
    parts = [f"# {title}", docstring(importlib.import_module(opening).__doc__)]
    for name in names or module.__all__:
        thing = getattr(module, name)
        parts += entry(f"{module_name}.{name}", thing)
        if name in BASES:
            parts += methods(name, thing)
    return join(parts)


def families() -> dict[str, tuple]:
    """A page for each folder of genkernels/models: what its models share, then its models in the registry's order."""
    from genkernels import models

    found = {}
    for package in pkgutil.iter_modules(models.__path__):
        if package.ispkg:
            module = f"genkernels.models.{package.name}"
            names = [kind.__name__ for kind in models.MODELS.values() if kind.__module__.startswith(module)]
            bases = [name for name in BASES if getattr(models, name).__module__.startswith(module)]
            title = FAMILIES.get(package.name, package.name)
            found[package.name] = (title, module, "genkernels.models", (*bases, *names))
    return found


def data_page() -> str:
    from genkernels.data import folder, hub, images, npz

    parts = [room_page(*ROOMS["data"]).rstrip(), "## Your own data"]
    for name, module in (("folder:", folder), ("npz:", npz), ("hf:", hub), ("pictures", images)):
        parts += [f"### `{name}`" if ":" in name else f"### {name.capitalize()}", docstring(module.__doc__)]
    return "\n\n".join(parts) + "\n"


def pictures_page() -> str:
    from genkernels import figures, tables

    listed = []
    for title, command, room in (("Figures", "figure", figures), ("Tables", "table", tables)):
        rows = [(f"`genkernels {command} {name}`", inline(room.find(name).TITLE)) for name in room.names()]
        listed += [f"## {title}", docstring(room.__doc__), table(rows, ("command", "shows"))]
    for name in tables.names():
        file = f"../benchmarks/results/{name}"
        if (ROOT / "docs" / f"{file}.csv").exists():
            listed.append(f"`genkernels table {name}` as it was run last ([{name}.csv]({file}.csv)):")
            listed.append(f"![{tables.find(name).TITLE}]({file}.png)")
    return room_page(*ROOMS["pictures"]).rstrip() + "\n\n" + "\n\n".join(listed) + "\n"


def swap_page() -> str:
    opening, rest = room_page(*ROOMS["swap"]).split(f"\n\n{SWAP_PAGES_AFTER}", 1)
    lines = [line(name, (ROOT / "docs" / f"{name}.md").read_text()) for name in SWAP_PAGES]
    return f"{opening}\n\n" + "\n".join(lines) + f"\n\n{SWAP_PAGES_AFTER}{rest}"


def networks_page() -> str:
    from genkernels import networks
    from genkernels.networks import activations

    rows = [
        (row.kind, ", ".join(row.layers), ", ".join(f"`{name}`" for name in row.functions), inline(row.condition))
        for row in networks.SUPPORTED
    ]
    listed = ["## Supported layers", "As `print(genkernels.networks.SUPPORTED)` shows them."]
    listed.append(table(rows, ("kind", "layers", "functions", "where")))
    listed += ["## Activations", docstring(activations.__doc__)]
    return room_page(*ROOMS["networks"]).rstrip() + "\n\n" + "\n\n".join(listed) + "\n"


def line(name: str, text: str) -> str:
    """A page in a list of pages: its title and its first paragraph."""
    body = [part for part in text.replace(MARK, "").strip().split("\n\n") if not part.startswith(("#", "<!--"))]
    title = re.search(r"^# (.*)$", text, flags=re.M).group(1)
    about = body[0] if len(body[0]) < 200 else re.split(r"(?<=\.) ", body[0])[0]
    return f"- [{title}]({name}.md): {about}"


def index(built: dict[str, str]) -> str:
    """docs/README.md: every page by what it is about, in the order in which one would read them."""
    from genkernels.ops import OPERATORS

    def group(names) -> str:
        return "\n".join(line(name, built[name]) for name in names)

    others = [path for path in sorted((ROOT / "docs").glob("*.md")) if path.stem not in (*built, "README")]
    by_hand = {path.stem: path.read_text() for path in others if is_by_hand(path)}
    parts = [
        "# genkernels: the pages",
        "From the docstrings, so that they say what the code says; what was measured comes from the results files.",
        "## Using it",
        group([*ROOMS, "speed"]),
        "## Models of other libraries",
        "\n".join(line(name, by_hand.pop(name)) for name in SWAP_PAGES),
        "## Families of models",
        group(families()),
        "## Hot paths",
        "The definition of each operator, its arguments and gradients, and where its kernels are.",
        group(OPERATORS),
    ]
    if by_hand:
        parts += ["## Working on it", "\n".join(line(name, text) for name, text in by_hand.items())]
    return join(parts)


def is_by_hand(path: Path) -> bool:
    return path.exists() and not path.read_text().startswith(MARK)


def pages() -> dict[str, str]:
    from genkernels.ops import OPERATORS

    built = {name: operator_page(operator) for name, operator in OPERATORS.items()}
    built |= {name: room_page(*what) for name, what in {**families(), **ROOMS}.items()}
    built |= {"data": data_page(), "pictures": pictures_page(), "networks": networks_page(), "swap": swap_page()}
    built |= {"speed": f"{MARK}\n\n{_speed.page()}"}
    return {**built, "README": index(built)}


# --- pages by hand with derived blocks, the README among them -----------------------------------------------------


def names_text() -> str:
    """What can be trained on what, as the registries have it."""
    from genkernels import data, models

    def listed(names) -> str:
        return ", ".join(f"`{name}`" for name in names)

    lines = []
    for title, module, _, _ in families().values():
        kinds = {name: kind for name, kind in models.MODELS.items() if kind.__module__.startswith(module)}
        presets = dict.fromkeys(preset for kind in kinds.values() for preset in kind.presets if "-" not in preset)
        lines.append(f"{title}: {listed(kinds)} (presets {listed(presets)}).")
    shipped, own = ([name for name in data.NAMES if (":" in name) == by_place] for by_place in (False, True))
    return "\n".join([*lines, f"Data: {listed(shipped)}, and your own: {listed(own)}."])


BLOCKS = {
    "names": names_text,
    "rows": _speed.chosen_rows,
    "steps": _speed.training_steps,
    "likelihoods": _speed.likelihoods,
    "demo": _speed.demo,
}


def filled(path: Path, blocks: dict[str, Callable[[], str]]) -> str:
    """A page written by hand with its derived blocks as they are now."""
    text = path.read_text()
    for name, build in blocks.items():
        begin, end = f"<!-- {name}: by tools/build_docs.py -->", f"<!-- end of {name} -->"
        if begin not in text or end not in text:
            raise SystemExit(f"{path.name} must hold the lines {begin} and {end}")
        before, rest = text.split(begin, 1)
        text = f"{before}{begin}\n{build()}\n{end}{rest.split(end, 1)[1]}"
    return text


def derived_blocks() -> dict[Path, str]:
    """The README and the pages of other libraries."""
    found = {ROOT / "README.md": filled(ROOT / "README.md", BLOCKS)}
    for name, libraries in SWAP_PAGES.items():
        path = ROOT / "docs" / f"{name}.md"
        found[path] = filled(path, {"measured": functools.partial(_speed.swaps, "../", libraries)})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page is out of date")
    check = parser.parse_args().check
    wanted = {ROOT / "docs" / f"{name}.md": text for name, text in pages().items()} | derived_blocks()
    left_over = [path for path in (ROOT / "docs").glob("*.md") if path not in wanted and not is_by_hand(path)]
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text] + left_over
    if check and stale:
        names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
        print(f"{names}: not what the code says now; run python tools/build_docs.py")
    elif not check:
        for path in left_over:
            path.unlink()
        for path, text in wanted.items():
            path.write_text(text)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
