"""zuko: masked autoregressive and coupling transforms of affine maps and of rational-quadratic splines.

zuko's modules make a transform (of `torch.distributions`) for each context; so do those that take their place, and what
they make is a subclass of zuko's.
"""

from __future__ import annotations

import functools
import math
from functools import partial
from numbers import Real

import torch
from torch import Tensor, nn
from torch.distributions import Transform
from zuko import flows, transforms
from zuko.nn import MLP, MaskedLinear, MaskedMLP
from zuko.utils import broadcast

from genkernels._options import Layout, ScaleMap
from genkernels.networks._plain import hooked
from genkernels.swap._coupling import Coupling, pays
from genkernels.swap._features import Features, couple
from genkernels.swap._made import Layer, Sorted, one_call, small
from genkernels.swap._rules import Becomes, Library, left_alone
from genkernels.swap._spline import PASSES, Splines

Affine, Spline = transforms.MonotonicAffineTransform, transforms.MonotonicRQSTransform


def _map_of(module) -> Coupling | Splines | None:
    """What a module's maps are to an operator, None where they are others."""
    univariate, options = module.univariate, {}
    if type(univariate) is functools.partial and not univariate.args:
        univariate, options = univariate.func, univariate.keywords
    slope, bound = options.get("slope", 1e-3), options.get("bound", 5.0)
    if not (isinstance(slope, float) and 0 < slope < 1 and isinstance(bound, Real) and bound > 0):
        return None
    shapes = [tuple(shape) for shape in module.shapes]
    if univariate is Affine and set(options) <= {"slope"} and shapes == [(), ()]:
        return Coupling(ScaleMap.SOFT_CLIP, -math.log(slope), Layout.SHIFT_INTERLEAVED)
    if univariate is Spline and set(options) <= {"slope", "bound"} and shapes and len(shapes[0]) == 1:
        (bins,) = shapes[0]
        if bins and shapes == [(bins,), (bins,), (bins - 1,)]:
            return Splines("zuko", bins, float(bound), 1.0, (slope,) * 3)
    return None


def _rows(x: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None, torch.Size]:
    """x and the context as ``[N, D]`` and ``[N, C]``, and the batch's own shape."""
    if c is not None:
        x, c = broadcast(x, c, ignore=1)
        c = c.reshape(-1, c.shape[-1])
    return x.reshape(-1, x.shape[-1]), c, x.shape[:-1]


class _Together(Transform):
    """A transform whose values and log-determinants come together, ``_gk_run(x, inverse)``."""

    def _call(self, x: Tensor) -> Tensor:
        return self._gk_run(x, False)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self._gk_run(y, True)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self._gk_run(x, False)[1]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._gk_run(x, False)


