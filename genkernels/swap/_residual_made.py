"""The MADE of Durkan et al.'s neural spline flows, which nflows and normflows both have, with small differences.

With residual blocks both compute what the blocked solve takes. Without, nflows has an activation after the first layer
and normflows has none; a context enters nflows's first layer through the activation, and its residual blocks as well,
as it does normflows's.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from genkernels.networks._plain import hooked
from genkernels.swap._made import Layer, Sorted, one_call, small
from genkernels.swap._rules import is_relu


def run_made(
    transform,
    made: ModuleType,
    x: Tensor,
    context: Tensor | None,
    options: dict[str, Any],
    *,
    inverse: bool,
    numbers: int = 2,
) -> tuple[Tensor, Tensor] | None:
    """An autoregressive transform as one call, or its inverse as the blocked solve; None where the network is not one
    for it, or the call does not pay.

    Args:
        transform: has ``autoregressive_net``.
        made: the library's module with the classes of the network.
        options: of `made_forward`, `made_inverse` or `made_spline_inverse`. numbers: how many parameters a feature has.
    """
    network = transform.autoregressive_net
    if x.dim() != 2 or (not inverse and small(transform, network, x)) or _why_not(network, made, context is not None):
        return None
    layers = _layers(network)
    if x.shape[1] != layers[0].weight.shape[1] or not (inverse or one_call(x, layers)):
        return None
    if not hasattr(transform, "_gk_sorted"):
        transform._gk_sorted = Sorted()
    if not _look(transform._gk_sorted, network, layers, numbers):
        return None
    added = None if context is None else network.activation(network.context_layer(context))
    return transform._gk_sorted.run(x, layers, added, inverse, residual=_residual(network), **options)


def inverse_refused(network, made: ModuleType, numbers: int = 2) -> str:
    """Why the inverse of a network is not solved by blocks, "" where it is."""
    if why := _why_not(network, made, hasattr(network, "context_layer")):
        return why
    return "" if _look(Sorted(), network, _layers(network), numbers) else "for its masks"


def _look(units: Sorted, network, layers: list[Layer], numbers: int) -> bool:
    return units.look([layer.mask for layer in layers], network.final_layer.degrees, range(numbers))


def _residual(network) -> bool:
    return type(network.blocks[0]).__name__ == "MaskedResidualBlock"


def _layers(network) -> list[Layer]:
    layers = [network.initial_layer]
    for block in network.blocks:
        layers += block.linear_layers if _residual(network) else [block.linear]
    return [Layer(layer.weight, layer.bias, layer.mask) for layer in (*layers, network.final_layer)]


def _why_not(network, made: ModuleType, context: bool) -> str:
    if type(network) is not made.MADE or not len(network.blocks):
        return "for its network, which is no MADE with hidden blocks"
    kinds = {type(block) for block in network.blocks}
    if kinds not in ({made.MaskedResidualBlock}, {made.MaskedFeedforwardBlock}):
        return "for a block of another class"
    residual = kinds == {made.MaskedResidualBlock}
    after_first = hasattr(network, "activation")  # nflows
    if not residual and not after_first:
        return "for its first layer, which has no activation"
    if residual and context:
        return "for its residual blocks, which see the context too"
    if type(getattr(network, "preprocessing", None)) not in (type(None), torch.nn.Identity):
        return "for its preprocessing"
    parts = [network, network.initial_layer, network.final_layer]
    for block in network.blocks:
        if getattr(block, "use_batch_norm", False) or getattr(block, "batch_norm", None) is not None:
            return "for batch normalisation in its network"
        if block.dropout.p > 0 and block.dropout.training:
            return "for dropout in its network, in training"
        if not is_relu(block.activation):
            return "for its activation"
        parts += [block, block.dropout, *(block.linear_layers if residual else [block.linear])]
    if after_first and not is_relu(network.activation):
        return "for its activation"
    if any(type(part) is not made.MaskedLinear for part in parts if hasattr(part, "weight")):
        return "for a layer of another class"
    return "for hooks on its layers" if any(hooked(part) for part in parts) else ""
