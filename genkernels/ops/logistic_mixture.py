"""Discretised logistic mixture: schema, checks, fakes, gradient, backend choice. The maths is in
`genkernels.reference.logistic_mixture`."""

from __future__ import annotations

import torch
from torch import Tensor

from genkernels.ops import _checks as checks
from genkernels.ops._autocast import work_dtype
from genkernels.ops._gradients import THROUGH_REFERENCE, Formula, Refused
from genkernels.ops._operator import Operator
from genkernels.reference import logistic_mixture as reference

NAME = "logistic_mixture"


def logistic_mixture_nll(params: Tensor, x: Tensor, *, levels: int = 256) -> Tensor:
    r"""Negative log-likelihood of pixels under a discretised mixture of logistics, in one pass (PixelCNN++).

    .. math:: \mathrm{nll}_n = -\sum_\mathrm{pixels} \log \sum_k \pi_k \prod_c
        \left[\sigma\!\left(\frac{x_c + \delta - m_{ck}}{e^{s_{ck}}}\right) -
              \sigma\!\left(\frac{x_c - \delta - m_{ck}}{e^{s_{ck}}}\right)\right],\qquad \delta =
              \frac1{\mathrm{levels} - 1}

    Equivalent to (one channel; the kernels take no difference of sigmoids, and so never log 0)::

        logits, means, log_scales = params.unflatten(1, (3, -1)).unbind(1)
        scales = log_scales.clamp(min=-7).exp()
        upper = ((x + 1 / (levels - 1) - means) / scales).sigmoid().where(x < 1, 1)
        lower = ((x - 1 / (levels - 1) - means) / scales).sigmoid().where(x > -1, 0)
        nll = -torch.logsumexp(logits.log_softmax(1) + (upper - lower).log(), 1).flatten(1).sum(1)

    Args:
        params: ``[N, 3*K, *spatial]`` for C = 1: K logits, K means, K log-scales; ``[N, 10*K, *spatial]`` for C = 3: K
            logits, then for each channel K means, K log-scales and K coefficients, which through tanh add x's earlier
            channels to the means of the later: the first channel's row times x₀ to the second mean; the second's times
                x₀ and the third's times x₁ to the third.
            Log-scales below −7 count as −7, with a gradient of 0. fp64, fp32, bf16 or fp16; half is computed in fp32.
        x: ``[N, C, *spatial]``, C = 1 or 3, any of these dtypes, at the levels ``2 * i / (levels - 1) - 1``. A value
            counts as its nearest level, one beyond [−1, 1] as the end. Where x requires a gradient the call runs in
            plain PyTorch, and the gradient is the formula's, at that level.
        levels: 2 to 65,536; the lowest and the highest take the tails.

    Returns:
        ``[N]``, nats, summed over pixels and channels, fp32 (fp64 for fp64 params). NaN where params or x hold NaN.

    Raises:
        ValueError: a shape or an option is wrong. TypeError: a dtype is. BackendUnavailable: a forced backend cannot
            run.

    Source: Salimans et al., "PixelCNN++", 2017.
    """
    _check(params, x, "x", 0, levels)
    x = x.to(work_dtype(params))
    if x.requires_grad:
        return reference.logistic_mixture_nll(params, x, levels)
    return NLL(params, x, levels)


def logistic_mixture_sample(params: Tensor, noise: Tensor, *, levels: int = 256, temperature: float = 1.0) -> Tensor:
    """Draws pixels from the mixture that `logistic_mixture_nll` scores, by inverting its distribution functions at
    `noise`.

    Equivalent to (one channel, temperature 1)::

        logits, means, log_scales = params.unflatten(1, (3, -1)).unbind(1)
        k = (logits.softmax(1).cumsum(1) <= noise[:, :1]).sum(1, keepdim=True)
        value = means.gather(1, k) + log_scales.gather(1, k).clamp(min=-7).exp() * noise[:, 1:].logit()
        index = ((value.clamp(-1, 1) + 1) * (levels - 1) / 2).round().long()

    Args:
        params: as for `logistic_mixture_nll`.
        noise: ``[N, 1 + C, *spatial]`` uniform in [0, 1), any floating dtype: the mixture's, then each channel's. C is
            1 or 3.
        levels: as for `logistic_mixture_nll`. temperature: divides the logits and multiplies the logistic noise; 0
            takes the first of the largest logits, and its mean. Below 2^-126 it counts as 0, above 2^127 as that.

    Returns:
        Level indices ``[N, C, *spatial]``, int64. They carry no graph.

    Raises: as for `logistic_mixture_nll`. Source: the same.
    """
    _check(params, noise, "noise", 1, levels)
    return SAMPLE(params, checks.uniform(noise, work_dtype(params)), levels, checks.temperature(NAME, temperature))


