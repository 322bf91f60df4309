"""Coupling by rational-quadratic splines as a layer: a network reads one half of x, and gives splines for the other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genkernels import ops
from genkernels.nn._conditioned import Conditioned
from genkernels.ops._spline_checks import check_options

WHO = "SplineCoupling"


class SplineCoupling(Conditioned):
    r"""One half of x passes; each number of the other goes through a monotonic spline of its own, whose K bins `net`
    makes of the first.

    Equivalent to (``[N, C]``)::

        x1, x2 = x.tensor_split([C - C // 2], 1)
        params = net(x1).view(N, C // 2, P)
        y2, ldj = genkernels.ops.rational_quadratic_spline(x2, params)
        z = torch.cat([x1, y2], 1)

    Args:
        net: ``net(x_part)``, or ``net(x_part, context)`` where a context is given: ``[N, passing, *spatial]`` to ``[N,
            P * moved, *spatial]``, the P numbers of a channel side by side, as nflows has them. P = 3K − 1 says K:
            width logits, height logits, inner slopes; ``circular`` P = 3K. All zeros give the identity for ``zuko``,
            and nearly so for ``nflows`` where the slopes start at log(e^(1 − floor) − 1).
        parametrization, bound, logit_scale, floor: as for `genkernels.ops.rational_quadratic_spline`; nflows' own
            layers have ``logit_scale=hidden_features**-0.5`` where their network names `hidden_features`.
        flip: the last channels pass, and the first are moved. Of an odd number of channels the first part has one more.

    A network that works in place on its input (``nn.ReLU(inplace=True)`` first) is given a copy.

    Raises:
        ValueError: an option is unknown, x has fewer than two channels, `net` gives another shape, or the context has
            not a row a sample. RuntimeError: `net` changed its input in place by an operation that no layer's
            ``inplace`` announces.

    Example:
        >>> import torch, genkernels as gk
        >>> layer = gk.nn.SplineCoupling(torch.nn.Linear(2, 2 * 23), "zuko")
        >>> x = torch.randn(5, 4)
        >>> z, ldj = layer(x)
        >>> back, _ = layer.inverse(z)
        >>> torch.allclose(back, x, atol=1e-4), ldj.shape
        (True, torch.Size([5]))

    Source: Durkan et al., "Neural spline flows", 2019.
    """

    def __init__(
        self,
        net: nn.Module,
        parametrization: str = "nflows",
        bound: float = 5.0,
        logit_scale: float = 1.0,
        floor: float = 1e-3,
        flip: bool = False,
    ):
        super().__init__(net)
        check_options(WHO, parametrization, bound, logit_scale, floor)
        self.options = {"parametrization": parametrization, "bound": bound, "logit_scale": logit_scale, "floor": floor}
        self.flip = bool(flip)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._couple(x, context, ops.rational_quadratic_spline)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._couple(z, context, ops.rational_quadratic_spline_inverse)

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in {**self.options, "flip": self.flip}.items())

    def _couple(self, x: Tensor, context: Tensor | None, way) -> tuple[Tensor, Tensor]:
        if x.dim() < 2 or x.shape[1] < 2:
            raise ValueError(f"{WHO}: x must be [N, C, ...] with at least 2 channels, got {list(x.shape)}")
        first, last = x.tensor_split((x.shape[1] - x.shape[1] // 2,), 1)
        passing, moved = (last, first) if self.flip else (first, last)
        moved, ldj = way(moved, self._splines(self.params(passing, context), moved), **self.options)
        return torch.cat((moved, passing) if self.flip else (passing, moved), 1), ldj

    def _splines(self, params: Tensor, moved: Tensor) -> Tensor:
        """``[N, P * moved, *spatial]`` to ``[N, moved, *spatial, P]``."""
        rows, channels, *spatial = moved.shape
        count, rest = divmod(params.shape[1], channels) if params.dim() == moved.dim() else (0, 1)
        if rest or params.shape[0] != rows or list(params.shape[2:]) != spatial:
            wanted = ", ".join(map(str, (rows, f"{channels}*P", *spatial)))
            raise ValueError(f"{WHO}: its network must give [N, moved*P, ...] = [{wanted}], got {list(params.shape)}")
        return params.unflatten(1, (channels, count)).movedim(2, -1)
