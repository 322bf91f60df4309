"""Benchmark cases of `genkernels.ops.importance_bound`: the bound with its weights, the Gaussian terms under it, and a
whole training step in chunks (`genkernels.benchmarks.autoencoders`).

Bytes: the bound reads the log-weights and writes the weights; its backward reads these and their gradient and writes
as many numbers. The Gaussian reads noise and writes z; its backward reads the noise and the gradient of z. What goes by
examples, or by samples alone, is small. The noise, which has no gradient, is a constant of the case.
"""

from __future__ import annotations

import functools
import math

import torch

from genkernels import ops
from genkernels.benchmarks.autoencoders import Autoencoder, step_case
from genkernels.benchmarks.cases import Case, constant
from genkernels.reference import importance_bound as reference


def cases(device: str, quick: bool) -> list[Case]:
    fp32, bf16 = torch.float32, torch.bfloat16
    if quick:
        return [_bound((64, 50), fp32), _gaussian((8, 10, 50), fp32), step_case(Autoencoder(64, 32, 8), 8, 10, 5)]
    bounds, gaussians = [(4096, 50), (100, 5000)], [(100, 50, 50)]
    if device == "cuda":
        bounds, gaussians = [(65536, 50), (4096, 5000)], [(1024, 50, 50), (256, 50, 1024)]
    rows = [_bound(shape, dtype) for dtype in (fp32, bf16) for shape in bounds]
    rows += [_gaussian(shape, dtype) for dtype in (fp32, bf16) for shape in gaussians]
    return [*rows, step_case(Autoencoder(784, 200, 50), 100, 50, 5)]


def _bound(shape, dtype) -> Case:
    work = 4  # bytes of a weight

    def inputs(rng):
        # some nats apart, as the log-weights of one image are
        return {"log_w": (3 * torch.randn(shape, generator=rng, device=rng.device) - 90).to(dtype)}

    return Case(
        name="importance_bound/bound",
        shape=shape,
        dtype=dtype,
        direction="forward+backward",
        inputs=inputs,
        op=ops.importance_bound,
        reference=reference.importance_bound,
        outputs=("bound", "weights"),
        bytes=(2 * dtype.itemsize + 3 * work) * math.prod(shape),
        flops=8 * math.prod(shape),
    )


@constant
def _noise(shape, dtype, work, device):
    """As the case rounds it, in the dtype that it is asked for: fp64 where the runner finds what is true."""
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype).to(work)


def _gaussian(shape, dtype) -> Case:
    rows = (shape[0], shape[2])

    def inputs(rng):
        draw = functools.partial(torch.randn, rows, generator=rng, device=rng.device)
        return {"mean": draw().to(dtype), "log_scale": (0.3 * draw() - 1).to(dtype)}

    return Case(
        name="importance_bound/gaussian",
        shape=shape,
        dtype=dtype,
        direction="forward+backward",
        inputs=inputs,
        op=lambda mean, s: ops.gaussian_reparameterize(_noise(shape, dtype, mean.dtype, mean.device), mean, s),
        reference=lambda mean, s: reference.gaussian_reparameterize(
            _noise(shape, dtype, mean.dtype, mean.device), mean, s, True, False
        ),
        outputs=("z", "log_ratio"),
        bytes=4 * dtype.itemsize * math.prod(shape),
        flops=16 * math.prod(shape),
    )
