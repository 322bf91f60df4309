"""``genkernels figure``."""

from __future__ import annotations

from pathlib import Path

from genkernels._files import refuse_unwritable
from genkernels._words import UsageError, nearest
from genkernels.cli.arguments import Parser


def run(arguments) -> int:
    from genkernels import figures

    if arguments.name is None:
        width = max(map(len, figures.names()))
        for name in figures.names():
            print(f"{name:<{width}}  {figures.find(name).TITLE}")
        return 0
    figure = figures.find(arguments.name)
    options = _options(arguments.name, figure, arguments.options)
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


def _options(name: str, figure, given: list[str]):
    """A figure's own options, beside ``--out``."""
    parser = Parser(prog=f"genkernels figure {name}", description=f"{figure.TITLE}.")
    figure.add_arguments(parser)
    parser.add_argument("--out", default=f"{name}.png", metavar="F.png", help=f"where to (default: {name}.png)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options, unknown = parser.parse_known_args(given)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        first = unknown[0].split("=")[0]
        hint = nearest(first, known, listed=True) or f"; genkernels figure {name} --help lists them"
        raise UsageError(f"figure {name}: unknown argument {first!r}{hint}")
    return options
