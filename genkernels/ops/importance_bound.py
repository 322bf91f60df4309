"""The importance-weighted bound and the Gaussian terms under it: schema, checks, fakes, gradients. The maths is in
`genkernels.reference.importance_bound`."""

from __future__ import annotations

from torch import Tensor

from genkernels.ops import _autocast as autocast
from genkernels.ops import _checks as checks
from genkernels.ops._autocast import work_dtype
from genkernels.ops._gradients import THROUGH_REFERENCE, Formula
from genkernels.ops._operator import Operator
from genkernels.reference import importance_bound as reference

NAME, GAUSSIAN = "importance_bound", "gaussian_reparameterize"


def importance_bound(log_w: Tensor) -> tuple[Tensor, Tensor]:
    r"""The importance-weighted bound of K samples and each sample's share in it, in one pass.

    .. math:: F_n = \log\frac1K\sum_k e^{\ell_{nk}},\qquad \tilde w_{nk} = \frac{e^{\ell_{nk}}}{\sum_j e^{\ell_{nj}}}

    Equivalent to::

        bound = log_w.logsumexp(1) - math.log(log_w.shape[1])
        weights = log_w.softmax(1)

    The weights are the gradient of the bound: that of an estimator of it is :math:`\sum_k \tilde w_k \nabla \ell_k`.

    Args:
        log_w: ``[N, K]``, ln p(x, z) − ln q(z|x) of K samples for each of N examples, nats, fp64, fp32, bf16 or fp16;
            K of at least 1.

    Returns:
        ``(bound, weights)``, ``[N]`` and ``[N, K]``, fp32 (fp64 for fp64), computed so, relative to each row's largest.
        A row of −∞ has the bound −∞, weights of 0 and a gradient of 0. +∞ gives the bound +∞, NaN gives NaN, and
        either weights of NaN, in that row alone.

    Raises:
        ValueError: a shape or a device is wrong. TypeError: a dtype is. BackendUnavailable: a forced backend cannot
            run.

    Source: Burda et al., "Importance weighted autoencoders", 2016, eq. 8 and 14.
    """
    checks.tensors(NAME, {"log_w": log_w})
    if log_w.dim() != 2 or not log_w.shape[1]:
        raise ValueError(f"{NAME}: log_w must be [N, K], K of at least 1, got {list(log_w.shape)}")
    return BOUND(log_w)


def gaussian_reparameterize(
    noise: Tensor, mean: Tensor, log_scale: Tensor, *, prior: bool = True, stopped: bool = False
) -> tuple[Tensor, Tensor]:
    r"""K samples of a Gaussian posterior an example, and what they add to the log-weight, in one pass.

    .. math:: z_{nk} = \mu_n + e^{s_n} \odot \varepsilon_{nk},\qquad
        r_{nk} = \ln\mathcal N(z_{nk}; 0, 1) - \ln\mathcal N(z_{nk}; \mu_n, e^{s_n})

    Equivalent to::

        z = mean[:, None] + log_scale.exp()[:, None] * noise
        q = torch.distributions.Normal(mean[:, None], log_scale.exp()[:, None])
        log_ratio = (torch.distributions.Normal(0, 1).log_prob(z) - q.log_prob(z)).sum(2)

    Args:
        noise: ``[N, K, D]``, ε, standard normal, fp64, fp32, bf16 or fp16. Where it requires a gradient the call runs
            in plain PyTorch.
        mean, log_scale: ``[N, D]``, μ and s, of the noise's dtype; under autocast the widest of the three is taken.
        prior: whether the standard normal prior is in the ratio; without it r is −ln q(z), for a prior of one's own.
        stopped: μ and s inside ln q count as constants, so that the gradient comes through z alone: the values are the
            same, and the score term, whose mean is zero, is left out ("sticking the landing"). What DReG is made of.

    Returns:
        ``(z, log_ratio)``: ``[N, K, D]`` like noise, contiguous, and ``[N, K]``, nats, fp32 (fp64 for fp64). Half
        numbers are computed in fp32 and rounded once; the ratio is that of z before it is rounded.

    Raises:
        ValueError: a shape or a device is wrong. TypeError: a dtype is. BackendUnavailable: a forced backend cannot
            run.

    Source: Kingma & Welling, "Auto-encoding variational Bayes", 2014; Roeder et al., "Sticking the landing", 2017
    (stopped).
    """
    checks.tensors(GAUSSIAN, {"noise": noise, "mean": mean, "log_scale": log_scale})
    if autocast.active(noise):
        dtype = autocast.widest(noise, mean, log_scale)
        noise, mean, log_scale = noise.to(dtype), mean.to(dtype), log_scale.to(dtype)
    checks.same_dtype(GAUSSIAN, {"noise": noise, "mean": mean, "log_scale": log_scale})
    if noise.dim() != 3:
        raise ValueError(f"{GAUSSIAN}: noise must be [N, K, D], got {list(noise.shape)}")
    rows = (noise.shape[0], noise.shape[2])
    checks.shape(GAUSSIAN, "mean", mean, rows, "[N, D]")
    checks.shape(GAUSSIAN, "log_scale", log_scale, rows, "[N, D]")
    options = bool(prior), bool(stopped)
    if noise.requires_grad:
        return reference.gaussian_reparameterize(noise, mean, log_scale, *options)
    return REPARAMETERIZE(noise, mean, log_scale, *options)


