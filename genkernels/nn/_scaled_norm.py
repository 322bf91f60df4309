r"""Layers whose normalised weight is never written: what it is divided by goes on their outputs.

Of a layer y = Ŵ x + b, Ŵ = f W, with u, v and σ of W as matrix (`genkernels.reference.spectral_norm` has the maths):

.. math:: y = f z + b,\quad z = W x,\qquad
    \nabla_x = f\, W^\top g,\quad \nabla_W = f G - \tfrac1\sigma \langle G, \hat W\rangle\, u v^\top,\quad
    \langle G, \hat W\rangle = f \langle g, z\rangle

for a gradient g of y, G being the weight gradient of z for g, which is also that by Ŵ. So an update reads W and writes
nothing of its size, and the gradient reads no W for the norm's sake. Bytes, in units of the weights: an update 1 (2
where Ŵ is written); backward, beside the product that makes G, 2 for a convolution, one pass over G in place (3), and
none for a linear layer, whose G = Σ_b g_b x_bᵀ takes the norm's part as one more term. What it costs is two passes over
the outputs and one over the inputs. A linear layer of a few inputs has kernels of its own, for which each product is
one pass over the weight (`genkernels.ops.spectral_norm.LINEAR`; 512×2304, 2 inputs, 2 cores with AVX2, forward and
backward: 1.0 ms, torch's plain layer 1.9).

z is kept for backward beside x and W: y may be written over by what follows. A gradient of the gradient goes through
Ŵ, which is written for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkernels import ops
from genkernels.ops import _autocast as autocast
from genkernels.ops.spectral_norm import APPLY, FEW, LINEAR, LINEAR_BACKWARD

#: Weights of fewer numbers cost less to write than it takes to arrange that they are not.
LARGE = 1 << 17
#: How many numbers of a weight there must be for one of the outputs.
BESIDE = 3

#: The methods of layers that this stands in for.
FORWARDS = {cls: cls.forward for cls in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)}


@functools.cache
def _as(dtype: torch.dtype, value: float) -> float:
    """A number as tensors of this dtype have it."""
    return torch.tensor(value, dtype=dtype).item()


class Found(NamedTuple):
    """u, v and σ of a weight, and what follows from σ."""

    u: Tensor
    v: Tensor
    sigma: Tensor  #: ``[1]``
    plan: list[int]
    coefficient: float
    at_most: bool
    norm: float  #: σ as a number
    factor: float
    divides: bool

    @classmethod
    def of(cls, u: Tensor, v: Tensor, sigma: Tensor, norm: float, plan: list[int], settings) -> Found:
        limit = _as(sigma.dtype, settings.coefficient)
        divides = not norm <= limit if settings.at_most else norm != 0  # by NaN, too
        # as fp32 the quotient of two fp32 numbers is what they give in fp32: the factor is that of the kernels
        factor = limit / norm if divides else 1.0
        return cls(u, v, sigma, plan, settings.coefficient, settings.at_most, norm, factor, divides)

    def apply(self, weight: Tensor) -> Tensor:
        """The normalised weight."""
        with autocast.kept_out(weight):
            return APPLY([weight], [self.u], [self.v], self.sigma, self.plan, self.coefficient, self.at_most)[0]


class Product(NamedTuple):
    """z = W x of a convolution with these options."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.convolution(x, weight, None, *self._options())

    def gradients(self, g: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        """By x, by the weight and by the bias."""
        return torch.ops.aten.convolution_backward(g, x, weight, [weight.shape[0]], *self._options(), needs)

    def _options(self) -> tuple:
        return self.stride, self.padding, self.dilation, False, (0,) * len(self.stride), self.groups


def route(layer: nn.Module, takes: Callable[[nn.Module, Tensor], Tensor | None]) -> bool:
    """Has a layer that is parametrised call `takes` before its own ``forward``, which runs where that gives None.

    It goes into the class that ``torch.nn.utils.parametrize`` has made for this layer, which copies of it share, and is
    gone with that class. Returns whether that could be done: a class with a ``forward`` of its own keeps it.
    """
    cls = type(layer)
    base = next((kind for kind in FORWARDS if issubclass(cls, kind)), None)
    if base is None or cls.forward is not FORWARDS[base]:
        return False
    if base is not nn.Linear and cls._conv_forward is not base._conv_forward:
        return False
    plain = FORWARDS[base]

    def forward(self, input: Tensor) -> Tensor:
        y = None if torch.compiler.is_compiling() else takes(self, input)
        return plain(self, input) if y is None else y

    forward.genkernels_forward = forward, plain  # see `genkernels.networks._registry.forward_of`
    cls.forward = forward
    return True


def suits(layer: nn.Module, weight: Tensor, bias: Tensor | None, x: Tensor) -> bool:
    """Whether a layer can take x so, and saves bytes: by the shapes alone, so that passes alike are computed alike."""
    if type(x) not in (Tensor, nn.Parameter) or x.layout != torch.strided or x.device != weight.device:
        return False
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype):
        return False
    count = outputs(layer, weight, x)
    return weight.numel() >= LARGE and 0 < BESIDE * count <= weight.numel()


