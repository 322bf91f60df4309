"""Every command's arguments. Imports nothing of torch: ``--help`` answers at once."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
from collections.abc import Callable

from genkernels._config import TrainConfig
from genkernels._words import nearest
from genkernels.models._registry import MODELS

SUPPRESS = argparse.SUPPRESS  # settings that were not given do not appear: a resume keeps what it was begun with

_EPILOG = """\
examples:
  genkernels data folder:~/pictures
  genkernels train glow --data digits --max-steps 2000
  genkernels train --out runs/glow-digits --resume
  genkernels sample runs/glow-digits --n 64 --temperature 0.7
  genkernels sample runs/gatedpixelcnn-digits --inpaint top-half
  genkernels eval runs/glow-digits
  genkernels info --ops
"""


#: What argparse says, and what must hold in its stead.
_WORDS = (
    (r"^argument (\S+): invalid int value: (.*)", r"\1 must be a whole number, got \2"),
    (r"^argument (\S+): invalid float value: (.*)", r"\1 must be a number, got \2"),
    (r"^argument (\S+): invalid choice: (.*?) \(choose from (.*)\)$", r"\1 must be one of \3, got \2"),
    (r"^argument (?:\S+/)?(\S+): ignored explicit argument (.*)", r"\1 takes no value, got \2"),
    (r"^argument (\S+): expected one argument$", r"\1 must be given a value, got none"),
    (r"^argument (\S+): expected 2 arguments$", r"\1 must be given 2 values, got others"),
    (r"^the following arguments are required: ([^,]*)(?:, line)?$", r"\1 must be given, got nothing"),
)


class Parser(argparse.ArgumentParser):
    """argparse with errors of one sentence that name the nearest option."""

    def __init__(self, **options) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)
        self.rules: Callable[[], str] | None = None  # what stands at the end of a help that is asked for

    def format_help(self) -> str:
        if self.rules is not None:
            self.epilog = self.rules()
        return super().format_help()

    def error(self, message: str):
        for found, words in _WORDS:
            message = re.sub(found, words, message)
        print(f"genkernels: error: {message}", file=sys.stderr)
        raise SystemExit(2)


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments of one command; ``.module`` names its module in this package.

    Raises:
        SystemExit: after ``--help``, ``--version`` and errors.
    """
    parser, commands = parsers()
    if argv[:1] == ["help"]:
        argv = [*argv[1:2], "--help"]
    command = next((a for a in argv if not a.startswith("-")), None)
    if command is not None and command not in commands:
        parser.error(f"unknown command {command!r}{nearest(command, commands)}")
    arguments, unknown = parser.parse_known_args(argv)
    if arguments.module is None and not unknown:
        parser.print_help()
        raise SystemExit(0)
    if unknown:
        asked = commands.get(arguments.command, parser)
        known = [option for action in asked._actions for option in action.option_strings]
        first = unknown[0].split("=")[0]
        hint = nearest(first, known, listed=True) if first.startswith("-") else ""
        words = hint or f"; {asked.prog} --help lists them"
        parser.error(f"{arguments.command + ': ' if arguments.command else ''}unknown argument {first!r}{words}")
    for action in commands[arguments.command]._actions if arguments.command != "completion" else ():
        given = getattr(arguments, action.dest, None)
        if given == "" or (isinstance(given, list) and "" in given):
            parser.error(f"{(action.option_strings or [action.metavar])[-1]} must be given a value, got ''")
    return arguments


def parsers() -> tuple[Parser, dict[str, Parser]]:
    """The parser of the command line, and that of each command by its name."""
    parser = Parser(
        prog="genkernels", description="Fast kernels, layers and models for deep generative modelling.", epilog=_EPILOG
    )
    parser.set_defaults(module=None)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and leave")
    group = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    parsers = {}
    for name, module, add, text in (
        ("info", "info", _info, "which backends run here, and why the others do not"),
        ("train", "train", _train, "train a model; stop with Ctrl-C and go on with --resume"),
        ("sample", "sample", _sample, "draw samples from a trained model"),
        ("eval", "evaluate", _evaluate, "held-out figures of merit of a trained model"),
        ("models", "models", _models, "the models; of one its arguments, their defaults and its presets"),
        ("data", "data", _data, "what is understood of a data set, and pictures of it; without SPEC, list them"),
        ("runs", "runs", _runs, "the runs below a folder, beside each other"),
        ("bench", "bench", _bench, "speed of the operators against PyTorch and other libraries"),
        ("swap", "swap", _swap, "what swap_ makes of a model of another library, and how much faster it is"),
        ("figure", "figure", _figure, "draw a figure; without a name, list them"),
        ("table", "table", _table, "train and compare: a table as CSV and picture; without a name, list them"),
        ("completion", "completion", _completion, "what a shell runs so that it completes commands and names"),
    ):
        parsers[name] = sub = group.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(module=module)
        add(sub)
        sub.add_argument(
            "--debug", action="store_true", help="show the traceback of an error (also: GENKERNELS_DEBUG=1)"
        )
    return parser, parsers


