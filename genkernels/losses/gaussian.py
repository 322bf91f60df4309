"""Kullback-Leibler divergences of Gaussian posteriors, in plain PyTorch: forward and backward of 64 examples of 16
latents take 0.13 ms of a VAE's step of 3.5 ms (one core), of which kernels could save half."""

from __future__ import annotations

import torch
from torch import Tensor

from genkernels.ops import checks

WHO = "gaussian_kl"


def gaussian_kl(
    mean: Tensor,
    log_scale: Tensor,
    prior_mean: Tensor | None = None,
    prior_log_scale: Tensor | None = None,
    *,
    reduce: bool = True,
) -> Tensor:
    r"""How far an independent Gaussian posterior is from its prior, in nats.

    .. math:: \mathrm{KL} = \sum_d s'_d - s_d + \tfrac12 e^{2 (s_d - s'_d)} +
        \tfrac12 \bigl(e^{-s'_d}(\mu_d - \mu'_d)\bigr)^2 - \tfrac12

    Equivalent to::

        q = torch.distributions.Normal(mean, log_scale.exp())
        p = torch.distributions.Normal(prior_mean, prior_log_scale.exp())
        kl = torch.distributions.kl_divergence(q, p).flatten(1).sum(1)

    Args:
        mean, log_scale: ``[N, ...]`` of one shape, floats. Halves are computed in fp32.
        prior_mean, prior_log_scale: of the same shape, or one that expands to it; None for 0, the standard normal's.
        reduce: False gives each dimension's, ``[N, ...]``, as free bits need them.

    Returns:
        ``[N]``, fp32 (fp64 for fp64).

    Raises:
        ValueError: a shape or a device is wrong. TypeError: a dtype is.

    Source: Kingma & Welling, "Auto-encoding variational Bayes", 2014, appendix B.
    """
    named = {"mean": mean, "log_scale": log_scale, "prior_mean": prior_mean, "prior_log_scale": prior_log_scale}
    checks.tensors(WHO, named, optional=("prior_mean", "prior_log_scale"))
    if mean.dim() == 0:
        raise ValueError(f"{WHO}: mean must be [N, ...], got []")
    checks.shape(WHO, "log_scale", log_scale, mean.shape, "[N, ...]")
    for label in ("prior_mean", "prior_log_scale"):
        given = named[label]
        if given is not None and not _expands(given.shape, mean.shape):
            raise ValueError(f"{WHO}: {label} must expand to mean's {list(mean.shape)}, got {list(given.shape)}")
    dtype = torch.float32
    for given in named.values():
        dtype = dtype if given is None else torch.promote_types(dtype, given.dtype)
    mean, log_scale = mean.to(dtype), log_scale.to(dtype)
    if prior_mean is not None:
        mean = mean - prior_mean
    if prior_log_scale is not None:
        mean = mean * (-prior_log_scale.to(dtype)).exp()
        log_scale = log_scale - prior_log_scale
    # e^{2 s} - 1 - 2 s without the difference of near numbers, as posteriors near their prior have it
    double = 2 * log_scale
    twice = torch.addcmul(double.expm1() - double, mean, mean)
    return (twice.flatten(1).sum(1) if reduce and twice.dim() > 1 else twice) / 2


def _expands(shape: torch.Size, wanted: torch.Size) -> bool:
    tail = wanted[len(wanted) - len(shape) :]
    return len(shape) <= len(wanted) and all(n in (1, m) for n, m in zip(shape, tail, strict=True))