def outputs(layer: nn.Module, weight: Tensor, x: Tensor) -> int:
    """How many numbers a layer makes of x; 0 of a single sample without a batch, which a convolution takes too, and
    of what a linear layer cannot take."""
    if weight.dim() == 2:
        fits = x.dim() > 0 and x.shape[-1] == weight.shape[1]  # torch says what does not
        return x.numel() // weight.shape[1] * weight.shape[0] if fits else 0
    if x.dim() != weight.dim():
        return 0
    count = x.shape[0] * weight.shape[0]
    for a, (n, k, d, s) in enumerate(zip(x.shape[2:], weight.shape[2:], layer.dilation, layer.stride, strict=True)):
        reach = d * (k - 1)
        if isinstance(layer.padding, str):
            n += reach if layer.padding == "same" else 0
        else:
            n += 2 * layer.padding[a]
        count *= max(0, (n - reach - 1) // s + 1)
    return count


def forward(layer: nn.Module, weight: Tensor, bias: Tensor | None, x: Tensor, found: Found) -> Tensor:
    """What a layer makes of x with the normalised weight."""
    if weight.dim() == 2:
        if x.dim() == 2:
            return _Linear.apply(x, weight, bias, found)
        return _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias, found).view(*x.shape[:-1], -1)
    padding = layer.padding
    if isinstance(padding, str) or layer.padding_mode != "zeros":
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode)
        padding = (0,) * len(layer.stride)
    return _Convolution.apply(x, weight, bias, found, Product(layer.stride, padding, layer.dilation, layer.groups))


class _Linear(torch.autograd.Function):
    """Of x ``[N, K]``. Of a few inputs all is the time that a weight's bytes take: one kernel each way."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, found: Found) -> Tensor:
        if x.shape[0] <= FEW:
            dense = x.contiguous(), weight.contiguous(), bias if bias is None else bias.contiguous()
            y, z = LINEAR.bare(*dense, found.factor)
        else:
            z = F.linear(x, weight)
            y = z * found.factor if bias is None else torch.add(bias, z, alpha=found.factor)
        ctx.found = found
        ctx.save_for_backward(x, weight, z if ctx.needs_input_grad[1] else None)
        return y

    @staticmethod
    def backward(ctx, g: Tensor):
        x, weight, z = ctx.saved_tensors
        found, needs = ctx.found, ctx.needs_input_grad
        with autocast.kept_out(weight):
            if torch.is_grad_enabled() or ops.transforms_active():
                return *_written(g, x, weight, found, F.linear, [0], needs), None
            by_x, by_weight = None, None
            if needs[1] and x.shape[0] <= FEW:
                norm = found.norm if found.divides else 0.0
                dense = g.contiguous(), x.contiguous(), weight.contiguous(), z.contiguous()
                by_weight, by_x = LINEAR_BACKWARD.bare(*dense, found.u, found.v, found.factor, norm, needs[0])
            elif needs[1]:
                scaled = g * found.factor
                left, right = scaled, x
                if found.divides:  # one more row of a product, where a pass over the gradient would read it again
                    left = torch.cat([scaled, (found.u * ((scaled * z).sum() / -found.norm)).unsqueeze(0)])
                    right = torch.cat([x, found.v.unsqueeze(0)])
                by_weight, by_x = left.t().mm(right), scaled.mm(weight) if needs[0] else None
            elif needs[0]:
                by_x = g.mm(weight).mul_(found.factor)
            return by_x if needs[0] else None, by_weight, g.sum(0) if needs[2] else None, None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, found: Found, product: Product) -> Tensor:
        z = product(x, weight)
        ctx.found, ctx.product = found, product
        ctx.save_for_backward(x, weight, z if ctx.needs_input_grad[1] else None)
        if bias is None:
            return z * found.factor
        return torch.add(bias.view(-1, *[1] * len(product.stride)), z, alpha=found.factor)

    @staticmethod
    def backward(ctx, g: Tensor):
        x, weight, z = ctx.saved_tensors
        found, product, needs = ctx.found, ctx.product, ctx.needs_input_grad[:3]
        with autocast.kept_out(weight):
            if torch.is_grad_enabled() or ops.transforms_active():
                axes = [a for a in range(g.dim()) if a != 1]
                return *_written(g, x, weight, found, product, axes, needs), None, None
            by_x, by_weight, by_bias = product.gradients(g, x, weight, needs)
            if by_x is not None and found.factor != 1:
                by_x.mul_(found.factor)
            if by_weight is not None and found.divides:
                by_weight = by_weight.contiguous()
                u = found.u * ((g * z).sum() * (-found.factor / found.norm))
                by_weight.view(weight.shape[0], -1).addr_(u, found.v, beta=found.factor)
        return by_x, by_weight, by_bias, None, None


def _written(g: Tensor, x: Tensor, weight: Tensor, found: Found, product: Callable, axes: list[int], needs) -> tuple:
    """The gradients as functions of their own, through the weight that is written for it; `axes`: those of outputs
    over which a bias is one number."""
    higher = torch.is_grad_enabled()
    with torch.enable_grad():
        if not higher:
            x, weight = x.detach().requires_grad_(needs[0]), weight.detach().requires_grad_(needs[1])
        wanted = [t for t, needed in zip((x, weight), needs, strict=False) if needed]
        found_by = ()
        if wanted:
            found_by = torch.autograd.grad(product(x, found.apply(weight)), wanted, g, create_graph=higher)
        rest = iter(found_by)
        return *(next(rest) if needed else None for needed in needs[:2]), g.sum(axes) if needs[2] else None
