"""What every model shares: how it is trained and judged, presets, labels, the checks of `sample`; and what a likelihood
adds.

A model of one's own, of points, with a preset that says how to train it:

>>> import torch, genkernels as gk
>>> class Diagonal(gk.models.LikelihoodModel):
...     takes = ("points",)
...     presets = {"points": gk.models.Preset(sizes={"shape": (2,)}, training={"lr": 1e-2})}
...     def __init__(self, *, shape: tuple[int, ...], start: float = 0.0):
...         super().__init__(shape)
...         self.log_scale = torch.nn.Parameter(torch.full(self.shape, start))
...     def log_prob(self, x, y=None, generator=None):
...         return torch.distributions.Normal(0.0, self.log_scale.exp()).log_prob(x).sum(1)
...     def sample(self, n, temperature=1.0, generator=None, y=None):
...         return temperature * torch.randn(n, *self.shape, generator=generator) * self.log_scale.exp()
>>> Diagonal.from_preset("points", start=0.5).hparams
{'shape': (2,), 'start': 0.5}

``genkernels.models.MODELS["diagonal"] = Diagonal`` gives it a name, by which a run's folder finds it again.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from genkernels._words import UsageError, nearest
from genkernels.models._arguments import recorded
from genkernels.models._registry import names_of_domains, names_taking
from genkernels.nn._buffers import follow_assigned
from genkernels.nn._modes import in_mode
from genkernels.nn._values import readable

if TYPE_CHECKING:
    from genkernels.data import Form


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
        """The mean of one value an example, ``[N]``; of none it is NaN.

        Raises:
            ValueError: the values are not ``[N]``.
        """
        if values.dim() != 1:
            raise ValueError(f"Estimate: the values of {name} must be [N], one an example, got {list(values.shape)}")
        values = values.detach().double()
        mean = values.mean()
        moments = torch.stack([mean, (values - mean).square().mean()]).tolist()
        return cls._from_moments(name, unit, *moments, len(values), lower_is_better)

    @classmethod
    def pooled(cls, parts: Sequence[Estimate]) -> Estimate:
        """The mean over all examples from means over disjoint parts of them, as several processes found them."""
        seen = [part for part in parts if part.examples]
        if not seen:
            return parts[0]
        first, count = seen[0], sum(part.examples for part in seen)
        mean = sum(part.value * part.examples for part in seen) / count
        errors, offsets = [part.standard_error for part in seen], [part.value - mean for part in seen]
        squares = (p.examples * (p.examples * e * e + o * o) for p, e, o in zip(seen, errors, offsets, strict=True))
        return cls._from_moments(first.name, first.unit, mean, sum(squares) / count, count, first.lower_is_better)

    @classmethod
    def _from_moments(cls, name, unit, mean, variance, count, lower_is_better) -> Estimate:
        error = math.sqrt(variance / count) if count else math.nan
        return cls(name, unit, mean, error, count, lower_is_better)

    def __str__(self) -> str:
        """``1.2345 ± 0.0123 bits/dim``."""
        error = f" ± {self.standard_error:.4f}" if math.isfinite(self.standard_error) else ""
        return f"{self.value:.4f}{error} {self.unit}".rstrip()

    def better_than(self, other: float) -> bool:
        return self.value < other if self.lower_is_better else self.value > other

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Preset:
    """A documented size of a model, and the training that goes with it.

    Attributes:
        sizes: constructor arguments, those that follow from its data among them.
        training: fields of ``genkernels.training.TrainConfig``, where the source of the sizes or a measurement departs
            from its defaults; ``genkernels train`` takes them under what the user gives. How long to train is left to
            the user.
    """

    sizes: dict[str, Any]
    training: dict[str, Any] = field(default_factory=dict)


def check_domains(kind: type, form: Form) -> None:
    """A UsageError where data hold images of several domains, side by side, and the model takes a datum for one."""
    if form.domains > kind.domains:
        others = " or ".join(names_of_domains(form.domains))
        held = f"one of each of {form.domains} domains"
        raise UsageError(f"{kind.__name__} is a model of one image a datum, the data hold {held}: try {others}")


class Model(nn.Module):
    """A generative model that says what it minimises, who is trained, and how it is judged.

    Training, the command line and the benchmarks read this class and nothing below it. A model may have ``begin(x, y)``
    beside, which is called before the first step of a run with the examples of its first batches, a thousand and more
    where there are so many: what is set from data goes there. A constructor's arguments are recorded and checked
    against their annotations (``int``: a count or a size, at least 0) before it begins; one that is called ``shape``
    holds ``(C, H, W)`` or ``(D,)``, and ``grey_levels`` is None where that is ``(D,)``.

    Args:
        shape: of one datum, ``(C, H, W)`` or ``(D,)``. grey_levels: how many values a pixel can take, None for points
            and for images of real numbers. num_classes: None where labels play no part.

    Attributes:
        shape, grey_levels, num_classes: the arguments. dim: the number of values of a datum.
        hparams: the outermost constructor's arguments; ``genkernels.models.build(name, **hparams)`` makes the same
            model.
        takes: ``images``, ``points`` or both.
        presets: by name, for `from_preset` and ``genkernels train --preset``.
        samples_by_class: whether `sample` takes a class, where there are classes.
        domains: how many images, each of another domain, a datum holds along its channels.
        has_prior: whether there is something to sample from; a model that translates its data has none, and its
            pictures are those of `pictures` alone.
    """

    takes: ClassVar[tuple[str, ...]] = ("images", "points")
    samples_by_class: ClassVar[bool] = True
    domains: ClassVar[int] = 1
    has_prior: ClassVar[bool] = True
    presets: ClassVar[dict[str, Preset]] = {}
    hparams: dict[str, Any]

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__init__ = recorded(cls.__init__)

    @recorded
    def __init__(self, shape: tuple[int, ...], grey_levels: int | None = None, num_classes: int | None = None):
        super().__init__()
        if grey_levels is not None and not 2 <= grey_levels <= 65536:
            raise ValueError(
                f"{type(self).__name__}: grey_levels must be an integer from 2 to 65536, got {grey_levels}"
            )
        self.shape, self.grey_levels, self.num_classes = shape, grey_levels, num_classes
        self.dim = math.prod(shape)
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
        return cls(**{**cls.presets[name].sizes, **overrides})

    @classmethod
    def fit_to(cls, form: Form) -> dict[str, Any]:
        """The constructor arguments that follow from the data: ``shape`` and ``grey_levels``, where the constructor has
        them. Whether labels play a part, ``num_classes``, is the user's to say.

        Raises:
            UsageError: the model is none of such data; names those that are.
        """
        data = "images" if len(form.shape) == 3 else "points"
        if data not in cls.takes:
            others = " or ".join(", ".join(names_taking(data)).rsplit(", ", 1))
            raise UsageError(
                f"{cls.__name__} is a model of {' and '.join(cls.takes)}, the data are {data}: try {others}"
            )
        check_domains(cls, form)
        parameters = inspect.signature(cls).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        facts = {"shape": form.shape, "grey_levels": form.grey_levels}
        return {name: fact for name, fact in facts.items() if takes_any or name in parameters}

    # --- training and judging -------------------------------------------------------------------------------------

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

    def report(self, x: Tensor, y: Tensor) -> list[str]:
        """Lines for ``genkernels eval`` beside the estimates, from one batch of examples: what else a reader must know
        to trust them."""
        return []

    # --- helpers --------------------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        if local_metadata.get("assign_to_params_buffers"):
            follow_assigned(self, state_dict)

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

    @property
    def measure(self) -> str:
        """What `cost` is called: ``bits_per_dim`` of images, ``nats`` of points."""
        return "bits_per_dim" if len(self.shape) == 3 else "nats"

    @property
    def unit(self) -> str:
        return "bits/dim" if len(self.shape) == 3 else "nats"

    def log_prob(self, x: Tensor, y: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        raise NotImplementedError

    def bits_per_dim(self, x: Tensor, y: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """``-log_prob / (D ln 2)``, ``[N]``: the bits that each value costs."""
        return self.log_prob(x, y, generator) / (-self.dim * math.log(2))

    def cost(self, log_prob: Tensor) -> Tensor:
        """A log-density as it is judged: in bits/dim for images, negative for points."""
        return log_prob / (-self.dim * math.log(2)) if len(self.shape) == 3 else -log_prob

    def loss(self, x: Tensor, y: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """What training minimises: the mean bits/dim of images, the mean negative log-density (nats) of points."""
        return self.cost(self.log_prob(x, y, generator)).mean()

    def losses(self, player: str, x: Tensor, y: Tensor, step: int) -> dict[str, Tensor]:
        return {"loss": self.loss(x, y)}

    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Estimate]:
        """``bits_per_dim`` of images, ``nats`` (the mean negative log-density) of points; in evaluation mode, without a
        graph."""
        with in_mode(self, training=False), torch.no_grad():
            values = [self.cost(self.log_prob(x, y)) for x, y in batches]
        values = torch.cat(values) if values else torch.empty(0)
        return {self.measure: Estimate.of(self.measure, self.unit, values)}
