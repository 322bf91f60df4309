"""``genkernels figure``."""

from __future__ import annotations

from pathlib import Path

from genkernels._files import refuse_unwritable
from genkernels._words import UsageError
from genkernels.cli.rooms import own_options, show


def run(arguments) -> int:
    from genkernels import figures

    if arguments.name is None:
        return show(figures)
    figure = figures.find(arguments.name)
    options = own_options("figure", arguments.name, figure, arguments.options)
    out = Path(options.out).expanduser()
    endings = (".png", ".pdf", ".svg")
    if out.suffix.lower() not in endings:
        raise UsageError(f"--out must end in {', '.join(endings)}, got {options.out!r}")
    refuse_unwritable(out)
    from genkernels import pictures

    if missing := pictures.why_not(points=True):
        raise UsageError(f"figure {arguments.name}: {missing}")
    pictures.save(out, figure.draw(options))
    print(out)
    return 0
