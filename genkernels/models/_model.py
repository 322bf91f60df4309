"""What every model with a likelihood shares: presets, bits per dimension, the loss, labels, the checks of `sample`."""

from __future__ import annotations

import difflib
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class LikelihoodModel(nn.Module):
    """A model with ``log_prob(x, y, generator)``, ``[N]`` in nats.

    Attributes:
        shape: of one datum, ``(C, H, W)`` or ``(D,)``. dim: its number of values.
        num_classes: None where y plays no part.
        hparams: the constructor's arguments; ``genkernels.models.build(name, **hparams)`` makes the same model.
        presets: arguments by preset name, for `from_preset`.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {}

    def _begin(self, hparams: dict[str, Any], shape: tuple[int, ...], num_classes: int | None) -> None:
        """What a constructor calls first."""
        nn.Module.__init__(self)
        if num_classes is not None and (not isinstance(num_classes, int) or num_classes < 0):
            raise ValueError(
                f"{type(self).__name__}: num_classes must be None or a number of classes, got {num_classes!r}"
            )
        self.hparams = hparams
        self.shape = shape
        self.dim = math.prod(shape)
        self.num_classes = num_classes
        # follows the model's dtype and device
        self.register_buffer("_like", torch.zeros(()), persistent=False)

    @classmethod
    def from_preset(cls, name: str, **overrides) -> LikelihoodModel:
        """The model at a documented size; `overrides` replaces single constructor arguments.

        Raises:
            ValueError: there is no such preset; names the nearest.
        """
        if name not in cls.presets:
            near = difflib.get_close_matches(str(name), cls.presets, n=2)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"{cls.__name__}: preset must be one of {', '.join(cls.presets)}, got {name!r}{hint}")
        return cls(**{**cls.presets[name], **overrides})

    def log_prob(self, x: Tensor, y: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        raise NotImplementedError

    def bits_per_dim(self, x: Tensor, y: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """``-log_prob / (D ln 2)``, ``[N]``: the bits that each value costs."""
        return self.log_prob(x, y, generator) / (-self.dim * math.log(2))

    def loss(self, x: Tensor, y: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """What training minimises: the mean bits/dim of images, the mean negative log-density (nats) of points."""
        if len(self.shape) == 3:
            return self.bits_per_dim(x, y, generator).mean()
        return -self.log_prob(x, y, generator).mean()

    # --- helpers -------------------------------------------------------------------------------------------------------

    def _check_sample(self, n: int, temperature: float) -> None:
        name = type(self).__name__
        if isinstance(n, bool) or not isinstance(n, int) or n < 0:
            raise ValueError(f"{name}: n must be an integer of at least 0, got {n!r}")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"{name}: temperature must be at least 0 and finite, got {temperature}")

    def _drawn_labels(self, y: Tensor | int | None, n: int, generator: torch.Generator | None) -> Tensor | None:
        """Labels of n samples: as given, one for all, or drawn evenly where the model has classes."""
        if self.num_classes and y is None:
            device = self._like.device if generator is None else generator.device
            y = torch.randint(self.num_classes, (n,), device=device, generator=generator)
        elif self.num_classes and isinstance(y, int):
            y = torch.full((n,), y)
        return self._labels(y, n)

    def _labels(self, y: Tensor | None, count: int) -> Tensor | None:
        if not self.num_classes:
            return None
        name = type(self).__name__
        if not isinstance(y, Tensor) or list(y.shape) != [count] or y.is_floating_point():
            got = f"{list(y.shape)} {y.dtype}" if isinstance(y, Tensor) else repr(y)
            raise ValueError(
                f"{name}: y must be integers [N] = [{count}], one class of {self.num_classes} each, got {got}"
            )
        if y.device.type == "cpu" and count and not 0 <= int(y.min()) <= int(y.max()) < self.num_classes:
            raise ValueError(
                f"{name}: y must lie in 0..{self.num_classes - 1}, got values from {int(y.min())} to {int(y.max())}"
            )
        return y.to(self._like.device, torch.int64)

    def _check_shape(self, x: Tensor) -> None:
        if list(x.shape[1:]) != list(self.shape) or x.dim() != len(self.shape) + 1:
            expected = ", ".join(map(str, self.shape))
            raise ValueError(f"{type(self).__name__}: x must be [N, {expected}], got {list(x.shape)}")


def arguments(scope: dict[str, Any]) -> dict[str, Any]:
    """A constructor's arguments, from its ``locals()``."""
    return {key: value for key, value in scope.items() if key not in ("self", "__class__")}