def _fake_bound(log_w):
    dtype = work_dtype(log_w)
    return log_w.new_empty((log_w.shape[0],), dtype=dtype), log_w.new_empty(log_w.shape, dtype=dtype)


def _fake_bound_backward(grad_bound, grad_weights, weights, like):
    return weights.new_empty(weights.shape, dtype=like.dtype)


def _fake_reparameterize(noise, mean, log_scale, prior, stopped):
    return noise.new_empty(noise.shape), noise.new_empty(noise.shape[:2], dtype=work_dtype(noise))


def _fake_reparameterize_backward(grad_z, grad_ratio, noise, mean, log_scale, prior, stopped):
    return mean.new_empty(mean.shape), log_scale.new_empty(log_scale.shape)


def _setup_bound(ctx, inputs, output):
    log_w, weights = inputs[0], output[1]
    ctx.save_for_backward(weights, *[log_w] * (log_w.dtype != weights.dtype))


def _bound_backward(ctx, grad_bound, grad_weights):
    weights, *like = ctx.saved_tensors
    return (BOUND_BACKWARD.dense(grad_bound, grad_weights, weights, *like or [weights]),)


def _setup_reparameterize(ctx, inputs, output):
    *tensors, ctx.prior, ctx.stopped = inputs
    ctx.save_for_backward(*tensors)


def _reparameterize_backward(ctx, grad_z, grad_ratio):
    if ctx.needs_input_grad[0]:
        raise RuntimeError(f"{GAUSSIAN}: the torch operator has no gradient by noise; genkernels.ops.{GAUSSIAN} has")
    grads = REPARAMETERIZE_BACKWARD.dense(grad_z, grad_ratio, *ctx.saved_tensors, ctx.prior, ctx.stopped)
    return None, *grads, None, None


OPERATOR = Operator(
    NAME, functions=(importance_bound, gaussian_reparameterize), kernels={"cpu": "", "triton": "", "cuda": ""}
)
BOUND = OPERATOR.define(
    "importance_bound(Tensor log_w) -> (Tensor, Tensor)",
    reference.importance_bound,
    _fake_bound,
    gradient=Formula(_setup_bound, _bound_backward),
)
BOUND_BACKWARD = OPERATOR.define(
    "importance_bound_backward(Tensor? grad_bound, Tensor? grad_weights, Tensor weights, Tensor like) -> Tensor",
    reference.importance_bound_backward,
    _fake_bound_backward,
    gradient=THROUGH_REFERENCE,
)
REPARAMETERIZE = OPERATOR.define(
    "gaussian_reparameterize(Tensor noise, Tensor mean, Tensor log_scale, bool prior, bool stopped) "
    "-> (Tensor, Tensor)",
    reference.gaussian_reparameterize,
    _fake_reparameterize,
    gradient=Formula(_setup_reparameterize, _reparameterize_backward),
)
REPARAMETERIZE_BACKWARD = OPERATOR.define(
    "gaussian_reparameterize_backward(Tensor? grad_z, Tensor? grad_ratio, Tensor noise, Tensor mean, "
    "Tensor log_scale, bool prior, bool stopped) -> (Tensor, Tensor)",
    reference.gaussian_reparameterize_backward,
    _fake_reparameterize_backward,
    gradient=THROUGH_REFERENCE,
)
