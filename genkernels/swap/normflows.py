"""normflows: couplings and masked autoregressive flows, affine and by splines, and planar flows.

normflows runs from noise to data: its ``forward`` is the operators' forward map all the same, by the scale map that
says so (`sigmoid_inverse`: a division by the sigmoid).
"""

from __future__ import annotations

import torch
from normflows import flows
from normflows.flows import reshape, residual
from normflows.flows.affine.autoregressive import MaskedAffineAutoregressive as Autoregressive
from normflows.flows.affine.coupling import AffineCoupling
from normflows.flows.neural_spline import autoregressive as splines_autoregressive
from normflows.flows.neural_spline import coupling as splines_coupling
from normflows.nets import made as normflows_made
from torch import Tensor

from genkernels import ops
from genkernels._options import Layout, ScaleMap, Split
from genkernels.networks._plain import hooked
from genkernels.nn._seen import Seen
from genkernels.swap import _spline, normflows_residual
from genkernels.swap._coupling import Coupling, pays
from genkernels.swap._residual_made import inverse_refused, run_made
from genkernels.swap._rules import ACTNORM, Becomes, Library, left_alone, stays

#: The operator by normflows's scale map.
COUPLINGS = {
    name: Coupling(scale_map, 1.0, Layout.SHIFT_INTERLEAVED)
    for name, scale_map in (
        ("exp", ScaleMap.EXP), ("sigmoid", ScaleMap.SIGMOID_INVERSE), ("sigmoid_inv", ScaleMap.SIGMOID),
    )
}  # fmt: skip
FLOOR = 1e-3
#: How a coupling splits.
CHECKERED = "checkerboard"
MODES = ("channel", "channel_inv", CHECKERED, f"{CHECKERED}_inv")
#: Beyond so many values on a CPU one planar layer by the operator is slower than by PyTorch (forward and backward on
#: one core: 256×8 0.26 ms against 0.40 ms, 4096×64 1.8 ms against 1.4 ms).
LARGE = 1 << 14
#: The same of a radial layer (4096×16 1.2 times as fast, 4096×64 0.7 times without a graph).
LARGE_RADIAL = 1 << 16


