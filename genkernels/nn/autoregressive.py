"""MAF and IAF as layers: an autoregressive affine transform, one direction in one pass, the other by a solve."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genkernels import ops
from genkernels._options import ScaleMap
from genkernels.nn.made import MADE, check_tensor
from genkernels.ops.affine_coupling import scale_constant_of
from genkernels.ops.made import METHODS, SCALE_MAPS
from genkernels.reference.affine_coupling import log_scale


class AutoregressiveTransform(nn.Module):
    r"""Masked autoregressive flow (MAF): data → noise in one pass, the inverse as a blocked triangular solve.

    .. math:: z_i = x_i\,\sigma(s_i) + t_i,\qquad (s, t)_i = \mathrm{MADE}(x_{<i}),\qquad \mathrm{ldj} =
        \sum\log\sigma(s)

    Equivalent to (``scale_map="exp"``)::

        s, t = made(x, context).chunk(2, 1)
        z, ldj = x * s.exp() + t, s.sum(1)

    Args:
        made: a `MADE` of two parameters a feature: log-scales, then shifts.
        scale_map: ``exp``: σ = exp(s); ``sigmoid``: σ = sigmoid(s + 2); ``tanh``: σ = exp(c·tanh(s)); or another of
            `genkernels.ops.affine_coupling`.
        method: how to invert: ``blocked`` (about the price of one pass), ``jacobi`` (sweeps until nothing changes, at
            most D) or ``sequential`` (D passes, the definition). Gradients are the same: of the implicit function.
        scale_constant: c of the scale maps that have one, as for `genkernels.ops.affine_coupling`.

    Shapes:
        x, z ``[N, D]``; ldj ``[N]``, nats, fp32 or wider.

    Hooks on the network's layers, pruning, wrappers such as LoRA and subclasses count both ways: the inverse then takes
    the D passes of the definition, with a graph of all of them where gradients are asked for.

    Raises:
        ValueError: an option is unknown, or the network does not give two parameters a feature.

    Source: Papamakarios et al., "Masked autoregressive flow for density estimation", 2017.
    """

    def __init__(
        self, made: MADE, scale_map: str = "exp", method: str = "blocked", scale_constant: float | None = None
    ):
        super().__init__()
        name = type(self).__name__
        for label, value, options in (("scale_map", scale_map, SCALE_MAPS), ("method", method, METHODS)):
            if value not in options:
                raise ValueError(f"{name}: {label} must be one of {', '.join(options)}, got {value!r}")
        if not isinstance(made, MADE) or made.params_per_feature != 2:
            got = f"{made.params_per_feature}" if isinstance(made, MADE) else type(made).__name__
            raise ValueError(f"{name}: made must be a MADE with params_per_feature=2, got {got}")
        self.made, self.scale_map, self.method, self.scale_constant = made, scale_map, method, scale_constant
        code = ScaleMap[scale_map.upper()]
        self._codes = code, scale_constant_of(name, code, scale_constant)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._parallel(x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._solve(z, context)

    def extra_repr(self) -> str:
        return f"scale_map={self.scale_map!r}, method={self.method!r}"

    def _parallel(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """The direction in which every feature's parameters are known at once."""
        t, ell = self._params(x, context)
        return (x * torch.exp(ell) + t).to(x.dtype), ell.sum(1)

    def _params(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Shifts and log-scales ``[N, D]``, fp32 or wider."""
        params = self.made(x, context)
        params = params.to(torch.promote_types(torch.promote_types(x.dtype, params.dtype), torch.float32))
        s, t = params.chunk(2, dim=1)
        return t, log_scale(s, *self._codes)

    def _solve(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        made = self.made
        check_tensor(f"{type(self).__name__}: the input", z)
        if z.dim() != 2 or z.shape[1] != made.features:
            raise ValueError(f"{type(self).__name__}: the input must be [N, {made.features}], got {list(z.shape)}")
        if not made.as_written():
            return self._solve_by_calls(z, context)
        made.follow()
        return ops.made_inverse(
            z,
            [layer.weight for layer in made.layers],
            [layer.bias for layer in made.layers],
            made.order,
            made.counts,
            context=made.context_values(context, z.shape[0]),
            residual=made.residual,
            scale_map=self.scale_map,
            scale_constant=self.scale_constant,
            method=self.method,
        )

    def _solve_by_calls(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """The definition, D passes that call the network: where its layers have hooks or are not the class's own."""
        x, log_det = torch.zeros_like(z), 0.0
        for feature in self.made.order.tolist():
            t, ell = self._params(x, context)
            here = torch.zeros(z.shape[1], dtype=torch.bool, device=z.device)
            here[feature] = True
            # this feature's column alone: a guess at another may overflow, and meet a gradient of 0
            column = (z[:, feature] - t[:, feature]) * torch.exp(-ell[:, feature])
            x = torch.where(here, column.to(z.dtype).unsqueeze(1), x)
            log_det = log_det - ell[:, feature]
        return x, log_det


class InverseAutoregressiveTransform(AutoregressiveTransform):
    r"""Inverse autoregressive flow (IAF): noise → data in one pass; data → noise is the triangular solve.

    Its ``forward`` is `AutoregressiveTransform.inverse` and its ``inverse`` that one's ``forward``.

    Equivalent to::

        maf = AutoregressiveTransform(made, scale_map)
        z, ldj = maf.inverse(x, context)          # forward
        x, ldj = maf(z, context)                  # inverse

    Args:
        made, scale_map, method, scale_constant: as for `AutoregressiveTransform`.

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