class _Autoregressive(_Together, transforms.AutoregressiveTransform):
    """`zuko.transforms.AutoregressiveTransform` of one module, one context and what its maps are to an operator."""

    def __init__(self, module, context: Tensor | None, maps: Coupling | Splines):
        super().__init__(partial(module.meta, context), module.passes)
        self._module, self._context, self._maps = module, context, maps

    def _inverse(self, y: Tensor) -> Tensor:
        solved = self._module._gk_made(y, self._context, self._maps, inverse=True)
        return transforms.AutoregressiveTransform._inverse(self, y) if solved is None else solved[0]

    def _gk_run(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        module, maps = self._module, self._maps
        affine = isinstance(maps, Coupling)
        if affine and (found := module._gk_made(x, self._context, maps, inverse=False)) is not None:
            return found
        if affine and not pays(x):
            return transforms.AutoregressiveTransform.call_and_ladj(self, x)
        flat, context, batch = _rows(x, self._context)
        params = module.hyper(flat if context is None else torch.cat([flat, context], -1))
        z, log_det = maps(flat, params)
        return z.reshape(*batch, z.shape[-1]), log_det.reshape(batch)


class _OfSplines(_Autoregressive):
    """The same of splines: where the inverse is no solve, each of its passes goes through the operator."""

    def _inverse(self, y: Tensor) -> Tensor:
        module, maps = self._module, self._maps
        solved = module._gk_made(y, self._context, maps, inverse=True)
        if solved is not None:
            return solved[0]
        flat, context, batch = _rows(y, self._context)
        x = torch.zeros_like(flat)
        for _ in range(self.passes):
            x, _ = maps(flat, module.hyper(x if context is None else torch.cat([x, context], -1)), inverse=True)
        return x.reshape(*batch, x.shape[-1])


class MaskedAutoregressiveTransform(flows.autoregressive.MaskedAutoregressiveTransform):
    """`zuko.flows.MaskedAutoregressiveTransform`: affine maps in one call, the inverse of all as a solve."""

    def forward(self, c: Tensor | None = None) -> Transform:
        maps = None if left_alone(self) else _map_of(self)
        if maps is None:
            return super().forward(c)
        return (_OfSplines if isinstance(maps, Splines) else _Autoregressive)(self, c, maps)

    def _gk_made(
        self, x: Tensor, c: Tensor | None, maps: Coupling | Splines, inverse: bool
    ) -> tuple[Tensor, Tensor] | None:
        """The transform or its inverse and the log-determinants; None where the network is not one for the operator,
        or the call does not pay."""
        if (not inverse and small(self, self.hyper, x)) or _why_not(self):
            return None
        features = len(self.order)
        flat, context, batch = _rows(x, c)
        layers = [layer for layer in self.hyper if type(layer) is MaskedLinear]
        if not (inverse or one_call(flat, layers)):
            return None
        first = layers[0]
        if not hasattr(self, "_gk_sorted"):
            self._gk_sorted = Sorted()
        masks = [first.mask, *(layer.mask for layer in layers[1:])]
        affine = isinstance(maps, Coupling)
        numbers = (1, 0) if affine else range(maps.numbers)
        if not self._gk_sorted.look(masks, self.order, numbers, seen_first=features):
            return None
        weight = first.weight[:, :features]
        added = None if context is None else context @ (first.mask * first.weight)[:, features:].mT
        given = [Layer(weight, first.bias, first.mask)]
        given += [Layer(layer.weight, layer.bias, layer.mask) for layer in layers[1:]]
        options = {"scale_map": "soft_clip", **maps.options} if affine else maps.options
        moved, log_det = self._gk_sorted.run(flat, given, added, inverse, **options)
        return moved.reshape(*batch, features), log_det.reshape(batch)


def _why_not(module) -> str:
    network = module.hyper
    if module.order is None:
        return "for its graph of features, which is no order"
    if module.passes != len(module.order):
        return "for its passes, which settle several features each"
    if type(network) is not MaskedMLP or hooked(network):
        return "for its network"
    linear, between = list(network)[0::2], list(network)[1::2]
    if len(linear) < 2 or any(type(layer) is not MaskedLinear or layer.bias is None for layer in linear):
        return "for its residual blocks"
    if any(type(layer) is not nn.ReLU for layer in between):
        return "for its activation"
    return "for hooks on its layers" if any(hooked(layer) for layer in network) else ""


#: Of maps that are no operator's.
OTHERS = "not of affine maps, nor of rational-quadratic splines"


def _masked(thing) -> Becomes | str:
    maps = _map_of(thing)
    if maps is None:
        return OTHERS
    why = _why_not(thing)
    passes = PASSES if isinstance(maps, Splines) else "one direction: the inverse keeps its passes, {}"
    return Becomes(MaskedAutoregressiveTransform, passes.format(why) if why else "")


class _Coupling(_Together, transforms.CouplingTransform):
    """`zuko.transforms.CouplingTransform` of one module and one context."""

    def __init__(self, module, context: Tensor | None):
        Transform.__init__(self)
        self.meta, self._module, self._context = partial(module.meta, context), module, context

    @property
    def idx_a(self) -> Tensor:
        return self._module._gk_indices()[0]

    @property
    def idx_b(self) -> Tensor:
        return self._module._gk_indices()[1]

    def _gk_run(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        module, maps = self._module, _map_of(self._module)
        features = module._gk_look()
        if isinstance(maps, Coupling) and not features.pays(x):
            return self._gk_by_zuko(x, inverse)
        flat, context, batch = _rows(x, self._context)

        def params(seen: Tensor) -> Tensor:
            return module.hyper(seen if context is None else torch.cat([seen, context], -1))

        z, log_det = couple(features, flat, params, inverse, maps)
        return z.reshape(*batch, z.shape[-1]), log_det.reshape(batch)

    def _gk_by_zuko(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        theirs = transforms.CouplingTransform
        if inverse:
            return theirs._inverse(self, x), x.new_zeros(())  # nobody asks for the other
        return theirs.call_and_ladj(self, x)


class GeneralCouplingTransform(flows.coupling.GeneralCouplingTransform):
    """`zuko.flows.GeneralCouplingTransform` of affine maps and of splines."""

    def forward(self, c: Tensor | None = None) -> Transform:
        leave = left_alone(self) or _map_of(self) is None
        return super().forward(c) if leave else _Coupling(self, c)

    def _gk_indices(self) -> tuple[Tensor, Tensor]:
        held = getattr(self, "_gk_held", None)
        if held is None or held[0] is not self.mask or held[1] != self.mask._version:
            with torch.inference_mode(False):  # a later pass may save them for its backward
                passing, moving = self.mask.nonzero().squeeze(-1), (~self.mask).nonzero().squeeze(-1)
            held = self._gk_held = (self.mask, self.mask._version, passing, moving)
        return held[2:]

    def _gk_look(self) -> Features:
        if not hasattr(self, "_gk_features"):
            self._gk_features = Features()
        self._gk_features.look(*self._gk_indices())
        return self._gk_features


def _coupling(thing) -> Becomes | str:
    if _map_of(thing) is None:
        return OTHERS
    return Becomes(GeneralCouplingTransform) if isinstance(thing.hyper, MLP) else "its network is of another class"


LIBRARY = Library(
    "zuko",
    ("1.6.0",),
    {flows.autoregressive.MaskedAutoregressiveTransform: _masked, flows.coupling.GeneralCouplingTransform: _coupling},
)
