"""The command line: ``genkernels info | train | sample | eval | bench | figure``.

Only what a command needs is imported, when it runs: ``genkernels --help`` needs none of it. Plain argparse, so that the
base install, torch and numpy, has the whole command line.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys

__all__ = ["main"]

#: Exit codes: what was asked for cannot be done; it failed while running; Ctrl-C.
BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 128 + signal.SIGINT


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments; None takes the process's.

    Returns:
        The exit code: 0; 2 for bad input and 1 for a failure while running, each with one sentence on stderr; 130 after
        Ctrl-C. ``--debug`` or ``GENKERNELS_DEBUG=1`` shows the traceback too.
    """
    from genkernels.cli.arguments import parse

    argv = sys.argv[1:] if argv is None else list(argv)
    debug = "--debug" in argv or os.environ.get("GENKERNELS_DEBUG", "") not in ("", "0")
    try:
        arguments = parse(argv)
        module = importlib.import_module(f"genkernels.cli.{arguments.module}")
        return module.run(arguments) or 0
    except SystemExit as leave:  # argparse, after --help and after an error of its own
        return leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except KeyboardInterrupt:
        return _say("interrupted", INTERRUPTED)
    except BrokenPipeError:  # `genkernels info | head`
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if isinstance(error, OSError) and error.filename and not debug:
            return _say(f"{error.filename}: {error.strerror}", FAILED)
        code = _code(error)
        if code is None or debug:
            import traceback

            traceback.print_exc()
        if code is None:
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            return _say(f"this is a fault of genkernels or of a library below it ({text})", FAILED)
        if code == FAILED and os.environ.get("LOCAL_RANK", "0") not in ("", "0"):
            return code  # the first process of a DDP run says the same
        return _say(str(error), code)


def _code(error: Exception) -> int | None:
    """The exit code of an error that a sentence explains, None for a fault in the program.

    Errors are told by name: a module that was never imported cannot have raised any, and importing it would be slow.
    """
    names = {kind.__name__ for kind in type(error).__mro__ if kind.__module__.startswith("genkernels.")}
    if names & {"UsageError", "DataError", "BackendUnavailable", "CheckpointError"}:
        return BAD_INPUT
    return FAILED if "TrainingError" in names else None


def _say(sentence: str, code: int) -> int:
    with contextlib.suppress(OSError):  # stderr may be closed
        print(f"genkernels: error: {' '.join(sentence.split())}", file=sys.stderr, flush=True)
    return code
