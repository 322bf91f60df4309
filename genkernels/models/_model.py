"""What every model shares: how it is trained and judged, presets, labels, the checks of `sample`; and what a likelihood
adds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from genkernels._words import UsageError, nearest
from genkernels.nn._values import readable


@dataclass(frozen=True)
class Player:
    """One part of a model with an optimiser of its own: a GAN's generator, its critic; of most models the whole.

    Attributes:
        module: whose parameters it moves; their gradients are clipped together, apart from other players'.
        every: it moves in every so many steps.
        averaged: whether its weights are averaged, for evaluation and samples.
        lr: its step size as a multiple of the run's.
    """

    module: nn.Module
    every: int = 1
    averaged: bool = True
    lr: float = 1.0


@dataclass(frozen=True)
class Estimate:
    """A figure of merit on held-out examples.

    Attributes:
        name: of files and columns, ``bits_per_dim``. unit: for people, ``bits/dim``.
        value: NaN where an example's is. standard_error: of the value, NaN where it has none.
        examples: how many were seen.
        lower_is_better: which of two values is the better one.
    """

    name: str
    unit: str
    value: float
    standard_error: float
    examples: int
    lower_is_better: bool = True

    @classmethod
    def of(cls, name: str, unit: str, values: Tensor, lower_is_better: bool = True) -> Estimate:
        """The mean of one value an example, ``[N]``; of none it is NaN."""
        values = values.detach().double()
        sums = torch.stack([values.sum(), (values * values).sum()]).tolist()
        return cls._from_sums(name, unit, *sums, len(values), lower_is_better)

    @classmethod
    def pooled(cls, parts: Sequence[Estimate]) -> Estimate:
        """The mean over all examples from means over disjoint parts of them, as several processes found them."""
        seen = [part for part in parts if part.examples]
        if not seen:
            return parts[0]
        total = math.fsum(part.value * part.examples for part in seen)
        squares = math.fsum(
            part.examples * (part.examples * part.standard_error**2 + part.value * part.value) for part in seen
        )
        first, count = seen[0], sum(part.examples for part in seen)
        return cls._from_sums(first.name, first.unit, total, squares, count, first.lower_is_better)

    @classmethod
    def _from_sums(cls, name, unit, total, squares, count, lower_is_better) -> Estimate:
        mean = total / count if count else math.nan
        variance = max(0.0, squares / count - mean * mean) if math.isfinite(mean) else math.nan
        error = math.sqrt(variance / count) if count else math.nan
        return cls(name, unit, mean, error, count, lower_is_better)

    def better_than(self, other: float) -> bool:
        return self.value < other if self.lower_is_better else self.value > other

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Model(nn.Module):
    """A generative model that says what it minimises, who is trained, and how it is judged.

    Training, the command line and the benchmarks read this class and nothing below it.

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
    def from_preset(cls, name: str, **overrides) -> Model:
        """The model at a documented size; `overrides` replaces single constructor arguments.

        Raises:
            UsageError: there is no such preset; names the nearest.
        """
        if name not in cls.presets:
            hint = nearest(name, cls.presets, listed=True)
            raise UsageError(f"{cls.__name__}: preset must be one of {', '.join(cls.presets)}, got {name!r}{hint}")
        return cls(**{**cls.presets[name], **overrides})

    # --- training and judging
    # ------------------------------------------------------------------------------------------

    def players(self) -> dict[str, Player]:
        """Who is trained, by name, in the order in which they move within a step."""
        return {"model": Player(self)}

    def losses(self, player: str, x: Tensor, y: Tensor, step: int) -> dict[str, Tensor]:
        """The terms of a player's step, scalars by name; ``loss`` is minimised, all of them are shown and logged.

        Args:
            player: a name from `players`.
            x: a batch, uint8 level indices ``[N, C, H, W]`` or floats ``[N, D]``. y: ``[N]`` classes; models without
                ignore them.
            step: of the run, from 0.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what it minimises: define losses")

    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Estimate]:
        """Figures of merit over held-out batches ``(x, y)`` on the model's device, by name; the first decides which
        weights are the best. Keyword arguments that a model adds are options of ``genkernels eval --set``."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is judged: define evaluate")

    def sample(
        self, n: int, temperature: float = 1.0, generator: torch.Generator | None = None, y: Tensor | int | None = None
    ) -> Tensor:
        """``[n, *shape]``: images as floats in [0, 1], or points. Keyword arguments that a model adds are options of
        ``genkernels sample --set``."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is sampled: define sample")

    def pictures(self, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Sheets beyond samples, by name, from held-out examples: reconstructions, translations, re-sampled levels."""
        return {}

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
        if readable(y) and not 0 <= int(y.min()) <= int(y.max()) < self.num_classes:
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


class LikelihoodModel(Model):
    """A model with ``log_prob(x, y, generator)``, ``[N]`` in nats: trained and judged by it."""

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

    def losses(self, player: str, x: Tensor, y: Tensor, step: int) -> dict[str, Tensor]:
        return {"loss": self.loss(x, y)}

    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Estimate]:
        """``bits_per_dim`` of images, ``nats`` (the mean negative log-density) of points."""
        image = len(self.shape) == 3
        values = [self.bits_per_dim(x, y) if image else -self.log_prob(x, y) for x, y in batches]
        name, unit = ("bits_per_dim", "bits/dim") if image else ("nats", "nats")
        return {name: Estimate.of(name, unit, torch.cat(values) if values else torch.empty(0))}


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
