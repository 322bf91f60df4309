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
from genkernels.swap._made import Layer, Sorted
from genkernels.swap._rules import is_relu


def solve_made(transform, made: ModuleType, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """The inverse of an autoregressive transform by the blocked solve, None where its network is not one for it.

    Args:
        transform: has ``autoregressive_net``, ``features`` and ``_gk_options``, those of `made_inverse`.
        made: the library's module with the classes of the network.
    """
    network = transform.autoregressive_net
    if z.dim() != 2 or z.shape[1] != transform.features or _why_not(network, made, context is not None):
        return None
    layers = _layers(network)
    if not hasattr(transform, "_gk_sorted"):
        transform._gk_sorted, transform._gk_places = Sorted(), torch.arange(transform.features)
    if not transform._gk_sorted.look([layer.mask for layer in layers], transform._gk_places, 0, 1):
        return None
    added = None if context is None else network.activation(network.context_layer(context))
    options: dict[str, Any] = transform._gk_options
    return transform._gk_sorted.solve(z, layers, added, residual=_residual(network), **options)


def inverse_refused(network, made: ModuleType, features: int) -> str:
    """Why the inverse of a network is not solved by blocks, "" where it is."""
    if why := _why_not(network, made, hasattr(network, "context_layer")):
        return why
    masks = [layer.mask for layer in _layers(network)]
    return "" if Sorted().look(masks, torch.arange(features), 0, 1) else "for its masks"


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
