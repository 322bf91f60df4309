"""Couplings whose halves are sets of features: any set passes, the others are transformed.

What an index costs depends on the set. One run of features is a view; every second feature is a view too; any other set
is gathered, by the permutation of all features whose gradient is the inverse permutation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from genkernels._options import Split
from genkernels.nn._log_det import zero_log_det
from genkernels.nn._seen import Seen
from genkernels.swap._coupling import Coupling, pays
from genkernels.swap._spline import Splines

#: How the two sets lie: one run before the other, in turns, or anyhow.
RUNS, TURNS, ANYHOW = "runs", "turns", "anyhow"


class Features:
    """Which features pass and which are transformed, looked at again when the buffers that say so have changed."""

    def __init__(self) -> None:
        self._seen = Seen(), Seen()

    def __deepcopy__(self, memo: dict) -> Features:
        return Features()

    def __reduce__(self):
        return Features, ()

    def look(self, passing: Tensor, moving: Tensor) -> None:
        """`passing`, `moving`: indices, together all features."""
        if self._seen[0].holds(passing) and self._seen[1].holds(moving):
            return
        one, two = passing.tolist(), moving.tolist()
        count = len(one) + len(two)
        self.sizes = len(one), len(two)
        self.flip = bool(two) and two[0] == 0  # the first feature is transformed
        first, second = (two, one) if self.flip else (one, two)
        if first + second == list(range(count)):
            self.kind = RUNS
        elif first == list(range(0, count, 2)) and second == list(range(1, count, 2)) and count % 2 == 0:
            self.kind = TURNS
        else:
            self.kind = ANYHOW
            with torch.inference_mode(False):  # a later pass may save them for its backward
                order = torch.tensor(one + two)
                self.order = order.to(passing.device)
                self.back = torch.argsort(order).to(passing.device)
        self._seen[0].note(passing), self._seen[1].note(moving)

    def pays(self, x: Tensor) -> bool:
        """Whether there is anything to win: a few numbers that have to be gathered cost what they cost elsewhere."""
        return self.kind != ANYHOW or pays(x)

    def split(self) -> Split | None:
        """The operator's own split that does it, None where none does."""
        if self.kind == TURNS:
            return Split.ALTERNATE
        return Split.CHANNEL if self.kind == RUNS and self.sizes[0] == self.sizes[1] else None

    def take(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The features that pass and those that are transformed."""
        if self.kind == TURNS:
            both = x.unflatten(1, (-1, 2)).unbind(2)
            return (both[1], both[0]) if self.flip else both
        if self.kind == RUNS:
            first, second = x.split(self.sizes[::-1] if self.flip else self.sizes, 1)
            return (second, first) if self.flip else (first, second)
        one, two = _Permuted.apply(x, self.order, self.back).split(self.sizes, 1)
        return one, two

    def join(self, passing: Tensor, moved: Tensor) -> Tensor:
        pair = [moved, passing] if self.flip and self.kind != ANYHOW else [passing, moved]
        if self.kind == TURNS:
            return torch.stack(pair, 2).flatten(1, 2)
        joined = torch.cat(pair, 1)
        return joined if self.kind == RUNS else _Permuted.apply(joined, self.back, self.order)


class _Permuted(torch.autograd.Function):
    """``x[:, order]``; the gradient is a permutation too, where that of an index adds up element by element."""

    @staticmethod
    def forward(ctx, x, order, back):
        ctx.save_for_backward(order, back)
        return x.index_select(1, order)

    @staticmethod
    def backward(ctx, grad):
        order, back = ctx.saved_tensors
        return _Permuted.apply(grad, back, order), None, None


def couple(
    features: Features,
    x: Tensor,
    params_of: Callable[[Tensor], Tensor],
    inverse: bool,
    coupling: Coupling | Splines | None,
) -> tuple[Tensor, Tensor]:
    """A coupling of any two sets of features.

    Args:
        features: has looked. x: ``[N, D, ...]``. params_of: gives the parameters from the passing features, which it
            may write into. coupling: None adds the parameters.
    """
    affine = isinstance(coupling, Coupling)
    small = affine and not pays(x)
    passing, moving = features.take(x)
    seen = passing.clone(memory_format=torch.contiguous_format)
    version = None if seen.is_inference() else seen._version
    params = params_of(seen)
    if version is None or seen._version != version:
        passing = seen  # a network that writes over its input changes what passes, in other libraries
    elif affine and not small and (split := features.split()) is not None:
        return coupling(x, params, split, features.flip, inverse)
    if coupling is None:  # one addition: an operator would win nothing
        return features.join(passing, moving - params if inverse else moving + params), zero_log_det(x)
    if small:
        moved, log_det = coupling.plainly(moving, params, inverse)
    else:
        moved, log_det = coupling(moving, params, inverse=inverse)
    return features.join(passing, moved), log_det
