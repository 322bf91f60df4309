"""normflows: couplings and masked autoregressive flows, affine and by splines, and planar flows.

normflows runs from noise to data: its ``forward`` is the operators' forward map all the same, by the scale map that
says so (`sigmoid_inverse`: a division by the sigmoid).
"""

from __future__ import annotations

from normflows import flows
from normflows.flows import reshape
from normflows.flows.affine.autoregressive import MaskedAffineAutoregressive as Autoregressive
from normflows.flows.affine.coupling import AffineCoupling
from normflows.flows.neural_spline import autoregressive as splines_autoregressive
from normflows.flows.neural_spline import coupling as splines_coupling
from normflows.nets import made as normflows_made
from torch import Tensor

from genkernels import ops
from genkernels._options import Layout, ScaleMap, Split
from genkernels.networks._plain import hooked
from genkernels.swap import _spline
from genkernels.swap._coupling import Coupling, pays
from genkernels.swap._residual_made import inverse_refused, solve_made
from genkernels.swap._rules import Becomes, Library, left_alone, stays

#: normflows's scale map: the operator's.
MAPS = {"exp": ScaleMap.EXP, "sigmoid": ScaleMap.SIGMOID_INVERSE, "sigmoid_inv": ScaleMap.SIGMOID}
FLOOR = 1e-3
#: Beyond so many values on a CPU one planar layer by the operator is slower than by PyTorch (forward and backward on
#: one core: 256×8 0.26 ms against 0.40 ms, 4096×64 1.8 ms against 1.4 ms).
LARGE = 1 << 14


class AffineCouplingBlock(flows.AffineCouplingBlock):
    """`normflows.flows.AffineCouplingBlock`, split by channels: shifts and log-scales in turns."""

    def forward(self, z):
        return self._gk_couple(z, inverse=False)

    def inverse(self, z):
        return self._gk_couple(z, inverse=True)

    def _gk_couple(self, z: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        if left_alone(self) or z.dim() < 2 or z.shape[1] % 2 or not pays(z) or _why_not(self):
            return super().inverse(z) if inverse else super().forward(z)
        flip = self.flows[0].mode == "channel_inv"
        coupling = self.flows[1]
        params = coupling.param_map(z.chunk(2, 1)[1 if flip else 0])
        fused = Coupling(MAPS[coupling.scale_map], 1.0, Layout.SHIFT_INTERLEAVED)
        return fused(z, params, Split.CHANNEL, flip, inverse)


def _why_not(block) -> str:
    split, coupling, merge = block.flows
    if [type(part) for part in (split, coupling, merge)] != [reshape.Split, AffineCoupling, reshape.Merge]:
        return "a part of it is of another class"
    if any(hooked(part) for part in (split, coupling, merge)):
        return "there are hooks on its parts"
    if split.mode not in ("channel", "channel_inv") or merge.mode != split.mode:
        return "split by a checkerboard, whose colours its network sees side by side"
    if not coupling.scale:
        return "one addition: there is nothing to gain"
    return "" if coupling.scale_map in MAPS else f"its scale map is {coupling.scale_map}"


def _coupling(thing) -> Becomes | str:
    return _why_not(thing) or Becomes(AffineCouplingBlock)


class MaskedAffineAutoregressive(Autoregressive):
    """`normflows.flows.MaskedAffineAutoregressive`: σ = sigmoid(s + 2) + 1e-3; its inverse as a solve."""

    _gk_options = {"scale_map": "sigmoid_floor", "scale_constant": FLOOR}

    def forward(self, inputs, context=None):
        if left_alone(self) or not pays(inputs):
            return super().forward(inputs, context)
        params = self.autoregressive_net(inputs, context)
        return Coupling(ScaleMap.SIGMOID_FLOOR, FLOOR, Layout.INTERLEAVED)(inputs, params, Split.NONE)

    def inverse(self, inputs, context=None):
        solved = None if left_alone(self) else solve_made(self, normflows_made, inputs, context, self._gk_options)
        return super().inverse(inputs, context) if solved is None else solved


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
        if left_alone(self) or z.dim() != 2 or large:
            return super().forward(z)
        return ops.planar_flow(z, self.w, self.u, self.b.reshape(1))


def _planar(thing) -> Becomes | str:
    if thing.act != "tanh":
        return f"its activation is {thing.act}"
    if thing.w.dim() != 2 or thing.u.shape != thing.w.shape or thing.b.numel() != 1:
        return "not of points"
    return Becomes(Planar)


#: What only calls its parts.
WHOLES = (
    flows.GlowBlock,
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
        flows.MaskedAffineFlow: stays(
            "its mask is of zeros and ones at any place, and its scale and shift two networks"
        ),
        flows.Radial: stays("its parameters are other functions of the radius than the operator's"),
        flows.Residual: stays("not swapped yet"),
        flows.Invertible1x1Conv: stays("one convolution already"),
        flows.ActNorm: stays("one multiplication and one addition: there is nothing to gain"),
    },
)
