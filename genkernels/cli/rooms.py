"""What ``genkernels figure`` and ``genkernels table`` share: the list of a room, and options that each entry has of its
own."""

from __future__ import annotations

from genkernels._words import UsageError, nearest
from genkernels.cli.arguments import Parser

#: command: the ending of its file.
ENDINGS = {"figure": "png", "table": "csv"}


def show(room) -> int:
    """Lists the entries of a room, a line each."""
    width = max(map(len, room.names()))
    for name in room.names():
        print(f"{name:<{width}}  {room.find(name).TITLE}")
    return 0


def own_options(command: str, name: str, entry, given: list[str]):
    """An entry's own options, beside ``--out``."""
    parser = Parser(prog=f"genkernels {command} {name}", description=f"{entry.TITLE}.")
    entry.add_arguments(parser)
    ending = ENDINGS[command]
    where = f"{name}.{ending}"
    more = "; its picture beside it, as .png" if command == "table" else ""
    parser.add_argument("--out", default=where, metavar=f"F.{ending}", help=f"where to{more} (default: {where})")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options, unknown = parser.parse_known_args(given)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        first = unknown[0].split("=")[0]
        hint = nearest(first, known, listed=True) or f"; genkernels {command} {name} --help lists them"
        raise UsageError(f"{command} {name}: unknown argument {first!r}{hint}")
    return options
