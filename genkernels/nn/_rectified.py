"""ReLU and LeakyReLU whose gradient a compiled pass on a CPU takes from the result, not from a mask of signs.

Where the input was above 0 is a tensor of bytes, which compilers keep for the way back for being small: beside a result
that the next layer keeps anyway, and in its place where the next layer is frozen. Inductor (torch 2.13) writes it entry
by entry, which for 128×128 takes 123 µs where the function itself takes 2. So the gradient is made of products with the
sign of the result, 0 or 1, in which there is no mask to keep.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling, is_exporting

from genkernels.backends import current_backend
from genkernels.ops import transforms_active
from genkernels.ops._operator import of_others


def relu(x: Tensor, inplace: bool = False) -> Tensor:
    """As ``F.relu``."""
    return torch.ops.genkernels.rectified(x, 0.0) if _by_result(x) else F.relu(x, inplace)


def leaky_relu(x: Tensor, negative_slope: float) -> Tensor:
    """As ``F.leaky_relu``."""
    if _by_result(x):
        return torch.ops.genkernels.rectified(x, float(negative_slope))
    return F.leaky_relu(x, negative_slope)


class ReLU(nn.ReLU):
    """As ``nn.ReLU``."""

    genkernels_layer = nn.ReLU  #: what `genkernels.networks` takes it for

    def forward(self, x: Tensor) -> Tensor:
        return relu(x, self.inplace)


class LeakyReLU(nn.LeakyReLU):
    """As ``nn.LeakyReLU``, out of place."""

    genkernels_layer = nn.LeakyReLU  #: what `genkernels.networks` takes it for

    def forward(self, x: Tensor) -> Tensor:
        return leaky_relu(x, self.negative_slope)


def _by_result(x: Tensor) -> bool:
    if not is_compiling() or x.device.type != "cpu" or not torch.is_grad_enabled():
        return False
    # an exported pass is to run without this library, the reference is what a compiler makes of torch's own
    return not (is_exporting() or current_backend() == "reference" or transforms_active())


class _Rectified(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, negative_slope):
        y = F.leaky_relu(x, negative_slope) if negative_slope else F.relu(x)
        ctx.save_for_backward(y)
        ctx.negative_slope = negative_slope
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        if not ctx.negative_slope:
            return grad * y.sign(), None
        above = grad * y.relu().sign()
        return above + ctx.negative_slope * (grad - above), None


# as an operator: Dynamo (torch 2.13) fails on a function of one's own whose batch is of any size
of_others("rectified(Tensor x, float negative_slope) -> Tensor", lambda x, slope: _Rectified.apply(x, slope))
