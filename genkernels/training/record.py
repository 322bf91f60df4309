"""The losses of a run: kept on the device between two looks, watched for NaN, written to ``losses.csv``."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from genkernels._files import replacing

COLUMNS = ("step", "loss", "grad_norm", "lr", "seconds")


class LossRecord:
    """A step's loss and gradient norm are written into a small buffer on the device; reading it is the only wait.

    So each loss is recorded and checked, on a GPU too, and no step waits for the device: a NaN is found at the next
    look, a few steps late, and the buffer still tells in which step it arose. Checkpoints are only written right after
    a look.

    Args:
        size: steps between two looks at most.
        device: where losses live.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._buffer = torch.zeros(size, 2, dtype=torch.float64, device=device)
        self._count = 0

    def add(self, loss: Tensor, grad_norm: Tensor | None) -> None:
        row = self._buffer[self._count]
        row[0].copy_(loss.detach(), non_blocking=True)
        if grad_norm is None:
            row[1].fill_(0.0)
        else:
            row[1].copy_(grad_norm.detach(), non_blocking=True)
        self._count += 1

    def __len__(self) -> int:
        """Steps since the last look."""
        return self._count

    @property
    def full(self) -> bool:
        return self._count == len(self._buffer)

    def read(self, average: Callable[[Tensor], Tensor] | None = None) -> list[tuple[float, float]]:
        """``(loss, gradient norm)`` of each step since the last call; `average` takes the mean over processes."""
        rows = self._buffer[: self._count]
        rows = average(rows.clone()) if average and self._count else rows
        self._count = 0
        return [(loss, norm) for loss, norm in rows.tolist()]


def weights_are_finite(model: torch.nn.Module) -> bool:
    """Whether every parameter and buffer is free of NaN and infinity; waits for the device once."""
    tensors = [t.detach() for t in (*model.parameters(), *model.buffers()) if t.is_floating_point() and t.numel()]
    if not tensors:
        return True
    return bool(torch.stack([t.isfinite().all() for t in tensors]).all())


class LossFile:
    """``losses.csv``: appended at every look, cut back to the checkpoint's step when a run goes on from there."""

    def __init__(self, path: Path, start: int) -> None:
        kept = [row for row in self.read(path) if int(row["step"]) < start] if start else []
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([row[name] for name in COLUMNS] for row in kept)
        with replacing(path) as file:
            file.write(text.getvalue().encode())
        self.losses = [float(row["loss"]) for row in kept]
        self._file = open(path, "a", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")

    def append(self, step: int, loss: float, grad_norm: float, lr: float, seconds: float) -> None:
        # repr of a float reads back as the same number: losses of two runs can be compared exactly
        self.losses.append(loss)
        self._writer.writerow([step, repr(loss), f"{grad_norm:.6g}", f"{lr:.6g}", f"{seconds:.6f}"])

    def flush(self, to_disk: bool = False) -> None:
        self._file.flush()
        if to_disk:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    @staticmethod
    def read(path: Path) -> list[dict[str, str]]:
        """The whole rows of a file that may end in half a row, as a killed process leaves it."""
        try:
            text = path.read_text()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind("\n") + 1]
        return [row for row in csv.DictReader(io.StringIO(whole)) if None not in row.values() and None not in row]


def first_bad(rows: list[tuple[float, float]], check_norm: bool) -> tuple[int, str, float, float] | None:
    """``(index, what, loss, norm)`` of the first step whose loss, or gradient norm if asked, is not a finite number."""
    for i, (loss, norm) in enumerate(rows):
        if not math.isfinite(loss):
            return i, "loss", loss, norm
        if check_norm and not math.isfinite(norm):
            return i, "gradient norm", loss, norm
    return None