class _Version(argparse.Action):
    def __call__(self, parser, *_):
        from genkernels._version import __version__

        print(f"genkernels {__version__}")
        parser.exit()


def _info(sub: Parser) -> None:
    sub.add_argument(
        "--ops", action="store_true", help="also each operator: which backend runs it, and what it supports"
    )


def _train(sub: Parser) -> None:
    sub.usage = (
        "genkernels train MODEL --data DATA [--out DIR] [options]\n       genkernels train --out DIR --resume [options]"
    )
    sub.add_argument("model", metavar="MODEL", nargs="?", help=" or ".join(", ".join(MODELS).rsplit(", ", 1)))
    sub.add_argument(
        "--data",
        help="digits, photos32, photos64, moons, ..., or your own: folder:PATH, npz:PATH, hf:NAME (their rules: "
        "genkernels data --help)",
    )
    sub.add_argument("--data-root", metavar="DIR", help="where relative paths in DATA start; the cache folder of hf:")
    sub.add_argument("--out", metavar="DIR", help="the run's folder (default: runs/MODEL-DATA)")
    sub.add_argument(
        "--resume", action="store_true", help="go on with the run in --out; what is not given stays as it was"
    )
    sub.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    sub.add_argument(
        "--like", metavar="RUN", help="begin as another run did: model, data and settings, but for what is given"
    )
    sub.add_argument(
        "--config", metavar="FILE", help="the same from a JSON file, of a run's config.json or a part of it"
    )

    model = sub.add_argument_group("model")
    model.add_argument(
        "--preset",
        metavar="P",
        help="sizes of a paper or for a data set (default: the data set's own, or those that fit their form; "
        "genkernels models NAME lists them)",
    )
    model.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="settings",
        help="an argument of the model's constructor, e.g. --set hidden=128; repeatable",
    )
    model.add_argument(
        "--reversible", action="store_true", help="rebuild activations in backward: memory flat in depth"
    )
    model.add_argument("--class-conditional", action="store_true", dest="classes", help="give the labels to the model")
    settings = sub.add_argument_group("training")
    words = _help_of(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        _add_setting(settings, field, words.get(field.name, ""))
    settings.add_argument("--quiet", action="store_true", help="no progress, results only")


def _add_setting(group, field: dataclasses.Field, text: str) -> None:
    """A field of `TrainConfig` as an option: its name, its type, its default and its words."""
    kind = field.type.removesuffix(" | None")
    if field.default is not None:
        shown = " ".join(f"{v:g}" for v in field.default) if isinstance(field.default, tuple) else f"{field.default}"
        text = f"{text} (default: {shown})"
    options = {"int": {"type": int, "metavar": "N"}, "float": {"type": float, "metavar": "X"}, "str": {"metavar": "S"}}
    options["bool"] = {"action": argparse.BooleanOptionalAction}
    options["tuple[float, float]"] = {"type": float, "nargs": 2, "metavar": "X"}
    group.add_argument(_flag(field.name), default=SUPPRESS, help=text.replace("%", "%%"), **options[kind])


def _help_of(kind: type) -> dict[str, str]:
    """What a class's docstring says of its attributes, in the command line's words: fields are options there."""
    text = inspect.cleandoc(kind.__doc__ or "")
    for old, new in ((r"``(.*?)``", r"\1"), (r"`(\w+)`", _flag), (r"\(None: ", "(default: "), (r"\*(.*?)\*", r"\1")):
        text = re.sub(old, new, text)
    entries = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", text, flags=re.M)
    return {name: " ".join(words.split()).rstrip(".") for name, words in entries}


def _flag(name: re.Match | str) -> str:
    return f"--{(name if isinstance(name, str) else name[1]).replace('_', '-')}"


def _run_arguments(sub: Parser) -> None:
    sub.add_argument("run", metavar="RUN", help="the run's folder")
    sub.add_argument(
        "--checkpoint", default="best", metavar="C", help="best, by held-out data, last, or a step (default: best)"
    )
    sub.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    sub.add_argument("--accelerator", default="auto", choices=("auto", "cpu", "gpu"), help="default: auto")
    sub.add_argument("--backend", metavar="B", help="auto, reference, cpu, triton or cuda (default: auto)")
    sub.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="settings",
        help="an option of the model's own, e.g. --set importance=5000; repeatable",
    )


