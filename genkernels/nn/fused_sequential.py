"""FusedSequential: layers one after the other, neighbours as one where a kernel does both."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from genkernels import ops
from genkernels.nn._rectified import LeakyReLU, ReLU
from genkernels.ops import checks
from genkernels.ops.batch_norm_leaky_relu import NORMALISE

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
#: Numbers of x from which on, on a CPU, the one call gains more than getting to it costs: of fp32 and fp64, and of half
#: numbers, which torch's own take faster.
LEAST, LEAST_HALF = 1 << 19, 1 << 20


class FusedSequential(nn.Sequential):
    """An ``nn.Sequential`` that runs a normalisation in training and the ReLU or LeakyReLU behind it as one call.

    Equivalent to::

        nn.Sequential(*args)

    Joined are ``BatchNorm*d`` by the batch's statistics, whose running averages are kept as torch keeps them, and
    ``InstanceNorm*d`` without running averages, directly before ``ReLU`` or ``LeakyReLU``, where x is contiguous and,
    on a CPU, large enough. All else runs layer by layer: other subclasses, layers with hooks or in evaluation,
    everything within ``torch.compile`` and on the backend ``reference``. Parameters and state dict are those of the
    layers.

    Args:
        args: layers, as for ``nn.Sequential``: one after the other or as one ``OrderedDict``.

    Shapes:
        as the layers have it.

    Raises:
        What the layers raise.

    Source: `genkernels.ops.batch_norm_leaky_relu`.
    """

    def forward(self, x):
        layers = list(self._modules.values())
        skips = False
        for layer, following in zip(layers, [*layers[1:], None], strict=True):
            if skips:
                skips = False
                continue
            slope = _slope(following) if type(layer) in BATCH_NORMS or type(layer) in INSTANCE_NORMS else None
            skips = slope is not None and _joins(layer, following, x)
            x = _joined(layer, slope, x) if skips else layer(x)
        return x


def _slope(layer: nn.Module | None) -> float | None:
    """That of a leaky ReLU, 0 of a ReLU, None of anything else."""
    if type(layer) in (nn.ReLU, ReLU):
        return 0.0
    if type(layer) in (nn.LeakyReLU, LeakyReLU) and 0 <= layer.negative_slope < math.inf:
        return float(layer.negative_slope)
    return None


def _joins(norm: nn.Module, activation: nn.Module, x: Tensor) -> bool:
    """Whether the two may run as one on x."""
    if is_compiling() or not isinstance(x, Tensor) or x.dim() < 3 or not x.is_contiguous():
        return False
    if type(norm) in INSTANCE_NORMS:
        counted = norm.track_running_stats
        numbers = math.prod(x.shape[2:])
    else:
        counted = norm.track_running_stats and not norm.training
        numbers = x.numel() // max(1, x.shape[1])
    if counted or numbers < 2 or not x.numel() or norm.eps <= 0:
        return False
    if x.dim() != _axes(norm) or x.shape[1] != norm.num_features:  # torch says what is wrong
        return False
    if x.device.type == "cpu" and x.numel() < (LEAST_HALF if x.dtype in checks.HALVES else LEAST):
        return False
    for vector in (norm.weight, norm.bias):
        if vector is not None and not (
            vector.dtype == x.dtype or (vector.dtype == torch.float32 and x.dtype in checks.HALVES)
        ):
            return False
    if _hooked(norm) or _hooked(activation) or x.dtype not in checks.FLOATS:
        return False
    return not NORMALISE.runs_reference(x, norm.weight, norm.bias)


def _axes(norm: nn.Module) -> int:
    """Of the input: a batch of channels over one, two or three axes."""
    return int(type(norm).__name__[-2]) + 2


def _hooked(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def _joined(norm: nn.Module, slope: float, x: Tensor) -> Tensor:
    if type(norm) in INSTANCE_NORMS:
        samples, channels = x.shape[:2]
        vectors = [v if v is None else v.repeat(samples) for v in (norm.weight, norm.bias)]
        planes = x.view(1, samples * channels, *x.shape[2:])
        return ops.batch_norm_leaky_relu(planes, *vectors, negative_slope=slope, eps=norm.eps).y.view(x.shape)
    out = ops.batch_norm_leaky_relu(x, norm.weight, norm.bias, negative_slope=slope, eps=norm.eps)
    if norm.track_running_stats:
        _average(norm, out.mean, out.variance, x.numel() // x.shape[1])
    return out.y


@torch.no_grad()
def _average(norm: nn.Module, mean: Tensor, variance: Tensor, count: int) -> None:
    """The running averages after one more batch, of the variance without bias."""
    norm.num_batches_tracked.add_(1)
    share = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    held = [norm.running_mean, norm.running_var]
    found = [t.to(h.dtype) for t, h in zip((mean, variance * (count / (count - 1))), held, strict=True)]
    torch._foreach_lerp_(held, found, share)
