"""TensorBoard's event files, where the package is installed: a convenience, not a condition of training."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np


class Curves:
    """Scalars and pictures by step, until the disk refuses, which is told. What lies beyond `start` in older files is
    hidden."""

    def __init__(self, folder: Path, start: int, tell: Callable[[str], None]) -> None:
        self._tell, self._writer, self._hook = tell, None, threading.excepthook
        try:
            from torch.utils.tensorboard import SummaryWriter
        except Exception:  # absent, or at odds with another package: its import runs a good part of protobuf
            return
        threading.excepthook = self._unheard
        with self._writing():
            self._writer = SummaryWriter(str(folder), purge_step=start + 1 if start else None)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._writer = None
            self._tell(f"no curves for TensorBoard from here on: {error.strerror or error}")

    def _unheard(self, failed) -> None:
        """What its thread meets is raised again at the next call: no traceback beside that."""
        if not isinstance(failed.exc_value, OSError) or type(failed.thread).__name__ != "_AsyncWriterThread":
            self._hook(failed)

    def scalars(self, step: int, group: str, values: dict[str, float | None]) -> None:
        for name, value in values.items():
            if self._writer and value is not None:
                with self._writing():
                    self._writer.add_scalar(f"{group}/{name}", value, step)

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Bytes ``[H, W]`` or ``[H, W, 3]``."""
        if self._writer:
            with self._writing():
                self._writer.add_image(name, pixels, step, dataformats="HW" if pixels.ndim == 2 else "HWC")

    def close(self) -> None:
        if self._writer:
            with self._writing():
                self._writer.close()
        threading.excepthook = self._hook
