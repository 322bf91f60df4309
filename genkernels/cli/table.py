"""``genkernels table``."""

from __future__ import annotations

from pathlib import Path

from genkernels._files import refuse_unwritable
from genkernels._words import UsageError
from genkernels.cli.rooms import own_options, show


def run(arguments) -> int:
    from genkernels import tables

    if arguments.name is None:
        return show(tables)
    table = tables.find(arguments.name)
    options = own_options("table", arguments.name, table, arguments.options)
    out = Path(options.out).expanduser()
    if out.suffix.lower() != ".csv":
        raise UsageError(f"--out must end in .csv (the picture goes beside it), got {options.out!r}")
    picture = out.with_suffix(".png")
    for path in (out, picture):
        refuse_unwritable(path)
    from genkernels import pictures

    if missing := pictures.why_not(points=True):
        raise UsageError(f"table {arguments.name}: {missing}")
    tables.save(out, table.make(options))
    print(out)
    print(picture)
    return 0
