"""The log-determinant of a residual block: schema, checks, fakes, gradient. The maths is in
`genkernels.reference.log_det_series`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from genkernels._options import Nonlinearity
from genkernels.ops import _autocast as autocast
from genkernels.ops import _block_checks as block_checks
from genkernels.ops import _checks as checks
from genkernels.ops._gradients import THROUGH_REFERENCE, Formula, transforms_active
from genkernels.ops._operator import DIFFERENTIABLE, Operator, in_graph
from genkernels.reference import _block
from genkernels.reference import log_det_series as reference

NAME = "log_det_series"
#: Features of the largest Jacobian that is taken whole: it costs as many passes.
MOST_FEATURES = 256
#: Features of the largest that is taken whole instead of a chain of products for each term (CPU).
MOST_WHOLE = 16
FIRST_TERMS = ("probe", "exact")
#: What a gradient needs of a roulette's weights: that of the first term, which is always there.
FIRST = [1.0]


class LogDetSeries(NamedTuple):
    """What `log_det_series` returns.

    Args:
        value: g(x), like x. log_det: ``[N]``, fp32 (fp64 for fp64). shrink: ``[P, N]``, the norm of the last vector of
            the series over that of the probe, to the power 1/n for n terms: near the ratio of two terms.
    """

    value: Tensor
    log_det: Tensor
    shrink: Tensor


class Stopped(NamedTuple):
    """Terms whose number a compiled pass knows as a tensor.

    Args:
        drawn: ``[2]``, fp64 on the CPU: p of the roulette, and how many terms it adds. known: terms before it. poisson:
            whether it stops so, or else geometrically.
    """

    drawn: Tensor
    known: int
    poisson: bool


def log_det_series(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    activation: str = "lipswish",
    parameters: Tensor | None = None,
    *,
    probes: Tensor | None,
    terms: Sequence[float] = (),
    first_term: str = "probe",
) -> LogDetSeries:
    r"""log\|det(I + J)\| of y = x + g(x), J the Jacobian of an alternation of linear maps and one activation.

    .. math:: \log\lvert\det(I + J)\rvert \approx \sum_k c_k \frac{(-1)^{k+1}}{k}\, v^\top J^k v

    The slopes of the activations are computed once; each term is one chain of transposed maps with them, without a
    graph. The gradient is one product more, whatever the number of terms, and so is its memory.

    Equivalent to (one probe, c = 1, fully connected)::

        value = g(x)
        w, log_det = v, 0
        for k in range(1, n + 1):
            (w,) = torch.autograd.grad(value, x, w, retain_graph=True)
            log_det = log_det + (-1) ** (k + 1) / k * (w * v).sum(1)

    Args:
        x: ``[N, D]`` or ``[N, C, H, W]``, fp64, fp32, bf16 or fp16 (computed in fp32).
        weights: of two maps or more, ``[outputs, inputs]``, or ``[outputs, inputs, k, k]`` with k = 1 or 3, of
            convolutions with zeros around and stride 1. All tensors are of one dtype; under autocast the widest is
            taken.
        biases: of each map ``[outputs]``, or ``[N, outputs]``: each sample's own, which is how a context comes in; None
            for none.
        activation: between any two maps: ``relu``, ``leaky_relu``, ``elu``, ``silu``, ``tanh``, ``lipswish`` or
            ``clipswish`` (which has twice as many outputs as inputs).
        parameters: ``[maps − 1]``, of each activation: the slope below 0 of leaky_relu, alpha of elu, the steepness of
            lipswish and clipswish; 1 by default.
        probes: v, ``[P, N, ...]``: their mean is taken. None: the whole Jacobian and its determinant, of up to 256
            features; then there are no terms.
        terms: c, a number for each term: 1 for a plain series, 1 over the probability that a roulette gets there.
        first_term: ``exact`` takes the trace of J itself, for three maps of which the middle one is a matrix or a 1×1
            convolution; ``probe`` as the others.

    Returns:
        `LogDetSeries`: value, log_det and shrink. Each sample's log-determinant has a gradient of its own, so that
        samples may weigh as they like. It takes the probes and what the series sums up as constants, which is right in
        the mean over probes; a gradient of the gradient goes through the sums.

    Raises:
        ValueError: a shape or an option is wrong. TypeError: a dtype is. BackendUnavailable: a forced backend cannot
            run.

    Source: Behrmann et al., "Invertible residual networks", 2019; Chen et al., "Residual flows for invertible
    generative modeling", 2019 (the gradient).
    """
    number, x, weights, biases, parameters, (probes,) = block_checks.settled(
        NAME, "x", x, weights, biases, parameters, activation, {"probes": probes}
    )
    stopped = isinstance(terms, Stopped)  # within a compiled pass
    terms = terms if stopped else [float(c) for c in terms]
    checks.option(NAME, "first_term", first_term, FIRST_TERMS)
    if probes is None:
        if terms or first_term == "exact":
            raise ValueError(f"{NAME}: terms and first_term need probes, got None for these")
        features = x.shape[1:].numel()
        if features > MOST_FEATURES:
            raise ValueError(
                f"{NAME}: without probes x may have up to {MOST_FEATURES} features a sample, got {features}; a series "
                "with probes takes any number"
            )
    elif probes.shape[1:] != x.shape or not len(probes):
        raise ValueError(
            f"{NAME}: probes must be [P, {', '.join(map(str, x.shape))}] with P of at least 1, got {list(probes.shape)}"
        )
    if transforms_active() and torch.compiler.is_compiling():
        torch._dynamo.graph_break()  # which forgets there what a derivative of one's own says about forward mode
    exact = first_term == "exact" and terms
    if exact and not block_checks.takes_exact_first(weights, x.shape[2:]):
        raise ValueError(
            f"{NAME}: first_term 'exact' needs three maps, the middle one a matrix or a 1x1 convolution and the others "
            f"of one size, on images of at least 2x2, got weights {[list(w.shape) for w in weights]} for "
            f"{list(x.shape)}"
        )
    with autocast.kept_out(x):
        # as an operator, so that autocast reaches no gradient of it either
        map_of = reference.log_det_series_trace_map if transforms_active() else TRACE_MAP.dense
        trace_map = map_of(weights, number) if exact else None
        given = x, weights, biases, parameters, trace_map, probes
        if stopped:
            value, log_det, _, shrink = STOPPED(*given, *terms, number)
        else:
            run = KEEPING if _keeps(*given, terms, number) else SERIES
            value, log_det, _, shrink, *_ = run(*given, terms, number)
    return LogDetSeries(value, log_det, shrink)


def takes_exact_first(weights: Sequence[Tensor], size: Sequence[int]) -> bool:
    """Whether a block of these weights, on images of this size, takes ``first_term="exact"``."""
    return block_checks.takes_exact_first(weights, size)


def trace(x: Tensor, weights, biases, activation: str, parameters) -> Tensor:
    """tr J ``[N]`` by its closed form, in plain PyTorch: the exact first term beside a series by other means."""
    number, x, weights, biases, parameters, _ = block_checks.settled(
        NAME, "x", x, weights, biases, parameters, activation, {}
    )
    work = block_checks.work(x)
    with autocast.kept_out(x):
        block, x = _block.Block(weights, biases, parameters, number).to(work), x.to(work)
        return reference.exact_trace(block, _block.linearize(block, x), x, _block.trace_map(block))


def _keeps(x, weights, biases, parameters, trace_map, probes, terms, number) -> bool:
    """Whether the forward pass keeps what the backward one would compute anew: where it takes the Jacobians whole, and
    so has the tangents along the probes for nothing (csrc/cpu/residual_block/jacobian.h). Of more probes than features
    that would be more than the Jacobians themselves."""
    if not torch.is_grad_enabled() or probes is None or x.dim() != 2 or transforms_active():
        return False
    few = len(probes) <= x.shape[1] <= MOST_WHOLE and x.shape[1] < len(probes) * len(terms)
    differentiates = few and any(t.requires_grad for t in (x, *weights, *biases, parameters))
    return differentiates and KEEPING.backend_for(x) == "cpu"


# --------------------------------------------------------------------------------------------------- gradient and fakes


def _setup(ctx, inputs, output):
    x, weights, biases, parameters, trace_map, probes, ctx.terms, ctx.activation = inputs
    ctx.count = len(weights)
    ctx.mark_non_differentiable(*output[2:])
    kept = output[4] if len(output) > 4 else None
    ctx.save_for_backward(x, parameters, trace_map, probes, output[2], kept, *weights, *biases)


def _backward(ctx, grad_value, grad_log_det, *_):
    if grad_value is None and grad_log_det is None:
        return (None,) * 8
    x, parameters, trace_map, probes, sums, kept, *both = ctx.saved_tensors
    weights, biases = both[: ctx.count], both[ctx.count :]
    first = ctx.terms[0] if ctx.terms else 0.0
    as_reference = transforms_active()
    with autocast.kept_out(x):
        if kept is not None and not as_reference and not torch.is_grad_enabled():
            given = grad_value, grad_log_det, x, weights, biases, parameters, trace_map, probes, sums, kept
            return _by_argument(KEPT_BACKWARD.dense(*given, first, ctx.activation), ctx.count, trace_map)
        if torch.is_grad_enabled() and grad_log_det is not None:
            # as functions of the rest, which a gradient of the gradient goes through
            again = reference.log_det_series_sums if as_reference else SUMS.dense
            sums = again(x, weights, biases, parameters, trace_map, probes, ctx.terms, ctx.activation)
        run = reference.log_det_series_backward if as_reference else BACKWARD.dense
        found = run(
            *(grad_value, grad_log_det, x, weights, biases, parameters, trace_map, probes, sums, first, ctx.activation)
        )
    return _by_argument(found, ctx.count, trace_map)


def _by_argument(found, count, trace_map):
    by_x, by_weights, by_biases = found[0], found[1 : 1 + count], found[1 + count : 1 + 2 * count]
    by_parameters, by_map = found[1 + 2 * count], found[-1] if trace_map is not None else None
    return by_x, by_weights, by_biases, by_parameters, by_map, None, None, None


def _stopped(x, weights, biases, parameters, trace_map, probes, drawn, known, poisson, activation):
    p, further = drawn.tolist()
    terms = reference.roulette_weights(known, poisson, p, int(further))
    return SERIES(x, weights, biases, parameters, trace_map, probes, terms, activation)


def _fake_stopped(x, weights, biases, parameters, trace_map, probes, drawn, known, poisson, activation):
    return _fake(x, weights, biases, parameters, trace_map, probes, None, activation)


def _setup_stopped(ctx, inputs, output):
    _setup(ctx, (*inputs[:6], FIRST, inputs[-1]), output)


def _backward_stopped(ctx, *grads):
    return *_backward(ctx, *grads), None, None


def _setup_trace_map(ctx, inputs, output):
    weights, ctx.activation = inputs
    ctx.save_for_backward(*weights)


def _backward_trace_map(ctx, grad):
    run = reference.log_det_series_trace_map_backward if transforms_active() else TRACE_MAP_BACKWARD.dense
    with autocast.kept_out(grad):
        return run(grad, list(ctx.saved_tensors), ctx.activation), None


def _fake(x, weights, biases, parameters, trace_map, probes, terms, activation):
    features = x.shape[1:].numel()
    lead = features if probes is None else probes.shape[0]
    work = block_checks.work(x)
    log_det, shrink = x.new_empty((x.shape[0],), dtype=work), x.new_empty((lead, x.shape[0]), dtype=work)
    return x.new_empty(x.shape), log_det, x.new_empty((lead, *x.shape)), shrink


def _fake_keeping(x, weights, biases, parameters, trace_map, probes, terms, activation):
    found = _fake(x, weights, biases, parameters, trace_map, probes, terms, activation)
    rows = sum(w.shape[0] for w in weights[:-1])
    shape = ((x.shape[0] + 15) // 16, 1 + probes.shape[0], rows, 16)
    return *found, x.new_empty(shape, dtype=block_checks.work(x))


def _fake_trace_map(weights, activation):
    twice = 2 if activation == Nonlinearity.CLIPSWISH else 1
    classes = 9 if weights[0].dim() == 4 and weights[0].shape[-1] == 3 else 1
    return weights[0].new_empty((classes, twice * weights[1].shape[0], twice * weights[0].shape[0]))


def _fake_sums(x, weights, biases, parameters, trace_map, probes, terms, activation):
    return x.new_empty((x.shape[1:].numel() if probes is None else probes.shape[0], *x.shape))


def _fake_kept_backward(
    grad_value, grad_log_det, x, weights, biases, parameters, trace_map, probes, sums, kept, first, activation
):
    found = block_checks.fakes(x, weights, biases, parameters)
    return found if trace_map is None else [*found, trace_map.new_empty(trace_map.shape)]


def _fake_backward(
    grad_value, grad_log_det, x, weights, biases, parameters, trace_map, probes, sums, first, activation
):
    found = block_checks.fakes(x, weights, biases, parameters)
    return found if trace_map is None else [*found, trace_map.new_empty(trace_map.shape)]


OPERATOR = Operator(
    NAME,
    functions=(log_det_series,),
    types=(LogDetSeries,),
    kernels={"cpu": "", "triton": "", "cuda": ""},
    composability=DIFFERENTIABLE,
)
SERIES = OPERATOR.define(
    "log_det_series(Tensor x, Tensor[] weights, Tensor[] biases, Tensor parameters, Tensor? trace_map, Tensor? probes, "
    "float[] terms, int activation) -> (Tensor, Tensor, Tensor, Tensor)",
    reference.log_det_series,
    _fake,
    gradient=Formula(_setup, _backward),
)
BACKWARD = OPERATOR.define(
    "log_det_series_backward(Tensor? grad_value, Tensor? grad_log_det, Tensor x, Tensor[] weights, Tensor[] biases, "
    "Tensor parameters, Tensor? trace_map, Tensor? probes, Tensor sums, float first, int activation) -> Tensor[]",
    reference.log_det_series_backward,
    _fake_backward,
    gradient=THROUGH_REFERENCE,
)
ANEW = dict.fromkeys(("triton", "cuda"), "a GPU computes anew what it would keep")
KEEPING = OPERATOR.define(
    "log_det_series_keeping(Tensor x, Tensor[] weights, Tensor[] biases, Tensor parameters, Tensor? trace_map, "
    "Tensor probes, float[] terms, int activation) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.log_det_series_keeping,
    _fake_keeping,
    gradient=Formula(_setup, _backward),
    kernels=ANEW,
)
KEPT_BACKWARD = OPERATOR.define(
    "log_det_series_kept_backward(Tensor? grad_value, Tensor? grad_log_det, Tensor x, Tensor[] weights, "
    "Tensor[] biases, Tensor parameters, Tensor? trace_map, Tensor probes, Tensor sums, Tensor kept, float first, "
    "int activation) -> Tensor[]",
    reference.log_det_series_kept_backward,
    _fake_kept_backward,
    gradient=THROUGH_REFERENCE,
    kernels=ANEW,
)
SUMS = OPERATOR.define(
    "log_det_series_sums(Tensor x, Tensor[] weights, Tensor[] biases, Tensor parameters, Tensor? trace_map, "
    "Tensor? probes, float[] terms, int activation) -> Tensor",
    reference.log_det_series_sums,
    _fake_sums,
    gradient=THROUGH_REFERENCE,
    kernels=dict.fromkeys(("cpu", "triton", "cuda"), "a gradient of the gradient alone asks for them"),
)
TRACE_MAP = OPERATOR.define(
    "log_det_series_trace_map(Tensor[] weights, int activation) -> Tensor",
    reference.log_det_series_trace_map,
    _fake_trace_map,
    gradient=Formula(_setup_trace_map, _backward_trace_map),
    kernels=dict.fromkeys(("triton", "cuda"), "a product of weights, once a call, which torch has"),
)
TRACE_MAP_BACKWARD = OPERATOR.define(
    "log_det_series_trace_map_backward(Tensor grad, Tensor[] weights, int activation) -> Tensor[]",
    reference.log_det_series_trace_map_backward,
    lambda grad, weights, activation: [w.new_empty(w.shape) for w in weights],
    gradient=THROUGH_REFERENCE,
    kernels=dict.fromkeys(("triton", "cuda"), "products of weights, once a call, which torch has"),
)
STOPPED = in_graph(
    "log_det_series_stopped(Tensor x, Tensor[] weights, Tensor[] biases, Tensor parameters, Tensor? trace_map, "
    "Tensor probes, Tensor drawn, int known, bool poisson, int activation) -> (Tensor, Tensor, Tensor, Tensor)",
    _stopped,
    _fake_stopped,
    gradient=Formula(_setup_stopped, _backward_stopped),
)