def _check(params: Tensor, pixels: Tensor, label: str, extra: int, levels: int) -> None:
    """Every condition on shapes, dtypes, devices and levels; `pixels` has `extra` planes beside the channels."""
    checks.tensors(NAME, {"params": params, label: pixels})
    checks.integer(NAME, "levels", levels, 2, checks.MOST_LEVELS)
    told = int(4 / torch.finfo(pixels.dtype).eps)  # its numbers below 1 are half that eps apart
    if not extra and levels > told:
        kind = str(pixels.dtype).removeprefix("torch.")
        raise ValueError(f"{NAME}: x must be of a dtype that tells {levels} levels apart, {kind} tells {told}")
    shape, plus = list(pixels.shape), "1 + C" if extra else "C"
    if pixels.dim() < 2 or shape[1] - extra not in (1, 3):
        raise ValueError(f"{NAME}: {label} must be [N, {plus}, ...] with C = 1 or 3, got {shape}")
    channels = shape[1] - extra
    group = 3 if channels == 1 else 10
    has = list(params.shape)
    fits = len(has) == len(shape) and has[0] == shape[0] and has[2:] == shape[2:]
    if not fits or has[1] < group or has[1] % group:
        expected = ", ".join(str(n) for n in (shape[0], f"{group}*K", *shape[2:]))
        raise ValueError(
            f"{NAME}: params must be [{expected}], K being the number of components (C = {channels}), got {has}"
        )


def _fake(params, x, levels):
    return params.new_empty((params.shape[0],), dtype=work_dtype(params))


def _fake_backward(grad, params, x, levels):
    return torch.empty_like(params, memory_format=torch.contiguous_format)


def _fake_sample(params, noise, levels, temperature):
    return noise.new_empty((noise.shape[0], noise.shape[1] - 1, *noise.shape[2:]), dtype=torch.int64)


def _setup_context(ctx, inputs, output):
    params, x, ctx.levels = inputs
    ctx.save_for_backward(params, x)


def _backward(ctx, grad):
    if ctx.needs_input_grad[1]:
        raise RuntimeError(f"{NAME}: the torch operator has no gradient by x; genkernels.ops.logistic_mixture_nll has")
    return BACKWARD.dense(grad, *ctx.saved_tensors, ctx.levels), None, None


OPERATOR = Operator(
    NAME,
    functions=(logistic_mixture_nll, logistic_mixture_sample),
    kernels={
        "cpu": "",
        "triton": "",
        "cuda": "would win nothing: every component is read once and nothing is shared between pixels, so that one "
        "pass in Triton already moves the fewest bytes",
    },
)
NLL = OPERATOR.define(
    "logistic_mixture_nll(Tensor params, Tensor x, int levels) -> Tensor",
    reference.logistic_mixture_nll,
    _fake,
    gradient=Formula(_setup_context, _backward),
)
BACKWARD = OPERATOR.define(
    "logistic_mixture_nll_backward(Tensor grad, Tensor params, Tensor x, int levels) -> Tensor",
    reference.logistic_mixture_nll_backward,
    _fake_backward,
    gradient=THROUGH_REFERENCE,
)
SAMPLE = OPERATOR.define(
    "logistic_mixture_sample(Tensor params, Tensor noise, int levels, float temperature) -> Tensor",
    reference.logistic_mixture_sample,
    _fake_sample,
    gradient=Refused("logistic_mixture_sample: a draw of integers cannot be differentiated"),
)
