"""What every loader needs to read a spec and to refuse one: errors, options, paths, optional packages."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

from genkernels._words import UsageError

# The options stand at the very end and hold no slash, so that a "?" inside a path stays part of the path.
_OPTIONS = re.compile(r"^(?P<body>.*)\?(?P<options>[a-z_]+=[^?&/]*(?:&[a-z_]+=[^?&/]*)*)$", re.DOTALL)


class DataError(UsageError):
    """A data set cannot be had as asked; the message is one sentence that begins with the spec."""


def split_options(spec: str, text: str, readers: dict[str, Callable[[str], Any]]) -> tuple[str, dict[str, Any]]:
    """Split ``body?key=value&key=value`` into the body and its options, each read by ``readers[key]``.

    Raises:
        DataError: an unknown or repeated key, or a value that its reader refuses with a ValueError.
    """
    match = _OPTIONS.match(text)
    if match is None:
        return text, {}
    options: dict[str, Any] = {}
    for pair in match["options"].split("&"):
        key, _, value = pair.partition("=")
        if key not in readers:
            raise DataError(f"{spec}: the options here are {', '.join(sorted(readers))}, got {key!r}")
        if key in options:
            raise DataError(f"{spec}: the option {key} must be given once, got it twice")
        try:
            options[key] = readers[key](value)
        except ValueError as error:
            raise DataError(f"{spec}: {key} must be {error}, got {value!r}") from None
    return match["body"], options


def image_side(value: str) -> int:
    """Read the option ``size=S``, a side in pixels; a ValueError's text says what must hold."""
    if not (value.isascii() and value.isdigit() and 1 <= int(value) <= 4096):
        raise ValueError("a whole number of pixels from 1 to 4096")
    return int(value)


def resolve(spec: str, path: str, root: str | PathLike[str] | None) -> Path:
    """The path with ``~`` expanded; a relative one starts at ``root`` (default: the current folder)."""
    try:
        return Path(root or ".").expanduser() / Path(path).expanduser()
    except RuntimeError as error:  # ~someone, and no such user
        raise DataError(f"{spec}: the path {path!r} leads nowhere ({reason(error)})") from None


def require(spec: str, module: str, package: str) -> ModuleType:
    """Import an optional package, or name the extra that brings it.

    Raises:
        DataError: the package is absent, or is there and fails to import.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"{spec}: this needs {package}, which cannot be imported here ({reason(error)}): "
            'pip install "genkernels[train]"'
        ) from error


def reason(error: BaseException) -> str:
    """An exception in a few words that fit inside a sentence: its first line, without the full stop."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".")[:300] if lines else type(error).__name__
