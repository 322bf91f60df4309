"""The masked networks of other libraries, read as the operators of `genkernels.ops.made` take one: units by degree.

A network is a list of weights and biases with the degrees of what each layer makes. Whether its masks are those of its
degrees is looked at where they have changed, and so is what follows from them: the orders in which units are sorted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from genkernels import ops
from genkernels.nn._seen import Seen
from genkernels.nn.autoregressive import one_call_pays
from genkernels.reference.made import degree_mask, plan

#: Below so many products of a weight and a value on a CPU a call costs what it saves. Measured on one core, a training
#: step and an evaluation, times as fast: 6 features, 32 units, 256 rows of nflows (1.2 million) 0.91 and 0.87, 64 units
#: (4.5 million) 1.05 and 1.10; 64 features, 512 units, 100 rows 1.34 and 1.64, of zuko 1.42 and 1.87.
SMALL_PRODUCTS = 1 << 22


class Layer(NamedTuple):
    """One masked layer: its weight ``[out, in]``, bias and mask (1 where a weight is live)."""

    weight: Tensor
    bias: Tensor
    mask: Tensor


class Sorted:
    """How the units of a network are sorted by degree, kept until a mask changes."""

    def __init__(self) -> None:
        self._seen: list[Seen] = []
        self.fits = False

    def __deepcopy__(self, memo: dict) -> Sorted:
        return Sorted()

    def __reduce__(self):
        return Sorted, ()

    def look(
        self, masks: Sequence[Tensor], places: Tensor, numbers: Sequence[int], seen_first: int | None = None
    ) -> bool:
        """Whether the masks are those of a network that the blocked solve takes.

        Args:
            masks: of all layers, ``[out, in]``; the last one's outputs are P a feature, side by side.
            places: of the features in the order, ascending from any number; of each or of all its P outputs.
            numbers: which of the P is the operator's first parameter, which the second, ….
            seen_first: how many columns of the first mask are features; the others are a context's.
        """
        watched = [*masks, places]
        if len(self._seen) == len(watched) and all(s.holds(m) for s, m in zip(self._seen, watched, strict=True)):
            return self.fits
        self.fits = self._sort(masks, places, numbers, seen_first)
        self._seen = [Seen() for _ in watched]
        for seen, tensor in zip(self._seen, watched, strict=True):
            seen.note(tensor)
        return self.fits

    @torch.inference_mode(False)  # what is kept, a later pass may save for its backward
    def _sort(self, masks: Sequence[Tensor], places: Tensor, numbers: Sequence[int], seen_first: int | None) -> bool:
        live = [m.detach().cpu() != 0 for m in masks]
        live[0] = live[0][:, :seen_first]
        features, count = live[0].shape[1], len(numbers)
        places = places.detach().cpu()[:: max(1, places.numel() // features)]
        degrees = _degrees(live, torch.argsort(torch.argsort(places)) + 1, count)
        if degrees is None:
            return False
        device = masks[0].device
        rows = [torch.argsort(d, stable=True) for d in degrees[1:]]
        self.columns = [None, *(r.to(device) for r in rows)]
        outputs = torch.cat([count * torch.arange(features) + number for number in numbers])
        self.rows = [*(r.to(device) for r in rows), outputs.to(device)]
        hidden = [d[r] for d, r in zip(degrees[1:], rows, strict=True)]
        order, counts = plan([degrees[0], *hidden])
        self.order, self.counts = order.to(device), counts.to(device)
        return True

    def weights(self, layers: Sequence[Layer]) -> tuple[list[Tensor], list[Tensor]]:
        """The layers with their units sorted; entries that the mask kills never act."""
        weights = []
        for layer, rows, columns in zip(layers, self.rows, self.columns, strict=True):
            weight = layer.weight.index_select(0, rows)
            weights.append(weight if columns is None else weight.index_select(1, columns))
        return weights, [layer.bias.index_select(0, rows) for layer, rows in zip(layers, self.rows, strict=True)]

    def run(
        self, x: Tensor, layers: Sequence[Layer], context: Tensor | None, inverse: bool, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """The transform of x, or its inverse, and the log-determinants."""
        weights, biases = self.weights(layers)
        if context is not None:
            context = context.index_select(1, self.rows[0])
        if inverse:
            function = ops.made_spline_inverse if "parametrization" in options else ops.made_inverse
        else:
            function = ops.made_forward
        return function(x, weights, biases, self.order, self.counts, context=context, **options)


def small(transform: nn.Module, network: nn.Module, x: Tensor) -> bool:
    """Whether x ``[..., D]`` is faster layer by layer on a CPU. To be asked first: to read a network costs as much as a
    pass through a small one, whose number of weights is kept therefore."""
    numbers = vars(transform).get("_gk_weights")
    if numbers is None:
        numbers = transform._gk_weights = sum(p.numel() for p in network.parameters() if p.dim() == 2)
    return x.is_cpu and x.shape[:-1].numel() * numbers < SMALL_PRODUCTS


def one_call(x: Tensor, layers: Sequence[Layer]) -> bool:
    """Whether an affine transform of x ``[N, D]`` is faster as one call, units sorted, than layer by layer."""
    if torch.compiler.is_compiling() or x.dim() != 2 or x.dtype not in (torch.float32, torch.float64):
        return False
    return all(layer.weight.dtype == x.dtype for layer in layers) and one_call_pays(x)


def _degrees(masks: list[Tensor], first: Tensor, count: int) -> list[Tensor] | None:
    """The degrees of the features and of the units of each hidden layer that give these masks, or None. A unit has the
    degree of the last feature that it sees; a feature has `count` outputs."""
    features = first.numel()
    if masks[-1].shape[0] != count * features or masks[0].shape[1] != features:
        return None
    degrees, reach = [first], torch.eye(features, dtype=torch.float32)
    for mask in masks[:-1]:
        reach = (mask.float() @ reach).clamp(max=1)
        degrees.append((reach * first).amax(1).long())
    ends = [*degrees[1:], first.repeat_interleave(count)]
    for i, (mask, into, out) in enumerate(zip(masks, degrees, ends, strict=True)):
        if not torch.equal(mask, degree_mask(into, out, strict=i == len(masks) - 1)):
            return None
    return degrees
