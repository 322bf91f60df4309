r"""Affine coupling in plain PyTorch: the definition, the oracle and the fallback.

.. math::
    z_2 = x_2\,\sigma(s) + t,\qquad z_1 = x_1,\qquad \mathrm{ldj} = \sum \log\sigma(s)

with :math:`(s, t)` the parameters that a network computed from :math:`x_1` (Dinh et al. 2015, 2017; Kingma & Dhariwal
2018).

Shapes: ``x [N, C, *spatial]``. Channel split: C even, one half passes, the other is transformed, params ``[N, C,
*spatial]`` (the shift alone, ``[N, C/2, *spatial]``, when additive). Checkerboard split: ``x [N, C, H, W]``, params
``[N, 2*C, H, W]`` at full resolution, of which only the transformed pixels count. No split: all is transformed, params
``[N, 2*C, *spatial]``. Alternating: as the channel split, the halves being every second channel. ldj is ``[N]``, fp32
or wider.

Half inputs are computed in fp32 and cast once, at the end, as the kernels do it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from genkernels._options import Layout, ScaleMap, Split


def log_scale(s: Tensor, scale_map: int, constant: float = 1.0) -> Tensor:
    """log σ(s), finite wherever s is; `log(sigmoid(s))` written out would be −inf below −103."""
    if scale_map == ScaleMap.EXP:
        return s
    if scale_map == ScaleMap.SIGMOID:
        return F.logsigmoid(s + 2)
    if scale_map == ScaleMap.SIGMOID_INVERSE:
        return -F.logsigmoid(s + 2)
    if scale_map == ScaleMap.SIGMOID_FLOOR:
        return torch.log(torch.sigmoid(s + 2) + constant)
    if scale_map == ScaleMap.SOFTPLUS_FLOOR:
        return torch.log(F.softplus(s) + constant)
    if scale_map == ScaleMap.ATAN:
        return constant * torch.atan(s)
    if scale_map == ScaleMap.SOFT_CLIP:
        return s / (1 + (s / constant).abs())
    return constant * torch.tanh(s)


def log_scale_slope(s: Tensor, scale_map: int, constant: float = 1.0) -> Tensor:
    """d log σ / d s."""
    if scale_map == ScaleMap.EXP:
        return torch.ones_like(s)
    if scale_map == ScaleMap.SIGMOID:
        return torch.sigmoid(-(s + 2))
    if scale_map == ScaleMap.SIGMOID_INVERSE:
        return -torch.sigmoid(-(s + 2))
    if scale_map == ScaleMap.SIGMOID_FLOOR:
        sigma = torch.sigmoid(s + 2)
        return sigma * torch.sigmoid(-(s + 2)) / (sigma + constant)
    if scale_map == ScaleMap.SOFTPLUS_FLOOR:
        return torch.where(s > 20, 1, torch.sigmoid(s)) / (F.softplus(s) + constant)
    if scale_map == ScaleMap.ATAN:
        return constant / (1 + s * s)
    if scale_map == ScaleMap.SOFT_CLIP:
        return (1 + (s / constant).abs()) ** -2
    return constant * (1 - torch.tanh(s) ** 2)


def transformed_pixels(height: int, width: int, flip: bool, device: torch.device) -> Tensor:
    """`[H, W]` bool, True where the checkerboard split transforms: odd h + w (flip: even)."""
    rows = torch.arange(height, device=device).unsqueeze(1)
    return (rows + torch.arange(width, device=device)) % 2 == (0 if flip else 1)


def scale_shift(params: Tensor, scale_map: int, layout: int) -> tuple[Tensor | None, Tensor]:
    """Log-scales (None where additive) and shifts, views of params."""
    if scale_map == ScaleMap.ADDITIVE:
        return None, params
    halves = layout in (Layout.HALVES, Layout.SHIFT_HALVES)
    first, second = params.chunk(2, dim=1) if halves else (params[:, 0::2], params[:, 1::2])
    return (second, first) if layout in (Layout.SHIFT_HALVES, Layout.SHIFT_INTERLEAVED) else (first, second)


def _join_scale_shift(s: Tensor | None, t: Tensor, layout: int) -> Tensor:
    if s is None:
        return t
    both = [t, s] if layout in (Layout.SHIFT_HALVES, Layout.SHIFT_INTERLEAVED) else [s, t]
    if layout in (Layout.HALVES, Layout.SHIFT_HALVES):
        return torch.cat(both, dim=1)
    return torch.stack(both, dim=2).flatten(1, 2)


class _Halves:
    """Takes a tensor's transformed part out and puts it back, for either split.

    For the checkerboard the transformed part keeps full size with zeros at the other pixels, so that nothing non-finite
    from them enters a product with zero.
    """

    def __init__(self, x: Tensor, split: int, flip: bool):
        self.flip = flip
        self.whole, self.turns = split == Split.NONE, split == Split.ALTERNATE
        self.mask = None
        if split == Split.CHECKERBOARD:
            self.mask = transformed_pixels(x.shape[-2], x.shape[-1], flip, x.device)

    def moved(self, x: Tensor) -> Tensor:
        if self.mask is not None:
            return x.masked_fill(~self.mask, 0)
        if self.whole:
            return x
        first, second = (x[:, 0::2], x[:, 1::2]) if self.turns else x.chunk(2, dim=1)
        return first if self.flip else second

    def params(self, p: Tensor | None) -> Tensor | None:
        return p if self.mask is None or p is None else p.masked_fill(~self.mask, 0)

    def join(self, x: Tensor, moved: Tensor) -> Tensor:
        """x with its transformed part replaced."""
        moved = moved.to(x.dtype)
        if self.mask is not None:
            return torch.where(self.mask, moved, x)
        if self.whole:
            return moved.clone(memory_format=torch.contiguous_format)
        if self.turns:
            pair = [moved, x[:, 1::2]] if self.flip else [x[:, 0::2], moved]
            return torch.stack(pair, dim=2).flatten(1, 2)
        first, second = x.chunk(2, dim=1)
        return torch.cat([moved, second] if self.flip else [first, moved], dim=1)


def moved_part(x: Tensor, split: int, flip: bool) -> Tensor:
    """What a coupling transforms of x: a view, or, of the checkerboard, x with zeros elsewhere."""
    return _Halves(x, split, flip).moved(x)


def affine_coupling(
    input: Tensor,
    params: Tensor,
    scale_map: int = ScaleMap.EXP,
    constant: float = 1.0,
    split: int = Split.CHANNEL,
    layout: int = Layout.HALVES,
    flip: bool = False,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """`(output, ldj)` of the coupling, or of its inverse."""
    work = torch.promote_types(input.dtype, torch.float32)
    halves = _Halves(input, split, flip)
    s, t = (halves.params(p) for p in scale_shift(params.to(work), scale_map, layout))
    x2 = halves.moved(input).to(work)
    if s is None:
        out2 = x2 - t if inverse else x2 + t
        return halves.join(input, out2), input.new_zeros(input.shape[0], dtype=work)
    ell = log_scale(s, scale_map, constant)
    out2 = (x2 - t) * torch.exp(-ell) if inverse else x2 * torch.exp(ell) + t
    if halves.mask is not None:
        ell = ell.masked_fill(~halves.mask, 0)
    # sum over a list of dimensions, not flatten(1): an empty batch cannot be flattened
    ldj = ell.sum(dim=list(range(1, ell.dim())))
    return halves.join(input, out2), -ldj if inverse else ldj


def affine_coupling_backward(
    grad_output: Tensor | None,
    grad_ldj: Tensor | None,
    input: Tensor,
    params: Tensor,
    scale_map: int = ScaleMap.EXP,
    constant: float = 1.0,
    split: int = Split.CHANNEL,
    layout: int = Layout.HALVES,
    flip: bool = False,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""`(grad_input, grad_params)`; what a missing gradient would have been multiplied by plays no part.

    Forward: :math:`g_{x_2} = g_{z_2}\sigma,\ g_t = g_{z_2},\ g_s = (g_{z_2} x_2 \sigma + g_{\mathrm{ldj}})\,\ell'`.
    Inverse: :math:`g_{z_2} = g_{x_2} e^{-\ell},\ g_t = -g_{z_2},\ g_s = -(g_{x_2} x_2 + g_{\mathrm{ldj}})\,\ell'`.
    """
    if grad_output is None and grad_ldj is None:
        return torch.zeros_like(input), torch.zeros_like(params)
    work = torch.promote_types(input.dtype, torch.float32)
    halves = _Halves(input, split, flip)
    s, t = (halves.params(p) for p in scale_shift(params.to(work), scale_map, layout))
    x2 = halves.moved(input).to(work)
    of_ldj_alone = grad_output is None
    grad_output = torch.zeros_like(input) if of_ldj_alone else grad_output
    g = halves.moved(grad_output).to(work)
    if s is None:
        grad_params = (-g if inverse else g.clone(memory_format=torch.contiguous_format)).to(params.dtype)
        return halves.join(grad_output, g), grad_params.contiguous()
    ell = log_scale(s, scale_map, constant)
    slope = log_scale_slope(s, scale_map, constant)
    g_ldj = input.new_zeros(input.shape[0], dtype=work) if grad_ldj is None else grad_ldj.to(work)
    g_ldj = g_ldj.reshape(-1, *[1] * (input.dim() - 1))
    if of_ldj_alone:  # a zero is not multiplied in: it would turn infinities to NaN
        g_moved, g_t, g_s = g, g, (-g_ldj if inverse else g_ldj) * slope
    elif inverse:
        shrink = torch.exp(-ell)
        g_moved = g * shrink
        g_t = -g_moved
        g_s = -(g * ((x2 - t) * shrink) + g_ldj) * slope
    else:
        scale = torch.exp(ell)
        g_moved = g * scale
        g_t = g
        g_s = (g_moved * x2 + g_ldj) * slope
    grad_params = _join_scale_shift(halves.params(g_s), g_t, layout).to(params.dtype)
    return halves.join(grad_output, g_moved), grad_params


def affine_coupling_reverse(
    grad_output: Tensor | None,
    grad_ldj: Tensor | None,
    output: Tensor,
    params: Tensor,
    scale_map: int = ScaleMap.EXP,
    constant: float = 1.0,
    split: int = Split.CHANNEL,
    layout: int = Layout.HALVES,
    flip: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(input, grad_input, grad_params)` of the forward coupling from its output: reversible flows' backward."""
    codes = (scale_map, constant, split, layout, flip)
    input, _ = affine_coupling(output, params, *codes, True)
    return input, *affine_coupling_backward(grad_output, grad_ldj, input, params, *codes, False)
