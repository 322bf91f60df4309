"""A room whose files are its list: each module of a package is one entry, found by its file's name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from types import ModuleType

from genkernels._words import UsageError, nearest


class NamedFiles:
    """The entries of one room.

    Args:
        package: its name. path: its ``__path__``. command: ``genkernels <command> NAME``, for the error.
    """

    def __init__(self, package: str, path: Sequence[str], command: str) -> None:
        self._package, self._path, self._command = package, path, command

    def names(self) -> list[str]:
        """Those that there are; a file whose name begins with ``_`` is none."""
        return sorted(module.name for module in pkgutil.iter_modules(self._path) if not module.name.startswith("_"))

    def find(self, name: str) -> ModuleType:
        """The module of one.

        Raises:
            UsageError: there is none of this name; says the nearest.
        """
        names = self.names()
        if name not in names:
            hint = nearest(name, names, listed=True)
            raise UsageError(f"{self._command}: NAME must be one of {', '.join(names)}, got {name!r}{hint}")
        return importlib.import_module(f"{self._package}.{name}")
