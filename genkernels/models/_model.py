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

    # --- helpers --------------------------------------------------------------------------------------------------

    def _check_sample(self, n: int, temperature: float, generator: torch.Generator | None) -> None:
        name = type(self).__name__
        if isinstance(n, bool) or not isinstance(n, int) or n < 0:
            raise ValueError(f"{name}: n must be an integer of at least 0, got {n!r}")
        if not isinstance(temperature, int | float) or not 0 <= temperature < math.inf:
            raise ValueError(f"{name}: temperature must be at least 0 and finite, got {temperature!r}")
        if not isinstance(generator, torch.Generator | None):
            raise TypeError(f"{name}: generator must be a torch.Generator or None, got {generator!r}")

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
        if not isinstance(x, Tensor):
            raise TypeError(f"{type(self).__name__}: x must be a torch.Tensor, got {type(x).__name__}")
        if list(x.shape[1:]) != list(self.shape) or x.dim() != len(self.shape) + 1:
            expected = ", ".join(map(str, self.shape))
            raise ValueError(f"{type(self).__name__}: x must be [N, {expected}], got {list(x.shape)}")


def arguments(scope: dict[str, Any]) -> dict[str, Any]:
    """A constructor's arguments, from its ``locals()``, of the types that it declares.

    Raises:
        ValueError: one is of another type; a count or a size is negative.
    """
    kind = type(scope["self"])
    declared: dict[str, Any] = {}
    for base in kind.__mro__:  # a constructor further down has the last word: it is the one that asks
        declared |= getattr(base.__dict__.get("__init__"), "__annotations__", {})
    found = {key: value for key, value in scope.items() if key not in ("self", "__class__")}
    for key, value in found.items():
        _check_argument(kind.__name__, key, value, str(declared.get(key, "")))
    return found


def _check_argument(name: str, key: str, value: Any, declared: str) -> None:
    """That a value is of the type declared, where that is a number or a switch; no count and no size is negative."""
    wanted, _, rest = declared.partition(" | ")
    if value is None and rest == "None":
        return
    whole = isinstance(value, int) and not isinstance(value, bool)
    if wanted == "int" and not whole:
        raise ValueError(f"{name}: {key} must be an integer, got {value!r}")
    if wanted == "int" and value < 0:
        raise ValueError(f"{name}: {key} must be at least 0, got {value}")
    if wanted == "float" and not ((whole or isinstance(value, float)) and math.isfinite(value)):
        raise ValueError(f"{name}: {key} must be a finite number, got {value!r}")
    if wanted == "bool" and not isinstance(value, bool):
        raise ValueError(f"{name}: {key} must be True or False, got {value!r}")


def extents(name: str, key: str, value: Any, meaning: str) -> tuple[int, ...]:
    """Sizes as a tuple of integers, one for each letter of `meaning`, e.g. ``(C, H, W)``."""
    sizes = tuple(value) if isinstance(value, list | tuple) else ()
    if len(sizes) != meaning.count(",") + 1 or not all(
        isinstance(s, int) and not isinstance(s, bool) and s >= 1 for s in sizes
    ):
        raise ValueError(f"{name}: {key} must be {meaning}, got {value!r} (integers of at least 1)")
    return sizes