def _sample(sub: Parser) -> None:
    _run_arguments(sub)
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default: 0)")
    sub.add_argument("--n", type=int, metavar="N", help="how many (default: 64 images or 2000 points)")
    sub.add_argument("--temperature", type=float, default=1.0, metavar="T", help="default: 1.0")
    sub.add_argument(
        "--label",
        metavar="K[,K]",
        action="append",
        default=[],
        help="the class of the samples, as the data call it; of several, as many each, on a sheet a row (repeatable; "
        "models with classes)",
    )
    sub.add_argument(
        "--inpaint",
        metavar="PART",
        help="draw a part of held-out images anew (pixelcnn, gatedpixelcnn): keep top-half, top-quarter or left-half, "
        "or draw bottom, right, centre or left, or the white of a mask, F.png or F.npy; pixels are drawn row by row, "
        "each given those before it",
    )
    sub.add_argument("--batch-size", type=int, default=256, metavar="N", help="samples at once (default: 256)")
    sub.add_argument(
        "--out",
        metavar="F.png|F.npz|DIR/",
        help="a sheet, the arrays, or a PNG of each in a new folder (default: a sheet in RUN/samples)",
    )
    sub.add_argument(
        "--real",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="held-out examples beside them on a sheet (default; where the run's data can be read)",
    )


def _evaluate(sub: Parser) -> None:
    _run_arguments(sub)
    sub.add_argument("--data", help="other data than the run's own")
    sub.add_argument("--data-root", metavar="DIR", help="where relative paths in DATA start; the cache folder of hf:")
    sub.add_argument("--split", default="test", choices=("test", "train"), help="default: test, the held-out part")
    sub.add_argument("--batch-size", type=int, metavar="N", help="examples at once (default: as in training)")
    sub.add_argument("--seed", type=int, metavar="N", help="of the noise (default: the run's)")
    sub.add_argument("--json", metavar="F", help="also write the result to a JSON file")


def _models(sub: Parser) -> None:
    sub.add_argument("name", metavar="NAME", nargs="?", help="which (default: lists them)")


def _data(sub: Parser) -> None:
    def rules() -> str:
        from genkernels.cli.data import rules

        return rules()

    sub.rules = rules
    sub.usage = "genkernels data [SPEC [--data-root DIR] [--out F.png]]"
    sub.add_argument("spec", metavar="SPEC", nargs="?", help="as train's --data (default: lists the names)")
    sub.add_argument("--data-root", metavar="DIR", help="where relative paths in SPEC start; the cache folder of hf:")
    sub.add_argument("--out", metavar="F.png", help="sixteen pictures, or points (default: data-SPEC.png)")


def _runs(sub: Parser) -> None:
    sub.add_argument("folder", metavar="DIR", nargs="?", default="runs", help="default: runs")


def _completion(sub: Parser) -> None:
    sub.usage = "genkernels completion bash|zsh|fish"
    sub.add_argument("shell", metavar="SHELL", choices=("bash", "zsh", "fish", "words"), help="bash, zsh or fish")
    sub.add_argument("line", nargs=argparse.REMAINDER, help=SUPPRESS)


def _bench(sub: Parser) -> None:
    sub.add_argument(
        "cases",
        metavar="CASE",
        nargs="*",
        help="operators to measure (default: all), or training_step and models, or swap and parts of its cases' names",
    )
    sub.add_argument("--json", metavar="F", help="write the rows to a JSON file")
    sub.add_argument("--plot", metavar="F", help="draw them into a PNG file")
    sub.add_argument("--quick", action="store_true", help="few repetitions: to see that it works, not to quote")
    sub.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    sub.add_argument(
        "--dtype", action="append", metavar="D", help="only rows of this type, e.g. float32, bf16; repeatable"
    )
    sub.add_argument(
        "--provider", action="append", metavar="P", help="only this: reference, compiled, a backend, a peer; repeatable"
    )
    sub.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    sub.add_argument(
        "--limit", type=float, metavar="S", help="begin no other row after S seconds; what is left out is named"
    )


def _swap(sub: Parser) -> None:
    sub.add_argument(
        "factory",
        metavar="MODULE:FUNCTION",
        help="FUNCTION() gives (model, loss) or (model, loss, sample): loss(model) is the loss of one training step, "
        "sample(model) draws",
    )
    sub.add_argument("--quick", action="store_true", help="measure briefly: to see that it works, not to quote")


def _figure(sub: Parser) -> None:
    _of_a_room(sub, "figure", "png")


def _table(sub: Parser) -> None:
    _of_a_room(sub, "table", "csv")


def _of_a_room(sub: Parser, command: str, ending: str) -> None:
    sub.usage = f"genkernels {command} [NAME [--out F.{ending}] [options]]\n       genkernels {command} NAME --help"
    sub.add_argument("name", metavar="NAME", nargs="?", help="which (default: lists them)")
    sub.add_argument("options", nargs=argparse.REMAINDER, help=SUPPRESS)  # each has its own: cli/rooms.py
