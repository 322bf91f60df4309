"""The importance-weighted bound as a loss, by any estimator of its gradient; and as an estimate of ln p(x)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from genkernels.losses import _in_graph
from genkernels.losses._estimators import Estimator
from genkernels.losses._two_passes import Chunks, LogWeight, carry, check_latents
from genkernels.networks import _outside
from genkernels.networks._outside import outside
from genkernels.ops import checks, transforms_active
from genkernels.ops._operator import of_others

WHO, ESTIMATE = "importance_loss", "importance_estimate"


class Bound(NamedTuple):
    """What `importance_loss` returns; the last two without a graph.

    Args:
        loss: a scalar, the negative mean of the bounds, to be minimised.
        bound: ``[N]``, nats, with the same gradient: for examples that count differently.
        effective_sample_size: ``[N]``, :math:`1 / \\sum_i \\tilde w_i^2`, from 1 to k; 0 where every weight is.
        largest_weight: ``[N]``, the share of the likeliest sample.
    """

    loss: Tensor
    bound: Tensor
    effective_sample_size: Tensor
    largest_weight: Tensor


def importance_loss(
    parameters: Tensor | Sequence[Tensor],
    log_weight: LogWeight,
    *,
    k: int,
    chunk: int | None = None,
    estimator: str | Estimator = "iwae",
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> Bound:
    r"""The importance-weighted bound of k samples (IWAE), by any of the estimators of its gradient, in memory that does
    not grow with k.

    .. math:: F_k = \mathbb E\,\log\frac1k\sum_{i=1}^k w_i,\qquad w_i = \frac{p(x, z_i)}{q(z_i|x)},\qquad
        \nabla F_k = \mathbb E \sum_i \tilde w_i \nabla \log w_i

    Equivalent to, for ``iwae``::

        log_w, z = log_weight(parameters, k, generator, False)
        bound = log_w.logsumexp(1) - math.log(k)
        loss = -bound.mean()

    In chunks the log-weights are found without a graph first; ``backward`` then runs each chunk again, with one, times
    its weights, which by then are fixed: the same gradient, and the same noise, from as many seeds as chunks. The
    encoder, whose outputs are `parameters`, runs once. The last chunk keeps its graph from the first pass.

    What a chunk costs, with k = 50, beside one graph of all samples: memory that k does not change, that of as many
    samples and, while chunks come and go, of one more gradient by what log_weight uses; and time, in which a pass
    forward more is a third at best. A training step of `genkernels.models.IWAE`'s presets with Adam, beyond its weights
    and moments, on one core: `mnist` by 20, 10 samples a chunk, takes 1.01 times the memory of k = 1 and 1.25 times as
    long as one graph, which takes 2.0 times that memory; `digits` by 64, 5 a chunk, 1.02 and 1.3 to 1.4 (one graph
    4.7); `photos32` by 16, one a chunk, 1.01 and 0.8 (one graph 15.6). Fewer samples a chunk than that are more calls,
    which a small network pays for: one a chunk, `mnist` takes 2.8 times as long.

    Estimators, of which each has the gradient of its bound by p as its mean; φ are the parameters of q:

    - ``iwae``: as above. Its noise by φ outgrows it with k.
    - ``dreg``: without the score term, φ by :math:`\sum_i \tilde w_i^2\, \partial_z \log w_i\, \partial_\phi z_i`: of
      the same mean, and its noise falls with k.
    - ``stl``: iwae with the score term left out; for k > 1 **biased** by φ. For k = 1 it is dreg.
    - ``miwae:m``: the mean of m bounds of k/m samples each, looser.
    - ``piwae:m``: p by iwae with all k samples, φ by miwae. Goes back twice through log_weight.
    - ``ciwae:β``: β ELBO + (1 − β) iwae.
    - ``vimco``: for discrete latents, whose samples carry no gradient: φ by the score, each sample's against a
      baseline of the others. k of at least 2. It takes it that `parameters` enter log_w through ln q alone.

    Args:
        parameters: what the encoder gave, ``[N, ...]`` each: the mean and the log-scale of q, say.
        log_weight: ``log_weight(parameters, size, generator, stopped)`` draws `size` samples for each example with that
            generator and gives ``(log_w, latents)``: ln p(x, z) − ln q(z|x) ``[N, size]``, and the tensors
            ``[N, size, ...]``, one or a tuple, through which the gradient by `parameters` goes, for dreg; None where
            there are none. With `stopped` the parameters inside ln q must count as constants.
            `genkernels.ops.gaussian_reparameterize` does both: its ``(z, log_ratio)`` are the latents. It is called
            once a chunk, and once more in ``backward``, with the same results: it must draw from its generator, or
            torch's, and keep no count. A network that couples samples (BatchNorm in training) sees a chunk at a time.
        k: samples for each example, at least 1.
        chunk: samples a pass; None for all of them in one graph, which can be differentiated again.
        estimator: a word as above, or an `Estimator`.
        generator: of the seeds, and so of all noise; torch's own by default. seed: in its place. Chunks of another size
            draw other noise.

    Returns:
        `Bound`: the loss, fp32 (fp64 for fp64 log-weights), and what describes it. Its gradient reaches `parameters`
        and every parameter that log_weight uses, in ``backward``, once: hooks and ``DistributedDataParallel`` around
        the whole model see it as ever.

    The graph of ``torch.compile`` breaks here, but for the models of this library.

    Raises:
        ValueError: k, chunk, the estimator or what log_weight returns is wrong; dreg meets latents of which one is made
            from another, or parameters past its latents; vimco meets latents with a gradient. RuntimeError: in chunks,
            log_weight uses a tensor with a graph that is not among `parameters`, or it runs inside transforms of
            ``torch.func``.

    Source: Burda et al., "Importance weighted autoencoders", 2016; Tucker et al., "Doubly reparameterized gradient
    estimators for Monte Carlo objectives", 2019 (dreg); Roeder et al., "Sticking the landing", 2017 (stl); Rainforth et
    al., "Tighter variational bounds are not necessarily better", 2018 (miwae, piwae, ciwae); Mnih & Rezende,
    "Variational inference for Monte Carlo objectives", 2016 (vimco); Bauer & Mnih, "Generalized doubly reparameterized
    gradient estimators", 2021 (what dreg needs for hierarchies).
    """
    arguments = (parameters, log_weight, k, chunk, estimator, generator, seed)
    if not torch.compiler.is_compiling():
        return _importance_loss(*arguments)
    chosen = Estimator.parse(estimator)
    plain = chunk is None and not (chosen.weighs_apart or chosen.stopped)
    held = plain or _outside.ASKS_OF_MODULES
    if generator is not None or not (held and getattr(log_weight, "takes_stream", False)):
        return outside(_importance_loss, *arguments)
    chunks = _chunks(WHO, parameters, log_weight, k, chunk, chosen, generator, seed)
    if plain:
        weighed = chosen.weighed(chunks.one_graph()[0])
        return _described(weighed.bound, weighed.shares)
    data, model = log_weight.data, log_weight.model

    def read():
        model._log_weight(*data)(chunks.parameters, 1, chunks.generator(0), False)

    key, tensors = _in_graph.held_model(model, read)
    word = chosen.name if chosen.setting is None else f"{chosen.name}:{chosen.setting!r}"  # all digits
    seed = chunks.seed if isinstance(chunks.seed, Tensor) else torch.tensor(chunks.seed)
    given = tensors, chunks.parameters, data, seed, k, chunk, word
    bound, size, largest, *means = torch.ops.genkernels.importance_loss_of(key, *given)
    log_weight.counted(means)
    return Bound(-bound.mean(), bound, size, largest)


def _held(model, tensors, parameters, data, seed, k, chunk, estimator):
    log_weight = _LogWeight(model, tensors, data)
    if chunk is not None or Estimator.parse(estimator).weighs_apart:
        log_weight.with_leaves()
    found = _importance_loss(parameters, log_weight, k, chunk, estimator, None, seed)
    return [found.bound, found.effective_sample_size, found.largest_weight, *log_weight.draws.means()]


class _LogWeight:
    """That of a model which has the tensors of a compiled pass whenever it is called, going back too."""

    def __init__(self, key: str, tensors: Sequence[Tensor], data: Sequence[Tensor | None]):
        self.key, self.tensors, self.data, self.draws = key, list(tensors), data, None
        self.stands_for: dict[int, Tensor] = {}  #: what a leaf of its graph is to the pass, by identity

    def with_leaves(self) -> None:
        """Puts leaves in the place of tensors, which within a compiler are none."""
        given, self.tensors = self.tensors, [t.detach().requires_grad_(t.requires_grad) for t in self.tensors]
        self.stands_for = {id(leaf): t for leaf, t in zip(self.tensors, given, strict=True)}

    def __call__(self, *arguments):
        def of(model):
            self.draws = self.draws or model._log_weight(*self.data)
            return self.draws(*arguments)

        return _in_graph.run(self.key, self.tensors, of)


of_others(
    "importance_loss_of(str model, Tensor[] tensors, Tensor[] parameters, Tensor?[] data, Tensor seed, int k, "
    "int? chunk, str estimator) -> Tensor[]",
    _held,
)


def _importance_loss(parameters, log_weight, k, chunk, estimator, generator, seed) -> Bound:
    chunks = _chunks(WHO, parameters, log_weight, k, chunk, estimator, generator, seed)
    chosen = chunks.estimator
    if not torch.is_grad_enabled():
        weighed = chosen.weighed(chunks.values() if chunk else chunks.one_graph()[0])
        return _described(weighed.bound, weighed.shares)
    if chunk is None and not chosen.weighs_apart:
        log_w, latents = chunks.one_graph()
        check_latents(WHO, chosen, log_w, latents, chunks.parameters)
        weighed = chosen.weighed(log_w)
        if chosen.name == "dreg":
            carry(latents, weighed.shares)
        return _described(weighed.bound, weighed.shares)
    with torch.no_grad():
        weighed = chosen.weighed(chunks.recorded())
    return _described(chunks.attached(weighed), weighed.shares)


def _described(bound: Tensor, shares: Tensor) -> Bound:
    squares = shares.square().sum(1)
    size = torch.where(squares == 0, 0, 1 / squares)
    return Bound(-bound.mean(), bound, size, shares.amax(1))


class ImportanceEstimate(NamedTuple):
    """What `importance_estimate` returns, of each example, in fp64: estimates of ln p(x), from below.

    Args:
        bound: ``[N]``, nats. effective_sample_size: ``[N]``, from 1 to k. largest_weight: ``[N]``, the share of the
            likeliest sample: near 1 the bound says more of that one than of ln p(x).
    """

    bound: Tensor
    effective_sample_size: Tensor
    largest_weight: Tensor

    @property
    def mean(self) -> Tensor:
        """The mean bound, nats an example."""
        return self.bound.mean()

    @property
    def standard_error(self) -> Tensor:
        """That of the mean, over examples; NaN for a single one."""
        return self.bound.std() / len(self.bound) ** 0.5

    @classmethod
    def joined(cls, parts: Sequence[ImportanceEstimate]) -> ImportanceEstimate:
        """Those of several batches as one."""
        return cls(*(torch.cat(values) for values in zip(*parts, strict=True)))


@torch.no_grad()
def importance_estimate(
    parameters: Tensor | Sequence[Tensor],
    log_weight: LogWeight,
    *,
    k: int = 5000,
    chunk: int | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> ImportanceEstimate:
    r"""Estimates ln p(x) by the bound of many samples, chunk by chunk, with what says how far to trust it.

    .. math:: \ln p(x) \approx \log\frac1k\sum_{i=1}^k w_i,\qquad
        \mathrm{ESS} = \frac{(\sum_i w_i)^2}{\sum_i w_i^2},\qquad \frac{\max_i w_i}{\sum_i w_i}

    Equivalent to::

        log_w = log_weight(parameters, k, generator, False)[0].double()
        bound, shares = log_w.logsumexp(1) - math.log(k), log_w.softmax(1)
        ImportanceEstimate(bound, 1 / shares.square().sum(1), shares.amax(1))

    but for memory, which does not grow with k: of the samples three numbers an example are kept, in fp64.

    Args:
        parameters, log_weight: as for `importance_loss`. k: samples for each example. chunk: samples at once, 100
            by default, or k where that is less; where it does not divide k the last chunk is smaller.
        generator, seed: as for `importance_loss`.

    Returns:
        `ImportanceEstimate`. Those of several batches are put together by `ImportanceEstimate.joined`.

    Raises: as `importance_loss`.

    Source: Burda et al., "Importance weighted autoencoders", 2016 (k = 5,000).
    """
    checks.integer(ESTIMATE, "k", k, 1)
    chunk = min(k, 100) if chunk is None else chunk
    chunks = _chunks(ESTIMATE, parameters, log_weight, k, chunk, "iwae", generator, seed)
    total = squares = largest = None
    for index in range(len(chunks.sizes)):
        log_w = chunks.run(chunks.parameters, index)[0].double()
        found = log_w.logsumexp(1), (2 * log_w).logsumexp(1), log_w.amax(1)
        if total is None:
            total, squares, largest = found
        else:
            total, squares = total.logaddexp(found[0]), squares.logaddexp(found[1])
            largest = torch.maximum(largest, found[2])
    nothing = total == -torch.inf
    size = (2 * total - squares).exp().masked_fill(nothing, 0)
    return ImportanceEstimate(
        total - torch.tensor(float(k), dtype=total.dtype).log(), size, (largest - total).exp().masked_fill(nothing, 0)
    )


def _chunks(who: str, parameters, log_weight, k, chunk, estimator, generator, seed) -> Chunks:
    parameters = (parameters,) if isinstance(parameters, Tensor) else tuple(parameters)
    if not parameters or not all(isinstance(p, Tensor) for p in parameters):
        found = ", ".join(type(p).__name__ for p in parameters) or "none"
        raise TypeError(f"{who}: parameters must be a tensor or several, what the encoder gave, got {found}")
    checks.same_device(who, {f"parameters[{i}]": p for i, p in enumerate(parameters)})
    checks.integer(who, "k", k, 1)
    if chunk is not None:
        checks.integer(who, f"chunk (of k = {k} samples)", chunk, 1, k)
    chosen = Estimator.parse(estimator)
    chosen.check_k(who, k)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"{who}: generator must be a torch.Generator, got {type(generator).__name__}")
    if generator is not None and seed is not None:
        raise ValueError(f"{who}: either generator or seed must be given, got both")
    if seed is not None and not isinstance(seed, Tensor):  # which a compiled pass hands on
        checks.integer(who, "seed", seed, 0)
    if transforms_active():
        raise RuntimeError(
            f"{who}: draws from seeds of its own and cannot run inside torch.func's transforms or forward-mode autograd"
        )
    size = chunk or k
    sizes = [size] * (k // size) + [k % size] * (k % size > 0)
    return Chunks(who, log_weight, parameters, sizes, chosen, _drawn_seed(generator) if seed is None else seed)


def _drawn_seed(generator: torch.Generator | None) -> int | Tensor:
    """A seed from a generator, which moves on; within a compiled pass a tensor. One on a GPU is not waited for: its
    state is known on the host."""
    if torch.compiler.is_compiling():
        return torch.randint(2**62, ())
    if generator is None or generator.device.type == "cpu":
        return int(torch.randint(2**62, (), generator=generator))
    state = hashlib.sha256(generator.get_state().numpy().tobytes()).digest()
    torch.rand((), generator=generator, device=generator.device)
    return int.from_bytes(state[:8], "little") >> 2
