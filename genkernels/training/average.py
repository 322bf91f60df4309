"""The exponential moving average of a player's weights, which evaluation and sampling use."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from genkernels.training.checkpoint import CheckpointError


class Average(AveragedModel):
    r"""Keeps :math:`\bar w_t = d_t \bar w_{t-1} + (1 - d_t) w_t` for each parameter and a copy of every buffer.

    The decay :math:`d_t = \min(d,\, t/(t+9))`, of a given d in [0, 1), grows with the updates t so far: the first one
    is a plain copy, so the random initial weights, and an ActNorm that initialises itself on its first batch, leave no
    trace, and short runs average over about a tenth of their steps.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"Average: decay must be in [0, 1), got {decay}")

        def update(average: list[Tensor], now: list[Tensor], updates: int) -> None:
            if average[0].is_floating_point():
                torch._foreach_lerp_(average, now, 1 - min(decay, updates / (updates + 9)))
            else:
                torch._foreach_copy_(average, now)

        super().__init__(module, multi_avg_fn=update)
        del self.n_averaged
        self.n_averaged = _Count(0)

    def copy_to(self, module: nn.Module) -> None:
        """Puts the averaged weights into the module for good."""
        if self.n_averaged:
            _assign(module, _tensors(self.module))

    def to_dict(self) -> dict:
        return {"updates": int(self.n_averaged), "weights": self.module.state_dict()}

    def load(self, saved: dict) -> None:
        """Takes over an average that `to_dict` gave; a CheckpointError where it is another module's."""
        try:
            self.module.load_state_dict(saved["weights"])
        except RuntimeError as error:
            odd = str(error).splitlines()[1].strip()
            raise CheckpointError(f"the saved average must have this model's tensors: {odd}") from None
        self.n_averaged = _Count(saved["updates"])


class _Count(int):
    """`AveragedModel` counts its updates in a tensor and copies it to the weights' device at each of them, where a GPU
    is waited for. This is a plain integer that answers to what it asks of that tensor."""

    def to(self, _device) -> _Count:
        return self

    def __add__(self, more: int) -> _Count:
        return _Count(int(self) + more)


@contextlib.contextmanager
def applied(averages: Iterable[tuple[nn.Module, Average | None]]) -> Iterator[None]:
    """Puts averaged weights into their modules for a block, and the trained ones back, bit for bit, afterwards."""
    averages = [(module, average) for module, average in averages if average and average.n_averaged]
    trained = [[tensor.detach().clone() for tensor in _tensors(module)] for module, _ in averages]
    try:
        for module, average in averages:
            average.copy_to(module)
        yield
    finally:
        for (module, _), values in zip(averages, trained, strict=True):
            _assign(module, values)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(module.parameters(), module.buffers())


@torch.no_grad()
def _assign(module: nn.Module, values: Iterable[Tensor]) -> None:
    # Written in place rather than by exchanging pointers: whatever a layer derives from its weights sees a new version.
    for tensor, value in zip(_tensors(module), values, strict=True):
        tensor.copy_(value)