class AffineCouplingBlock(flows.AffineCouplingBlock):
    """`normflows.flows.AffineCouplingBlock`: shifts and log-scales in turns."""

    def forward(self, z):
        return self._gk_couple(z, inverse=False)

    def inverse(self, z):
        return self._gk_couple(z, inverse=True)

    def _gk_couple(self, z: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        split, coupling, merge = self._modules["flows"]._modules.values()
        if left_alone(self) or _why_not(split, coupling, merge) or z.dim() < 2:
            return self._gk_by_normflows(z, inverse)
        mode, fused, large = split.mode, COUPLINGS[coupling.scale_map], pays(z)
        checkered, flip = CHECKERED in mode, "inv" in mode
        half, odd = divmod(z.shape[-1 if checkered else 1], 2)
        if odd:
            return self._gk_by_normflows(z, inverse)
        if large and not checkered:
            params = coupling.param_map(z.narrow(1, half if flip else 0, half))
            return fused(z, params, Split.CHANNEL, flip, inverse)
        seen, moving = (_colours if checkered else _halves)(z, flip)
        params = coupling.param_map(seen)
        moved, log_det = (fused if large else fused.plainly)(moving, params, inverse=inverse)
        if checkered:
            return _checkerboard(seen, moved, flip), log_det
        return torch.cat((moved, seen) if flip else (seen, moved), 1), log_det

    def _gk_by_normflows(self, z: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return super().inverse(z) if inverse else super().forward(z)


def _halves(z: Tensor, flip: bool) -> tuple[Tensor, Tensor]:
    first, second = z.chunk(2, 1)
    return (second, first) if flip else (first, second)


def _even_rows(x: Tensor) -> Tensor:
    """Where the indices of a row, the sample's left out, add up to an even number."""
    even = torch.ones([1] * x.dim(), dtype=torch.bool, device=x.device)
    for dim, count in enumerate(x.shape[1:-1], 1):
        odd = torch.arange(count, device=x.device) % 2 == 1
        even = even ^ odd.view([-1 if i == dim else 1 for i in range(x.dim())])
    return even


def _colours(z: Tensor, flip: bool) -> tuple[Tensor, Tensor]:
    """The numbers of z whose indices add up to an odd number, and the others; the last dimension is halved."""
    left, right, even = z[..., 0::2], z[..., 1::2], _even_rows(z)
    odds, evens = torch.where(even, right, left), torch.where(even, left, right)
    return (evens, odds) if flip else (odds, evens)


def _checkerboard(one: Tensor, two: Tensor, flip: bool) -> Tensor:
    """The inverse of `_colours`."""
    odds, evens = (two, one) if flip else (one, two)
    even = _even_rows(one)
    return torch.stack([torch.where(even, evens, odds), torch.where(even, odds, evens)], -1).flatten(-2)


def _why_not(split, coupling, merge) -> str:
    if type(split) is not reshape.Split or type(coupling) is not AffineCoupling or type(merge) is not reshape.Merge:
        return "a part of it is of another class"
    if hooked(split, coupling, merge):
        return "there are hooks on its parts"
    if split.mode not in MODES or merge.mode != split.mode:
        return "its split and its merge are of different modes"
    if not coupling.scale:
        return "one addition: there is nothing to gain"
    return "" if coupling.scale_map in COUPLINGS else f"its scale map is {coupling.scale_map}"


def _coupling(thing) -> Becomes | str:
    return _why_not(*thing.flows) or Becomes(AffineCouplingBlock)


class MaskedAffineAutoregressive(Autoregressive):
    """`normflows.flows.MaskedAffineAutoregressive`: σ = sigmoid(s + 2) + 1e-3; one call, its inverse as a solve."""

    _gk_options = {"scale_map": "sigmoid_floor", "scale_constant": FLOOR}

    def forward(self, inputs, context=None):
        if left_alone(self):
            return super().forward(inputs, context)
        if (found := self._gk_run(inputs, context, inverse=False)) is not None:
            return found
        if not pays(inputs):
            return super().forward(inputs, context)
        params = self.autoregressive_net(inputs, context)
        return Coupling(ScaleMap.SIGMOID_FLOOR, FLOOR, Layout.INTERLEAVED)(inputs, params, Split.NONE)

    def inverse(self, inputs, context=None):
        solved = None if left_alone(self) else self._gk_run(inputs, context, inverse=True)
        return super().inverse(inputs, context) if solved is None else solved

    def _gk_run(self, inputs, context, inverse):
        return run_made(self, normflows_made, inputs, context, self._gk_options, inverse=inverse)


def _autoregressive(thing) -> Becomes | str:
    why = inverse_refused(thing.autoregressive_net, normflows_made)
    return Becomes(MaskedAffineAutoregressive, f"one direction: the inverse keeps its D passes, {why}" if why else "")


class PiecewiseRationalQuadraticCoupling(_spline.Coupling, splines_coupling.PiecewiseRationalQuadraticCoupling):
    """`normflows.flows.neural_spline.coupling.PiecewiseRationalQuadraticCoupling` with tails."""

    _gk_angles = True


class PiecewiseRationalQuadraticCDF(_spline.Elementwise, splines_coupling.PiecewiseRationalQuadraticCDF):
    """`normflows.flows.neural_spline.coupling.PiecewiseRationalQuadraticCDF` with tails."""

    _gk_angles = True


class MaskedPiecewiseRationalQuadraticAutoregressive(
    _spline.Autoregressive, splines_autoregressive.MaskedPiecewiseRationalQuadraticAutoregressive
):
    """`normflows.flows.neural_spline.autoregressive.MaskedPiecewiseRationalQuadraticAutoregressive` with tails."""

    _gk_angles, _gk_made = True, normflows_made


class Planar(flows.Planar):
    """`normflows.flows.Planar` with tanh, of points."""

    def forward(self, z):
        large = z.device.type == "cpu" and z.numel() > LARGE
        if left_alone(self) or z.dim() != 2 or z.dtype != self.w.dtype or large:
            return super().forward(z)
        return ops.planar_flow(z, self.w, self.u, self.b.reshape(1))


def _planar(thing) -> Becomes | str:
    if thing.act != "tanh":
        return f"its activation is {thing.act}"
    if thing.w.dim() != 2 or thing.u.shape != thing.w.shape or thing.b.numel() != 1:
        return "not of points"
    return Becomes(Planar)


class Radial(flows.Radial):
    """`normflows.flows.Radial`: |α| in place of the operator's softplus, the same softplus for what β adds to it."""

    def forward(self, z):
        fits = z.dtype == self.z_0.dtype and z.dim() > 1 and z.shape[1:] == self.z_0.shape[1:]
        if left_alone(self) or not fits or (z.device.type == "cpu" and z.numel() > LARGE_RADIAL):
            return super().forward(z)
        inner = self.alpha.abs().clamp(min=SMALLEST)
        raw = inner + torch.log(-torch.expm1(-inner))
        moved, log_det = ops.radial_flow(z.flatten(1), self.z_0.flatten(1), raw, self.beta)
        return moved.view(z.shape), log_det


#: Where |α| is taken to be this, softplus is as small as the operator lets it be.
SMALLEST = 1e-18


def _radial(thing) -> Becomes | str:
    if thing.z_0.dim() < 2 or thing.z_0.shape[0] != 1 or int(thing.d) != thing.z_0.numel():
        return "its centre is not one point of its shape"
    return Becomes(Radial)


class MaskedAffineFlow(flows.MaskedAffineFlow):
    """`normflows.flows.MaskedAffineFlow` by a mask of zeros and ones: log-scales and shifts are masked, not results."""

    def forward(self, z):
        return self._gk_map(z, inverse=False)

    def inverse(self, z):
        return self._gk_map(z, inverse=True)

    def _gk_map(self, z: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        if left_alone(self) or z.dtype != self.b.dtype or not self._gk_is_binary():
            return super().inverse(z) if inverse else super().forward(z)
        passing, moving = self.b * z, 1 - self.b
        version = None if passing.is_inference() else passing._version
        log_scale, shift = (_masked(net(passing), moving) for net in (self.s, self.t))
        if inverse:
            log_scale = -log_scale
            moved = (z - shift) * torch.exp(log_scale)
        else:
            moved = torch.addcmul(shift, z, torch.exp(log_scale))
        if version is None or passing._version != version:  # a network that writes over its input changes what passes
            moved = passing + moving * moved
        return moved, log_scale.sum(list(range(1, self.b.dim())))

    def _gk_is_binary(self) -> bool:
        if not hasattr(self, "_gk_seen"):
            self._gk_seen = Seen()
        if not self._gk_seen.holds(self.b):
            self._gk_binary = _is_binary(self.b)
            self._gk_seen.note(self.b)
        return self._gk_binary


def _masked(params: Tensor, mask: Tensor) -> Tensor:
    """``params * mask``, with NaN wherever params are not finite, as normflows has it."""
    return torch.addcmul(0 * params.detach(), params, mask)


def _is_binary(mask: Tensor) -> bool:
    return bool(((mask == 0) | (mask == 1)).all())


def _masked_affine(thing) -> Becomes | str:
    return Becomes(MaskedAffineFlow) if _is_binary(thing.b) else "its mask is not of zeros and ones"


#: What only calls its parts.
WHOLES = (
    flows.GlowBlock,  # its ActNorm and its 1×1 convolution as one save 0.3 to 4 % of it, at other roundings
    flows.Residual,
    flows.CoupledRationalQuadraticSpline,
    flows.CircularCoupledRationalQuadraticSpline,
    flows.AutoregressiveRationalQuadraticSpline,
    flows.CircularAutoregressiveRationalQuadraticSpline,
)

LIBRARY = Library(
    "normflows",
    ("1.7.3",),
    {
        flows.AffineCouplingBlock: _coupling,
        Autoregressive: _autoregressive,
        flows.Planar: _planar,
        splines_coupling.PiecewiseRationalQuadraticCoupling: _spline.rule(PiecewiseRationalQuadraticCoupling),
        splines_coupling.PiecewiseRationalQuadraticCDF: _spline.rule(PiecewiseRationalQuadraticCDF),
        splines_autoregressive.MaskedPiecewiseRationalQuadraticAutoregressive: _spline.rule(
            MaskedPiecewiseRationalQuadraticAutoregressive
        ),
        **dict.fromkeys(WHOLES, stays("its parts are swapped one by one")),
        flows.Radial: _radial,
        flows.MaskedAffineFlow: _masked_affine,
        residual.iResBlock: normflows_residual.rule,
        flows.Invertible1x1Conv: stays("one convolution already"),
        flows.ActNorm: stays(ACTNORM),
    },
)
