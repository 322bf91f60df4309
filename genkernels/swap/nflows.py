"""nflows: couplings and masked autoregressive transforms, affine and by splines, the 1×1 convolution, sampling without
graphs."""

from __future__ import annotations

import torch
from nflows import flows, transforms
from nflows.transforms import made as nflows_made
from nflows.transforms.nonlinearities import PiecewiseRationalQuadraticCDF as Elementwise
from torch import Tensor

from genkernels._options import Layout, ScaleMap, Split
from genkernels.nn._log_det import per_sample
from genkernels.nn._pixelwise import pixelwise_linear
from genkernels.swap import _spline
from genkernels.swap._coupling import Coupling, pays
from genkernels.swap._features import Features, couple
from genkernels.swap._residual_made import inverse_refused, run_made
from genkernels.swap._rules import ACTNORM, Becomes, Library, becomes, left_alone, stays

#: What nflows adds to each of its scales.
FLOOR = 1e-3


class _Coupling:
    """Both directions of a coupling in one pass; the network is called as ever."""

    def forward(self, inputs, context=None):
        return self._gk_couple(inputs, context, inverse=False)

    def inverse(self, inputs, context=None):
        return self._gk_couple(inputs, context, inverse=True)

    def _gk_couple(self, inputs: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        if left_alone(self) or inputs.dim() not in (2, 4) or inputs.shape[1] != self.features:
            return (super().inverse if inverse else super().forward)(inputs, context)
        if not hasattr(self, "_gk_features"):
            self._gk_features = Features()
        self._gk_features.look(self.identity_features, self.transform_features)
        if not self._gk_features.pays(inputs):
            return (super().inverse if inverse else super().forward)(inputs, context)
        return couple(
            self._gk_features, inputs, lambda half: self.transform_net(half, context), inverse, self._gk_coupling
        )


class AffineCoupling(_Coupling, transforms.AffineCouplingTransform):
    """`nflows.transforms.AffineCouplingTransform`: σ = sigmoid(s + 2) + 1e-3, shifts first."""

    _gk_coupling = Coupling(ScaleMap.SIGMOID_FLOOR, FLOOR, Layout.SHIFT_HALVES)


class AdditiveCoupling(_Coupling, transforms.AdditiveCouplingTransform):
    """`nflows.transforms.AdditiveCouplingTransform`."""

    _gk_coupling = None


def _coupling(to: type):
    def rule(thing) -> Becomes | str:
        if thing.unconditional_transform is not None:
            return "its other features have a transform of their own"
        return Becomes(to)

    return rule


class MaskedAffineAutoregressive(transforms.MaskedAffineAutoregressiveTransform):
    """`nflows.transforms.MaskedAffineAutoregressiveTransform`: all of it in one call, its inverse as a solve."""

    def forward(self, inputs, context=None):
        if left_alone(self):
            return super().forward(inputs, context)
        if (found := self._gk_run(inputs, context, inverse=False)) is not None:
            return found
        if not pays(inputs):
            return super().forward(inputs, context)
        params = self.autoregressive_net(inputs, context)
        coupling = Coupling(ScaleMap.SOFTPLUS_FLOOR, self._epsilon, Layout.INTERLEAVED)
        return coupling(inputs, params, Split.NONE)

    def inverse(self, inputs, context=None):
        solved = None if left_alone(self) else self._gk_run(inputs, context, inverse=True)
        return super().inverse(inputs, context) if solved is None else solved

    def _gk_run(self, inputs, context, inverse):
        return run_made(self, nflows_made, inputs, context, self._gk_options, inverse=inverse)

    @property
    def _gk_options(self) -> dict:
        return {"scale_map": "softplus_floor", "scale_constant": self._epsilon}


def _autoregressive(thing) -> Becomes | str:
    why = inverse_refused(thing.autoregressive_net, nflows_made)
    return Becomes(MaskedAffineAutoregressive, f"one direction: the inverse keeps its D passes, {why}" if why else "")


class PiecewiseRationalQuadraticCoupling(_spline.Coupling, transforms.PiecewiseRationalQuadraticCouplingTransform):
    """`nflows.transforms.PiecewiseRationalQuadraticCouplingTransform` with linear tails."""


class MaskedPiecewiseRationalQuadraticAutoregressive(
    _spline.Autoregressive, transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform
):
    """`nflows.transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform` with linear tails."""

    _gk_made = nflows_made


class PiecewiseRationalQuadraticCDF(_spline.Elementwise, Elementwise):
    """`nflows.transforms.PiecewiseRationalQuadraticCDF` with linear tails."""


class OneByOneConvolution(transforms.OneByOneConvolution):
    """`nflows.transforms.OneByOneConvolution`: permutation, L and U as one matrix, so one pass over the pixels."""

    def forward(self, inputs, context=None):
        if left_alone(self) or inputs.dim() != 4 or inputs.shape[1] != self.features:
            return super().forward(inputs, context)
        lower, upper = self._create_lower_upper()
        weight = (lower @ upper)[:, torch.argsort(self.permutation._permutation)]
        outputs = pixelwise_linear(inputs, weight) + self.bias.view(1, -1, 1, 1)
        return outputs, per_sample(self.logabsdet(), inputs).contiguous()

    def inverse(self, inputs, context=None):
        if left_alone(self) or inputs.dim() != 4 or inputs.shape[1] != self.features:
            return super().inverse(inputs, context)
        lower, upper = (t.double() for t in self._create_lower_upper())
        identity = torch.eye(self.features, dtype=torch.float64, device=inputs.device)
        half_way = torch.linalg.solve_triangular(lower, identity, upper=False, unitriangular=True)
        weight = torch.linalg.solve_triangular(upper, half_way, upper=True)[self.permutation._permutation.argsort()]
        outputs = pixelwise_linear(inputs - self.bias.view(1, -1, 1, 1), weight)
        return outputs, per_sample(-self.logabsdet(), inputs).contiguous()


def _convolution(thing) -> Becomes | str:
    if thing.using_cache:
        return "it keeps its matrices in evaluation by itself"
    return Becomes(OneByOneConvolution)


class Flow(flows.Flow):
    """`nflows.flows.Flow`: ``sample`` keeps no graph."""

    @torch.no_grad()
    def _sample(self, num_samples, context):
        return super()._sample(num_samples, context)


LIBRARY = Library(
    "nflows",
    ("0.14",),
    {
        transforms.AffineCouplingTransform: _coupling(AffineCoupling),
        transforms.AdditiveCouplingTransform: _coupling(AdditiveCoupling),
        transforms.MaskedAffineAutoregressiveTransform: _autoregressive,
        transforms.OneByOneConvolution: _convolution,
        transforms.ActNorm: stays(ACTNORM),
        transforms.PiecewiseRationalQuadraticCouplingTransform: _spline.rule(PiecewiseRationalQuadraticCoupling),
        transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform: _spline.rule(
            MaskedPiecewiseRationalQuadraticAutoregressive
        ),
        Elementwise: _spline.rule(PiecewiseRationalQuadraticCDF),
        flows.Flow: becomes(Flow, "sample keeps no graph; what needs one calls the transform's inverse"),
    },
)
