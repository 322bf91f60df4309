"""Layers and activations of a bounded Lipschitz constant."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from genkernels.networks import operator_norm
from genkernels.nn._modes import in_mode
from genkernels.nn.spectral_norm import LAYERS, SpectralNorm, note_size, spectral_norm_
from genkernels.ops import MATRIX, checks


class _Picklable:
    """Beside a layer whose weight is parametrised, which torch refuses to pickle: its class is made at run time."""

    def __reduce_ex__(self, protocol):
        return _rebuilt, (type(self).__bases__[0],), self.__dict__.copy()


def _rebuilt(cls: type[nn.Module]) -> nn.Module:
    layer = cls.__new__(cls)
    parametrize._inject_new_class(layer)
    parametrize._inject_property(layer, "weight")
    return layer


class LipschitzLinear(_Picklable, nn.Linear):
    """A `torch.nn.Linear` whose Lipschitz constant is at most `coefficient`: its weight is divided by its spectral norm
    where that is larger.

    Equivalent to::

        F.linear(x, weight / max(1, norm(weight) / coefficient), bias)

    Args:
        in_features, out_features, bias, device, dtype: as for `torch.nn.Linear`.
        coefficient: the bound, above 0; below 1 where the layer stands in an invertible residual block.
        n_power_iterations: of an update in training, once a step.
        tolerance: the relative accuracy of the norm in evaluation, where it is searched from where training left it.

    Shapes:
        x ``[..., in]`` → ``[..., out]``.

    Raises:
        ValueError: an option is wrong.

    ``layer.weight`` is the normalised weight; the parameter is ``layer.parametrizations.weight.original``. Layers of
    one model are normalised in one call after `spectral_norm_group`.

    Source: Gouk et al., "Regularisation of neural networks by enforcing Lipschitz continuity", 2018; Behrmann et al.,
    "Invertible residual networks", 2019.
    """

    genkernels_layer = nn.Linear  #: what `genkernels.networks` takes it for

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        coefficient: float = 0.97,
        n_power_iterations: int = 1,
        tolerance: float = 1e-3,
        device=None,
        dtype=None,
    ):
        checks.integer("LipschitzLinear", "in_features", in_features, 1)
        checks.integer("LipschitzLinear", "out_features", out_features, 1)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        spectral_norm_(self, n_power_iterations, coefficient=coefficient, at_most=True, tolerance=tolerance)


class LipschitzConv2d(_Picklable, nn.Conv2d):
    """A `torch.nn.Conv2d` whose Lipschitz constant is at most `coefficient`: its weight is divided by the norm of the
    convolution that it is, with its stride, padding and size of input, where that is larger.

    Equivalent to::

        F.conv2d(x, weight / max(1, norm(convolution) / coefficient), bias, ...)

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            for `torch.nn.Conv2d`; of the padding modes, ``zeros`` and ``circular``.
        input_size: H and W of x. Without it the first pass says it, and copies of the layer that are made before that
            pass (an average of weights) cannot follow it.
        coefficient, n_power_iterations, tolerance: as for `LipschitzLinear`.

    Shapes:
        x ``[N, C, H, W]`` or ``[C, H, W]``. The norm belongs to H and W: another size starts its power iteration anew,
        with a warning.

    Raises:
        ValueError: an option is wrong, or the weight is read before the first pass has said the size of the input.

    Source: as for `LipschitzLinear`.
    """

    genkernels_layer = nn.Conv2d  #: what `genkernels.networks` takes it for
    notes_size = True  #: what `spectral_norm_` reads: no hook is needed for it

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        input_size: tuple[int, int] | None = None,
        coefficient: float = 0.97,
        n_power_iterations: int = 1,
        tolerance: float = 1e-3,
        device=None,
        dtype=None,
    ):
        where = {"padding_mode": padding_mode, "device": device, "dtype": dtype}
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, **where)
        spectral_norm_(
            self, n_power_iterations, operator="convolution", coefficient=coefficient, at_most=True, tolerance=tolerance
        )
        if input_size is not None:
            _size_of(self, input_size, "LipschitzConv2d")

    def forward(self, x: Tensor) -> Tensor:
        note_size(self, x)
        return super().forward(x)


class LipSwish(nn.Module):
    r"""x · sigmoid(softplus(β) x) / 1.1: smooth, and of a Lipschitz constant of at most 1 for every β.

    Equivalent to::

        x * torch.sigmoid(F.softplus(beta) * x) / 1.1

    Args:
        device, dtype: of β, which is learnt and starts at 0.5.

    Source: Chen et al., "Residual flows for invertible generative modeling", 2019.
    """

    genkernels_activation = ("lipswish", "steepness")

    def __init__(self, device=None, dtype=None):
        super().__init__()
        self.beta = nn.Parameter(torch.full((1,), 0.5, device=device, dtype=dtype))

    @property
    def steepness(self) -> Tensor:
        return F.softplus(self.beta)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.steepness * x) / 1.1


class CLipSwish(LipSwish):
    r"""LipSwish of x and of −x side by side, which doubles the channels, by 1.004: of a Lipschitz constant of at most 1
    as a whole.

    Equivalent to::

        lipswish(torch.cat([x, -x], 1)) / 1.004

    Shapes:
        x ``[N, C, ...]`` → ``[N, 2 * C, ...]``.

    Source: Perugachi-Diaz et al., "Invertible DenseNets with concatenated LipSwish", 2021.
    """

    genkernels_activation = ("clipswish", "steepness")

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.cat([x, -x], 1)) / 1.004


@torch.no_grad()
def certify(layer: nn.Module, input_size: Sequence[int] | None = None) -> tuple[float, float]:
    """Two numbers that have the Lipschitz constant of a layer between them: the norm of its weight's map, rounding
    included.

    Power iteration gives a lower bound alone. The upper one is of another kind: a convolution padded by zeros is part
    of a cyclic one on a larger grid, whose norm the Fourier transform gives (`genkernels.networks.operator_norm`).

    Args:
        layer: a ``Linear`` or a convolution of 1 to 3 axes, transposed or not, padded by zeros or circularly; with
            spectral norm the normalised weight counts, as evaluation has it.
        input_size: of a convolution: the size of its input, ``(H, W)``, with or without channels before it. A layer
            that is normalised as a convolution has its own.

    Returns:
        ``(low, high)``. NaN for a weight that is not finite.

    Raises:
        TypeError: no such layer. ValueError: the size does not fit, or is none where the layer has none.

    Example:
        >>> import genkernels as gk
        >>> layer = gk.nn.LipschitzConv2d(8, 8, 3, padding=1, coefficient=0.9)
        >>> low, high = gk.nn.certify(layer, (16, 16))
        >>> low <= high
        True

    Source: Sedghi et al., "The singular values of convolutional layers", 2019, for the transform.
    """
    if not isinstance(layer, LAYERS):
        raise TypeError(f"certify: layer must be a Linear or a convolution, got {type(layer).__name__}")
    geometry = operator_norm.geometry_of(layer)
    size = _size_of(layer, input_size)
    with in_mode(layer, training=False):
        weight = layer.weight
    shapes = operator_norm.sizes_of(layer, size, weight)
    out = () if isinstance(layer, nn.Linear) else shapes[1][1:]
    low, high = operator_norm.bracket(weight, geometry, size, out or None)
    return low.item(), high.item()


def _size_of(layer: nn.Module, input_size: Sequence[int] | None, who: str = "certify") -> tuple[int, ...]:
    """The size of a convolution's input; a layer that is normalised as one begins anew where it is another."""
    if isinstance(layer, nn.Linear):
        return ()
    parts = getattr(layer, "parametrizations", {})
    held = [p for p in (parts["weight"] if "weight" in parts else ()) if isinstance(p, SpectralNorm)]
    own = [tuple(p._v.shape[1:]) for p in held if p.geometry.kind != MATRIX and p._v.numel()]
    if input_size is None:
        if not own:
            raise ValueError("certify: input_size must be the size of the convolution's input, got None")
        return own[0]
    try:
        size = tuple(int(n) for n in input_size)
    except TypeError:
        raise ValueError(f"{who}: input_size must be a list of integers, got {input_size!r}") from None
    dims = len(layer.kernel_size)
    if len(size) == dims + 1 and size[0] == layer.in_channels:
        size = size[1:]
    if len(size) != dims:
        raise ValueError(f"{who}: input_size must have {dims} numbers, or channels before them, got {list(size)}")
    for part in held:
        if part.geometry.kind != MATRIX:
            part.resize(layer, size)
    return size
