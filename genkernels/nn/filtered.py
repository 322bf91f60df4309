"""Changes of an image's resolution with a low-pass filter, so that nothing aliases."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from genkernels import ops
from genkernels.ops import checks


class _Filtered(nn.Module):
    """A separable filter that adds up to 1, and a factor; `options` are the operator's."""

    options: dict

    def __init__(self, factor: int, taps: Sequence[float]):
        super().__init__()
        who = type(self).__name__
        self.factor = checks.integer(who, "factor", factor, 1)
        if len(taps) < factor or not sum(taps):
            raise ValueError(f"{who}: taps must be at least {factor} numbers whose sum is not 0, got {taps!r}")
        values = torch.tensor(taps, dtype=torch.float64) / sum(taps)
        self.register_buffer("taps", values.to(torch.get_default_dtype()), persistent=False)

    def extra_repr(self) -> str:
        return f"factor={self.factor}, taps={len(self.taps)}"


class FilteredUpsample(_Filtered):
    """``[N, C, H, W]`` to ``[N, C, factor*H, factor*W]``: zeros between, then a separable filter; its mean stays.

    Equivalent to::

        k = len(taps)
        before, after = (k + factor - 1) // 2, (k - factor) // 2
        filter = torch.tensor(taps) / sum(taps)
        y = gk.ops.upfirdn2d(x, filter, up=factor, padding=(before, after) * 2, gain=factor**2)

    Args:
        factor: how many times as high and as wide.
        taps: the filter along each axis, at least `factor` numbers; it is divided by its sum.

    Shapes:
        x ``[N, C, H, W]`` → ``[N, C, factor*H, factor*W]``.

    Raises:
        ValueError: an option is wrong.

    Source: Karras et al., "Analyzing and improving the image quality of StyleGAN", 2020.
    """

    genkernels_layer = "upfirdn2d"  #: what `genkernels.networks` takes it for

    def __init__(self, factor: int = 2, taps: Sequence[float] = (1, 3, 3, 1)):
        super().__init__(factor, taps)

    @property
    def options(self) -> dict:
        count, factor = self.taps.shape[0], self.factor
        pads = (count + factor - 1) // 2, (count - factor) // 2
        return {"up": factor, "padding": pads * 2, "gain": float(factor**2)}

    def forward(self, x: Tensor) -> Tensor:
        return ops.upfirdn2d(x, self.taps, **self.options)


class FilteredDownsample(_Filtered):
    """``[N, C, H, W]`` to ``[N, C, H/factor, W/factor]``: a separable filter, then every `factor`-th number.

    Equivalent to::

        k = len(taps)
        before, after = (k - factor + 1) // 2, (k - factor) // 2
        filter = torch.tensor(taps) / sum(taps)
        y = gk.ops.upfirdn2d(x, filter, down=factor, padding=(before, after) * 2)

    Args:
        factor: how many times less high and wide.
        taps: the filter along each axis, at least `factor` numbers; it is divided by its sum.

    Shapes:
        x ``[N, C, H, W]`` → ``[N, C, H // factor, W // factor]``.

    Raises:
        ValueError: an option is wrong.

    Source: Karras et al., "Analyzing and improving the image quality of StyleGAN", 2020.
    """

    genkernels_layer = "upfirdn2d"  #: what `genkernels.networks` takes it for

    def __init__(self, factor: int = 2, taps: Sequence[float] = (1, 3, 3, 1)):
        super().__init__(factor, taps)

    @property
    def options(self) -> dict:
        count, factor = self.taps.shape[0], self.factor
        pads = (count - factor + 1) // 2, (count - factor) // 2
        return {"down": factor, "padding": pads * 2}

    def forward(self, x: Tensor) -> Tensor:
        return ops.upfirdn2d(x, self.taps, **self.options)
