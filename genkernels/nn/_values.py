"""What layers look at in the values that they are handed, and when they may."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.autograd import forward_ad

from genkernels.nn._seen import wrapped


def readable(x: Tensor) -> bool:
    """Whether values can be checked for free: on the CPU, and neither while ``torch.compile`` traces, which would break
    the graph there, nor inside ``torch.func``. A look at another device would stall it."""
    return x.device.type == "cpu" and x.numel() > 0 and not (torch.compiler.is_compiling() or wrapped(x))


def level_indices(name: str, x: Tensor, levels: int, instead: str) -> Tensor:
    """Grey levels of images: uint8 indices as they are, floats in [0, 1] as the nearest ``k/(levels - 1)``, a float.

    Args:
        instead: what a user does who wants a gradient.

    Raises:
        TypeError: integers other than uint8. RuntimeError: x asks for a gradient, which would be 0.
        ValueError: values out of range; looked at where that is free. NaN stays NaN.
    """
    if not (x.is_floating_point() or x.dtype == torch.uint8):
        raise TypeError(f"{name}: x must be uint8 level indices or floats in [0, 1], got {x.dtype}")
    refuse_gradient(x, f"{name}: x is rounded to grey levels", instead)
    look = readable(x)
    if look:
        low, high = (bound.item() for bound in x.aminmax())
        top = levels - 1 if x.dtype == torch.uint8 else 1
        if low < 0 or high > top:  # false for NaN
            kind = f"level indices 0..{top}" if x.dtype == torch.uint8 else "floats in [0, 1]"
            raise ValueError(f"{name}: x must hold {kind}, got values from {low} to {high}")
    if x.dtype == torch.uint8:
        return x
    scaled = x * (levels - 1)
    index = scaled.round()
    # of a dtype too coarse to hold the grid nothing can be said
    if look and (scaled - index).abs().amax() > max(1e-3, levels * torch.finfo(x.dtype).eps):
        warnings.warn(
            f"{name}: some floats are not on the grid k/{levels - 1} and were rounded to their nearest level: divide "
            f"level indices by {levels - 1}, or hand them over as uint8",
            stacklevel=4,
        )
    return index


def refuse_gradient(x: Tensor, why: str, instead: str) -> None:
    """Rounding has the gradient 0, which looks like an answer; the tangent of forward mode too."""
    dual = forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None
    if dual or (x.requires_grad and torch.is_grad_enabled()):
        raise RuntimeError(f"{why}, whose gradient is 0, and it asks for one: {instead}")


def check_batched(name: str, x: Tensor) -> None:
    """Pictures come in batches: of three dimensions the first might be samples or channels."""
    if x.dim() in (0, 1, 3):
        raise ValueError(
            f"{name}: x must be [N, D] or [N, C, H, W], got {list(x.shape)}"
            + (
                ": one picture is x[None], pictures without channels x[:, None], sequences x[:, :, None]"
                * (x.dim() == 3)
            )
        )


def check_channels(name: str, x: Tensor, channels: int) -> None:
    """Floats with `channels` in dimension 1: a layer's weights follow the dtype of x, and integers would cut them."""
    if not x.is_floating_point():
        raise TypeError(f"{name}: x must be floating point, got {x.dtype}")
    if x.dim() < 2 or x.shape[1] != channels:
        raise ValueError(f"{name}: x must be [N, {channels}, ...], got {list(x.shape)}")
