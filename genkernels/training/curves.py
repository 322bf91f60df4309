"""TensorBoard logs, where the package is installed: a convenience, not a condition."""

from __future__ import annotations

from pathlib import Path

import numpy as np


class Curves:
    """Writes curves and pictures, or nothing.

    Args:
        folder: of the event files; None writes nothing.
        start: the step a resumed run begins at; what lies beyond it in older files is hidden.
    """

    def __init__(self, folder: Path | None = None, start: int = 0) -> None:
        self._writer = None
        if folder is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except Exception:  # absent, or at odds with another package: its import runs a good part of protobuf
            return
        self._writer = SummaryWriter(str(folder), purge_step=start + 1 if start else None)

    def scalars(self, step: int, **values: float | None) -> None:
        """One point of each curve; double underscores in a name stand for slashes."""
        if self._writer:
            for name, value in values.items():
                if value is not None:
                    self._writer.add_scalar(name.replace("__", "/"), value, step)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """A picture ``[H, W]`` or ``[H, W, 3]`` of bytes."""
        if self._writer:
            self._writer.add_image(name, pixels, step, dataformats="HW" if pixels.ndim == 2 else "HWC")

    def close(self) -> None:
        if self._writer:
            self._writer.close()
            self._writer = None
