"""``genkernels data [SPEC]``: what is understood of a data set, before anything is trained on it."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

from genkernels._files import refuse_unwritable
from genkernels._words import UsageError, notice

SHOWN = 16


def rules() -> str:
    """The rules of a user's own data, from the heads of the loaders' files, which need not be imported for it."""
    folder = Path(__file__).parents[1] / "data"
    parts = []
    for name, title in (("folder", "folder:"), ("npz", "npz:"), ("hub", "hf:"), ("images", "pictures of all three")):
        text = ast.get_docstring(ast.parse((folder / f"{name}.py").read_text())) or ""
        text = re.sub(r"^(=+  =+)\n(.*?)^=+  =+$", _laid_out, text, flags=re.S | re.M)
        parts.append(f"{title}\n{textwrap.indent(_plain(text), '  ')}")
    return "\n\n".join(parts)


def _plain(text: str) -> str:
    """Without the marks of names and of emphasis."""
    for old, new in ((r"``(.*?)``", r"\1"), (r"`([^`]*?)`", r"\1"), (r"\*\*(.*?)\*\*", r"\1")):
        text = re.sub(old, new, text, flags=re.S)
    return text


def _laid_out(found: re.Match) -> str:
    """A table of two columns without its rules, as wide as it is without marks."""
    second = found[1].rindex("  ") + 2
    rows = [(_plain(line[:second]).rstrip(), _plain(line[second:])) for line in found[2].splitlines()]
    width = max(len(first) for first, _ in rows)
    return "\n".join(f"  {first:<{width}}  {text}" for first, text in rows)


def run(arguments) -> int:
    from genkernels import data
    from genkernels.cli.load import load_data
    from genkernels.cli.train import as_name, data_root

    if arguments.spec is None:
        width = max(map(len, data.NAMES))
        for name, text in data.NAMES.items():
            print(f"{name:<{width}}  {text}")
        return 0
    out = Path(arguments.out or f"data-{as_name(arguments.spec)}.png").expanduser()
    if out.suffix.lower() != ".png":
        raise UsageError(f"--out must end in .png, got {str(out)!r}")
    refuse_unwritable(out)
    bundle = load_data(arguments.spec, data_root(arguments.spec, arguments.data_root))
    form = bundle.form
    print(f"{bundle.name}: {bundle.description}")
    shape = "x".join(map(str, form.shape))
    print(f"an example: {shape}" + (f", {form.grey_levels} grey levels" if form.is_image else ", real numbers"))
    if form.domains > 1:
        print(f"domains: {form.domains}, one behind the other along the channels")
    if bundle.classes:
        print(_counts(bundle))
    for note in bundle.notes:
        print(f"note: {note}")
    _draw(bundle, out)
    return 0


def _counts(bundle) -> str:
    from genkernels.cli.info import table

    columns = [_labels(part) for part in (bundle.train, bundle.test)]
    rows = [
        [name, *(f"{int((y == i).sum()):,}" if y is not None else "" for y in columns)]
        for i, name in enumerate(bundle.classes)
    ]
    return table(["class", "to train on", "held out"], rows)


def _labels(part):
    """The labels of all examples where they can be had without reading these, else None."""
    tensors = getattr(part, "tensors", None)
    return tensors[1] if tensors is not None else getattr(part, "labels", None)


def _draw(bundle, out: Path) -> None:
    from genkernels.pictures import blocks, save, scatter, why_not

    if missing := why_not(points=not bundle.form.is_image):
        return notice(f"no pictures of them: {missing}")
    facts = {"data": bundle.name, "shows": bundle.description}
    parts = {"to train on": bundle.train, "held out": bundle.test}
    if bundle.form.is_image:
        taken = {"to train on": bundle.take("train", SHOWN // 2)[0], "held out": bundle.take("test", SHOWN // 2)[0]}
        channels = 1 if bundle.form.shape[0] not in (1, 3) else bundle.form.shape[0]
        if bundle.form.domains > 1 and bundle.form.shape[0] // bundle.form.domains in (1, 3):
            channels = bundle.form.shape[0] // bundle.form.domains
        taken = {name: (x / (bundle.form.grey_levels - 1)).unflatten(1, (-1, channels)) for name, x in taken.items()}
        columns = 4 * next(iter(taken.values())).shape[1]
        page = blocks({name: (x.flatten(0, 1), columns) for name, x in taken.items()}, title=bundle.name)
    else:
        taken = {name: bundle.take(split, 2000)[0] for name, split in zip(parts, ("train", "test"), strict=True)}
        page = scatter(taken, title=bundle.name)
    save(out, page, facts)
    print(f"{out}: {'pictures' if bundle.form.is_image else 'points'} of both parts")
