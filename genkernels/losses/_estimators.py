"""Estimators of the gradient of an importance-weighted bound: what they are called, and how they weigh log-weights.

Each is a sum over samples, :math:`\\sum_i a_i \\nabla_\\theta \\ell_i + b_i \\nabla_\\phi \\ell_i`, with weights that
count as constants: a for the parameters of p, b for those of q.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from genkernels import ops
from genkernels._words import UsageError, nearest

#: What each name may carry behind a colon.
NAMES = {
    "iwae": "",
    "dreg": "",
    "stl": "",
    "miwae": "the number of groups",
    "piwae": "the number of groups",
    "ciwae": "the share of the ELBO",
    "vimco": "",
}


@dataclass(frozen=True)
class Estimator:
    """An estimator of the gradient of the bound, with its setting. `importance_loss` says what each one is.

    Args:
        name: ``iwae``, ``dreg``, ``stl``, ``miwae``, ``piwae``, ``ciwae`` or ``vimco``.
        setting: of ``miwae`` and ``piwae`` the number of groups that the k samples are parted into, which must divide
            k; of ``ciwae`` β, from 0 to 1, the share of the ELBO; of the others None.

    Raises:
        UsageError: a name is unknown, a setting is missing, wrong, or one too many.

    Example:
        >>> from genkernels.losses import Estimator
        >>> Estimator.parse("miwae:5")
        Estimator(name='miwae', setting=5)
    """

    name: str
    setting: float | None = None

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise UsageError(f"estimator must be one of {', '.join(NAMES)}, got {self.name!r}{_nearest(self.name)}")
        meaning, value = NAMES[self.name], self.setting
        if not meaning:
            if value is not None:
                raise UsageError(f"estimator {self.name} takes no setting, got {value!r}")
        elif value is None:
            example = f"{self.name}:0.5" if self.name == "ciwae" else f"{self.name}:5"
            raise UsageError(f"estimator {self.name} must say {meaning}, as in {example!r}, got none")
        elif self.name == "ciwae":
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise UsageError(f"estimator {self.name}: {meaning} must be from 0 to 1, got {value!r}")
        elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UsageError(f"estimator {self.name}: {meaning} must be an integer of at least 1, got {value!r}")

    @classmethod
    def parse(cls, text: str | Estimator) -> Estimator:
        """The estimator that a word names: ``"dreg"``, ``"miwae:5"``, ``"ciwae:0.5"``; an `Estimator` is returned as it
        is.

        Raises:
            UsageError: as for the class, or what stands behind the colon is no number.
        """
        if isinstance(text, Estimator):
            return text
        if not isinstance(text, str):
            raise UsageError(f"estimator must be a word, as 'iwae' or 'miwae:5', got {type(text).__name__}")
        name, colon, number = text.partition(":")
        if not colon:
            return cls(name)
        try:
            setting = float(number) if name == "ciwae" else int(number)
        except ValueError:
            if name not in NAMES:
                return cls(name)  # which refuses
            raise UsageError(f"estimator {name} must have a number behind its colon, got {number!r}") from None
        return cls(name, setting)

    def __str__(self) -> str:
        return self.name if self.setting is None else f"{self.name}:{self.setting:g}"

    @property
    def stopped(self) -> bool:
        """Whether the parameters of q count as constants inside ln q."""
        return self.name in ("dreg", "stl")

    @property
    def weighs_apart(self) -> bool:
        """Whether b is no multiple of a that a latent could carry: two passes back."""
        return self.name in ("piwae", "vimco")

    def check_k(self, who: str, k: int) -> None:
        """That the estimator can be had from k samples."""
        if self.name in ("miwae", "piwae") and k % self.setting:
            raise ValueError(f"{who}: k must be a multiple of the {self.setting} groups of {self}, got {k}")
        if self.name == "vimco" and k < 2:
            raise ValueError(f"{who}: k must be at least 2 for vimco, which sets each sample against the others, got 1")

    def weighed(self, log_w: Tensor) -> Weighed:
        """The bound ``[N]`` of log-weights ``[N, k]``, with its gradient where these have a graph, and the weights."""
        bound, weights = ops.importance_bound(log_w)
        shares = weights.detach()
        by_p, by_q = shares, None
        if self.name in ("miwae", "piwae"):
            rows, groups = len(log_w), self.setting
            in_groups, of_groups = ops.importance_bound(log_w.reshape(rows * groups, -1))
            of_groups = of_groups.detach().reshape(log_w.shape) / groups
            if self.name == "miwae":
                bound, by_p = in_groups.reshape(rows, groups).mean(1), of_groups
            else:
                by_q = of_groups
        elif self.name == "ciwae":
            bound = self.setting * log_w.to(bound.dtype).mean(1) + (1 - self.setting) * bound
            by_p = self.setting / log_w.shape[1] + (1 - self.setting) * shares
        elif self.name == "vimco":
            by_q = shares - _beyond_the_others(log_w.detach(), bound.detach())
        return Weighed(bound, by_p, by_q, shares)


@dataclass(frozen=True, eq=False)
class Weighed:
    """What an estimator makes of log-weights ``[N, k]``."""

    bound: Tensor  #: [N]
    by_p: Tensor  #: [N, k], a
    by_q: Tensor | None  #: [N, k], b, where it is not a; of ``dreg`` its second factor is `shares`, which latents carry
    shares: Tensor  #: [N, k], the samples' shares in the bound of all k


def _beyond_the_others(log_w: Tensor, bound: Tensor) -> Tensor:
    """How much of the bound each sample adds, ``[N, k]``: to what it would be with the geometric mean of the others in
    its place (Mnih & Rezende, 2016, eq. 10)."""
    log_w = log_w.to(bound.dtype)
    k = log_w.shape[1]
    # from both sides of sample i, not by taking it off the whole: of a small rest nothing would be left, of −∞ NaN
    others = _around(log_w, Tensor.cumsum, 0.0, torch.add) / (k - 1)
    sums = _around(log_w, Tensor.logcumsumexp, -math.inf, torch.logaddexp)
    without = sums.logaddexp(others) - math.log(k)
    return (bound[:, None] - without).masked_fill(bound[:, None] == -math.inf, 0)


def _around(values: Tensor, running, nothing: float, join) -> Tensor:
    """What a running sum over each row gives without the entry itself, ``[N, k]``."""
    edge = values.new_full((len(values), 1), nothing)
    before = torch.cat([edge, running(values, 1)[:, :-1]], 1)
    behind = torch.cat([edge, running(values.flip(1), 1)[:, :-1]], 1).flip(1)
    return join(before, behind)


def _nearest(name: object) -> str:
    return nearest(name, NAMES, listed=True)
