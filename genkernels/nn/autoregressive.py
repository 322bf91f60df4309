"""MAF and IAF as layers: an autoregressive transform, affine or by splines, one direction in one pass, the other by a
solve."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from genkernels import ops
from genkernels._options import ScaleMap
from genkernels.nn._layout import BF16_UNITS
from genkernels.nn.made import MADE, check_tensor
from genkernels.ops._made_checks import network as check_network
from genkernels.ops._spline_checks import check_bins, check_options
from genkernels.ops.affine_coupling import scale_constant_of
from genkernels.ops.made import FORWARD, METHODS, SCALE_MAPS
from genkernels.reference.affine_coupling import log_scale
from genkernels.reference.rational_quadratic_spline import bins_of

TRANSFORMS = ("affine", "spline")

#: Under autocast the layers multiply in bf16, `made_forward` in fp32, for which no weight is rounded anew. Up to so
#: many rows that is less work. Measured on one busy core, forward and backward, ms, by layers and in one call: D = 64,
#: 512 units, 100 rows 4.2 and 3.0, 1,024 rows 16.9 and 19.8; D = 784, 1,024 units, 100 rows 24.7 and 20.0, 512 rows
#: 68.2 and 82.9. Where a processor has units for bf16 products they pay earlier: a guess, not measured.
AUTOCAST_ROWS = 64 if BF16_UNITS else 256
_DEFAULTS = {
    "scale_map": "exp",
    "scale_constant": None,
    "parametrization": "nflows",
    "bound": 5.0,
    "logit_scale": 1.0,
    "floor": 1e-3,
}


class AutoregressiveTransform(nn.Module):
    r"""Masked autoregressive flow (MAF): data → noise in one pass, the inverse as a blocked triangular solve.

    .. math:: z_i = f(x_i;\,p_i),\qquad p_i = \mathrm{MADE}(x_{<i}),\qquad \mathrm{ldj} = \sum\log f'(x_i;\,p_i)

    with :math:`f(x) = x\,\sigma(s) + t` or a monotonic rational-quadratic spline.

    Equivalent to (``scale_map="exp"``)::

        s, t = made(x, context).chunk(2, 1)
        z, ldj = x * s.exp() + t, s.sum(1)

    and with ``transform="spline"`` to::

        params = made(x, context).unflatten(1, (P, D)).movedim(1, 2)
        z, ldj = genkernels.ops.rational_quadratic_spline(x, params)

    Args:
        made: a `MADE` of two parameters a feature, log-scales, then shifts; for splines of P = 3K − 1 (``circular``
            3K), which says the number K of bins: width logits, height logits, slopes.
        scale_map: ``exp``: σ = exp(s); ``sigmoid``: σ = sigmoid(s + 2); ``tanh``: σ = exp(c·tanh(s)); or another of
            `genkernels.ops.affine_coupling`.
        method: how to invert: ``blocked`` (about the price of one pass), ``jacobi`` (sweeps until nothing changes, at
            most D) or ``sequential`` (D passes, the definition). Gradients are the same: of the implicit function.
        scale_constant: c of the scale maps that have one, as for `genkernels.ops.affine_coupling`.
        transform: ``affine``, or ``spline``: a spline for each feature, as neural spline flows have it.
        parametrization, bound, logit_scale, floor: of splines, as for `SplineCoupling`.

    Shapes:
        x, z ``[N, D]``; ldj ``[N]``, nats, fp32 or wider.

    On a CPU forward is one call of `genkernels.ops.made_forward`, under autocast too, in fp32, where a batch is small.
    Hooks on the network's layers, pruning, wrappers such as LoRA and subclasses count both ways: forward then calls
    the layers one by one, and the inverse takes the D passes of the definition, with a graph of all of them where
    gradients are asked for.

    Raises:
        ValueError: an option is unknown or one of the other transform, or the network does not give that many
            parameters a feature.

    Example:
        >>> import torch, genkernels as gk
        >>> made = gk.nn.MADE(4, 32, params_per_feature=3 * 8 - 1)
        >>> layer = gk.nn.AutoregressiveTransform(made, transform="spline", parametrization="zuko")
        >>> x = torch.randn(5, 4)
        >>> z, ldj = layer(x)
        >>> back, _ = layer.inverse(z)
        >>> torch.allclose(back, x, atol=1e-4), ldj.shape
        (True, torch.Size([5]))

    Source: Papamakarios et al., "Masked autoregressive flow for density estimation", 2017; splines: Durkan et al.,
    "Neural spline flows", 2019.
    """

    def __init__(
        self,
        made: MADE,
        scale_map: str = "exp",
        method: str = "blocked",
        scale_constant: float | None = None,
        *,
        transform: str = "affine",
        parametrization: str = "nflows",
        bound: float = 5.0,
        logit_scale: float = 1.0,
        floor: float = 1e-3,
    ):
        super().__init__()
        name = type(self).__name__
        for label, value, options in (
            ("scale_map", scale_map, SCALE_MAPS),
            ("method", method, METHODS),
            ("transform", transform, TRANSFORMS),
        ):
            if value not in options:
                raise ValueError(f"{name}: {label} must be one of {', '.join(options)}, got {value!r}")
        affine = {"scale_map": scale_map, "scale_constant": scale_constant}
        splines = {"parametrization": parametrization, "bound": bound, "logit_scale": logit_scale, "floor": floor}
        by_splines = transform == "spline"
        self.transform, self._options = transform, splines if by_splines else affine
        for label, value in (affine if by_splines else splines).items():
            if value != _DEFAULTS[label]:
                raise ValueError(f"{name}: {label} is no option of transform={transform!r}, got {value!r}")
        count = made.params_per_feature if isinstance(made, MADE) else 0
        if by_splines:
            kind, *_ = check_options(name, *splines.values())
            wanted, fits = "3K" if parametrization == "circular" else "3K - 1", bins_of(count, kind) > 0
        else:
            code = ScaleMap[scale_map.upper()]
            self.codes = code, scale_constant_of(name, code, scale_constant)
            wanted, fits = "2", count == 2
        if not fits:
            got = count if isinstance(made, MADE) else type(made).__name__
            raise ValueError(f"{name}: made must be a MADE with params_per_feature={wanted}, got {got}")
        if by_splines:
            check_bins(name, count, kind, floor)
        self.made, self.scale_map, self.method, self.scale_constant = made, scale_map, method, scale_constant

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._parallel(x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._solve(z, context)

    def extra_repr(self) -> str:
        options = {"transform": self.transform, **self._options, "method": self.method}
        return ", ".join(f"{key}={value!r}" for key, value in options.items() if value is not None)

    def _parallel(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """The direction in which every feature's parameters are known at once."""
        if isinstance(x, Tensor) and self.takes_one_call(x.dtype) and self._fits(x) and one_call_pays(x):
            return self._call(ops.made_forward, x, context, **self._options)
        if self.transform == "spline" or torch.compiler.is_compiling():  # which makes one kernel of the operations
            return self._mapped(x, self._params(x, context), inverse=False)
        return ops.affine_coupling(x, self.made(x, context), split="none", **self._options)

    def takes_one_call(self, dtype: torch.dtype) -> bool:
        """Whether the network is what its weights say and `made_forward` takes it as it is, for an input of a dtype."""
        made = self.made
        if self.transform == "spline" or dtype not in (torch.float32, torch.float64) or not made.as_written():
            return False
        return all(layer.weight.dtype == dtype for layer in made.layers)

    def _fits(self, x: Tensor) -> bool:
        return x.dim() == 2 and x.shape[1] == self.made.features

    def alike(self, other: AutoregressiveTransform) -> bool:
        """Whether both may be run in one call."""
        mine, theirs = self.made, other.made
        return (
            self.codes == other.codes
            and len(mine.layers) == len(theirs.layers)
            and mine.residual == theirs.residual
            and mine.features == theirs.features
            and (mine.context_layer is None) == (theirs.context_layer is None)
        )

    def network_of(self, x: Tensor, context: Tensor | None) -> tuple:
        """``(weights, biases, order, counts, what the context adds)`` as the operators of `genkernels.ops.made` take
        them, checked against x."""
        network = self._network(x, context)
        check_network("x", x, *network, self.made.residual, self.made.params_per_feature)
        return network

    def _network(self, x: Tensor, context: Tensor | None) -> tuple:
        made = self.made
        made.follow()
        layers = list(made.layers)
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        return weights, biases, made.order, made.counts, made.context_values(context, x.shape[0])

    def _call(self, function: Callable, x: Tensor, context: Tensor | None, **options) -> tuple[Tensor, Tensor]:
        """An operator of `genkernels.ops.made` on x and the network's weights."""
        *network, added = self._network(x, context)
        return function(x, *network, context=added, residual=self.made.residual, **options)

    def _params(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:
        """What `_mapped` takes ``[N, D, ...]`` of: shifts and log-scales, fp32 or wider, or splines."""
        params = self.made(x, context)
        if self.transform == "spline":
            return (params.unflatten(1, (-1, self.made.features)).movedim(1, 2),)
        params = params.to(torch.promote_types(torch.promote_types(x.dtype, params.dtype), torch.float32))
        s, t = params.chunk(2, dim=1)
        return t, log_scale(s, *self.codes)

    def _mapped(self, x: Tensor, params: tuple[Tensor, ...], inverse: bool) -> tuple[Tensor, Tensor]:
        """Values of x's dtype and the log-determinants of the features that x ``[N, ...]`` has."""
        if self.transform == "spline":
            spline = ops.rational_quadratic_spline_inverse if inverse else ops.rational_quadratic_spline
            value, log_det = spline(x, *params, **self._options)
            return value.to(x.dtype), log_det
        t, ell = params
        value = (x - t) * torch.exp(-ell) if inverse else x * torch.exp(ell) + t
        return value.to(x.dtype), (-ell if inverse else ell).sum(1)

    def _solve(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        made = self.made
        check_tensor(f"{type(self).__name__}: the input", z)
        if z.dim() != 2 or z.shape[1] != made.features:
            raise ValueError(f"{type(self).__name__}: the input must be [N, {made.features}], got {list(z.shape)}")
        if not made.as_written():
            return self._solve_by_calls(z, context)
        solve = ops.made_inverse if self.transform == "affine" else ops.made_spline_inverse
        return self._call(solve, z, context, method=self.method, **self._options)

    def _solve_by_calls(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """The definition, D passes that call the network: where its layers have hooks or are not the class's own."""
        x, log_det = torch.zeros_like(z), 0.0
        for feature in self.made.order.tolist():
            here = torch.zeros(z.shape[1], dtype=torch.bool, device=z.device)
            here[feature] = True
            # this feature's column alone: a guess at another may overflow, and meet a gradient of 0
            column = slice(feature, feature + 1)
            params = tuple(p[:, column] for p in self._params(x, context))
            value, more = self._mapped(z[:, column], params, inverse=True)
            x, log_det = torch.where(here, value, x), log_det + more
        return x, log_det


class InverseAutoregressiveTransform(AutoregressiveTransform):
    r"""Inverse autoregressive flow (IAF): noise → data in one pass; data → noise is the triangular solve.

    Its ``forward`` is `AutoregressiveTransform.inverse` and its ``inverse`` that one's ``forward``.

    Equivalent to::

        maf = AutoregressiveTransform(made, scale_map)
        z, ldj = maf.inverse(x, context)          # forward
        x, ldj = maf(z, context)                  # inverse

    Args:
        made, scale_map, method, scale_constant, transform, parametrization, bound, logit_scale, floor: as for
            `AutoregressiveTransform`.

    Shapes:
        x, z ``[N, D]``; ldj ``[N]``, nats, fp32 or wider.

    Raises:
        ValueError: as for `AutoregressiveTransform`.

    Source: Kingma et al., "Improving variational inference with inverse autoregressive flow", 2016.
    """

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._solve(x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._parallel(z, context)


def one_call_pays(x: Tensor) -> bool:
    """Whether `made_forward` has a kernel for x ``[N, ...]`` that takes less time than the layers one by one."""
    if x.device.type != "cpu" or x.shape[0] > AUTOCAST_ROWS and torch.is_autocast_enabled("cpu"):
        return False
    return not FORWARD.runs_reference(x)
