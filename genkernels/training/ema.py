"""The exponential moving average of a model's weights, which evaluation and sampling use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class EMA:
    r"""Keeps :math:`\bar w_t = d_t \bar w_{t-1} + (1 - d_t) w_t` for each floating-point parameter and a copy of every
    buffer.

    The decay :math:`d_t = \min(d,\, t/(t+9))` grows with the steps t taken so far: the first update is a plain copy, so
    the random initial weights, and an ActNorm that initialises itself on its first batch, leave no trace, and short
    runs average over about a tenth of their steps.

    Args:
        model: whose weights are averaged.
        decay: d in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA: decay must be in [0, 1), got {decay}")
        self.decay, self.updates = decay, 0
        self.average = {name: tensor.detach().clone() for name, tensor in _tensors(model)}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Takes the model's present weights in. A few launches for all tensors together, and no wait for the device."""
        decay = min(self.decay, self.updates / (self.updates + 9))
        self.updates += 1
        averaged = {name for name, p in model.named_parameters(remove_duplicate=False) if p.is_floating_point()}
        mean, now = [], []
        for name, tensor in _tensors(model):
            old = self.average[name]
            if old.device != tensor.device:
                old = self.average[name] = old.to(tensor.device)
            if name in averaged and decay:
                mean.append(old)
                now.append(tensor.detach())
            else:
                old.copy_(tensor)
        if mean:
            torch._foreach_lerp_(mean, now, 1 - decay)

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Puts the averaged weights into the model for a block, and the trained ones back, bit for bit, afterwards."""
        trained = {name: tensor.detach().clone() for name, tensor in _tensors(model)}
        try:
            self.copy_to(model)
            yield
        finally:
            _assign(model, trained)

    def copy_to(self, model: nn.Module) -> None:
        """Puts the averaged weights into the model for good."""
        if self.updates:
            _assign(model, self.average)

    def state_dict(self) -> dict:
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state: dict) -> None:
        """Takes over a saved average.

        Raises:
            ValueError: its names or shapes are not this model's.
        """
        theirs = {name: tuple(t.shape) for name, t in state["average"].items()}
        ours = {name: tuple(t.shape) for name, t in self.average.items()}
        if theirs != ours:
            odd = sorted(set(theirs.items()) ^ set(ours.items()))
            raise ValueError(
                f"EMA: the saved average must have this model's tensors, {len(odd)} differ, first {odd[0]}"
            )
        self.updates = state["updates"]
        for name, tensor in state["average"].items():
            self.average[name].copy_(tensor)


def averaged(ema: EMA | None, model: nn.Module) -> contextlib.AbstractContextManager:
    """`EMA.applied`, or nothing where no average is kept."""
    return ema.applied(model) if ema else contextlib.nullcontext()


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers: what the model's state dict holds as tensors."""
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor):
            yield name, value


@torch.no_grad()
def _assign(model: nn.Module, values: dict[str, Tensor]) -> None:
    # Written in place rather than by exchanging pointers: whatever a layer derives from its weights sees a new version.
    for name, tensor in _tensors(model):
        tensor.copy_(values[name])
