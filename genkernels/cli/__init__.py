"""The command line: ``genkernels train | sample | eval``, lists of models, data and runs, and more.

Only what a command needs is imported, when it runs: ``genkernels --help`` needs none of it. Plain argparse, so that the
base install, torch and numpy, has the whole command line.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import signal
import sys

from genkernels._files import named_by
from genkernels._words import memory_ran_out, notice

__all__ = ["main"]

#: Exit codes. A sentence says what the user can mend; a fault of the program, with its traceback; Ctrl-C.
MENDABLE, FAULT, INTERRUPTED = 2, 1, 128 + signal.SIGINT


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments; None takes the process's.

    Returns:
        The exit code: 0; 2 where something was not done that the user can mend, one sentence on stderr says what; 1 for
        a fault of the program, with its traceback (and from ``bench`` where a kernel's values are wrong); 128 + n where
        signal n ended it, 130 after Ctrl-C. ``--debug`` or ``GENKERNELS_DEBUG=1`` shows a sentence's traceback too.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    code = _run(argv, "--debug" in argv or os.environ.get("GENKERNELS_DEBUG", "") not in ("", "0"))
    try:
        print(end="", flush=True)
    except OSError as error:
        with contextlib.suppress(OSError):  # Python would try again at its exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not code and not isinstance(error, BrokenPipeError):  # that is `genkernels info | head`
            code = _say(f"stdout cannot be written: {error.strerror}", MENDABLE)
    return code


def _run(argv: list[str], debug: bool) -> int:
    from genkernels.cli.arguments import parse

    try:
        arguments = parse(argv)
        if arguments.command != "bench":
            # Threads of OpenMP spin while they wait: beside another busy process a step may take 100 times as long.
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        module = importlib.import_module(f"genkernels.cli.{arguments.module}")
        return module.run(arguments) or 0
    except SystemExit as leave:  # argparse, after --help and after an error of its own
        return leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except KeyboardInterrupt:
        return _say("interrupted", INTERRUPTED)
    except BrokenPipeError:
        return 0
    except Exception as error:
        sentence = _sentence(error, argv)
        if sentence is None or debug:
            import traceback

            traceback.print_exc()
        if sentence is None:
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            return _say(f"this is a fault of genkernels or of a library below it ({text})", FAULT)
        if type(error).__name__ == "TrainingError" and os.environ.get("LOCAL_RANK", "0") not in ("", "0"):
            return MENDABLE  # the first process of a DDP run says the same
        return _say(sentence, MENDABLE)


def _sentence(error: Exception, argv: list[str]) -> str | None:
    """What an error that the user can mend says, None for a fault in the program.

    Errors are told by name: a module that was never imported cannot have raised any, and importing it would be slow.
    """
    names = {kind.__name__ for kind in type(error).__mro__ if kind.__module__.startswith("genkernels.")}
    if names & {"UsageError", "DataError", "BackendUnavailable", "CheckpointError", "TrainingError"}:
        return _as_typed(str(error), argv)
    if memory_ran_out(error):
        return f"memory ran out{': choose a smaller --batch-size' * (argv[:1] in (['train'], ['sample'], ['eval']))}"
    if isinstance(error, OSError):
        return ": ".join(filter(None, (named_by(error), error.strerror or str(error))))
    return None


def _as_typed(sentence: str, argv: list[str]) -> str:
    """A sentence of the library with the settings that were typed by their flags: ``--max-steps`` for ``max_steps``."""
    flags = {word.partition("=")[0] for word in argv if word.startswith("--")}
    for flag in sorted(flags, key=len, reverse=True):
        name = flag[2:].replace("-", "_")
        # a setting of one word is meant where a sentence begins with it, or says its value
        where = rf"\b{name}\b" if "_" in name else rf"(?:^|(?<=begun with )){name}\b(?= \S)|\b{name}(?==)"
        sentence = re.sub(rf"(?<![\w-])(?:{where})", flag, sentence)
    return sentence


def _say(sentence: str, code: int) -> int:
    notice(f"error: {' '.join(sentence.split())}")
    return code
