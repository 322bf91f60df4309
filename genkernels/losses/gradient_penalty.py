"""The gradient penalty of a critic at points between real and generated samples, as a loss."""

from __future__ import annotations

import torch
from torch import Tensor

from genkernels import ops
from genkernels.losses import _critics, _in_graph
from genkernels.losses._critics import Critic
from genkernels.networks._outside import outside
from genkernels.networks.gradient_penalty import NormPenalty, explained, penalised
from genkernels.ops import checks
from genkernels.ops._operator import of_others

WHO = "gradient_penalty"


def gradient_penalty(
    critic: Critic,
    real: Tensor,
    fake: Tensor,
    *,
    target: float = 1.0,
    one_sided: bool = False,
    every: int = 1,
    step: int = 0,
    generator: torch.Generator | None = None,
    y: Tensor | None = None,
    explain: bool = False,
):
    r"""How far the slope of a critic D is from `target` between real and generated samples (WGAN-GP).

    .. math:: \frac1N \sum_i \bigl(\lVert \nabla_x D(\hat x_i)\rVert - t\bigr)^2,\qquad
        \hat x_i = \mathrm{fake}_i + u_i (\mathrm{real}_i - \mathrm{fake}_i),\quad u_i \sim U[0, 1)

    Equivalent to::

        u = torch.rand(N).view(N, 1, 1, 1)
        x = (fake + u * (real - fake)).requires_grad_()
        (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        (g.flatten(1).norm(dim=1) - target).square().mean()

    but for a gradient of zero, of which the norm has the gradient 0, not NaN. Where the critic consists of what
    `genkernels.networks.SUPPORTED` lists, the gradient by its parameters takes four passes through it, six where an
    activation bends; double backward takes seven and more. Other critics and any other function are differentiated
    twice. Labels take the short way where features are multiplied by an embedding of them, as in the projection
    discriminator, or one is added.

    Args:
        critic: gives ``[N]``, ``[N, 1]``, ``[N, 1, 1, 1]`` or a patch map ``[N, 1, h, w]``, whose mean counts as the
            sample's score. It is called once, or not at all. Among several processes it is the
            ``DistributedDataParallel`` itself, not its ``module``, whose gradients nobody averages.
        real, fake: ``[N, ...]`` of one shape. Gradients reach them where they ask for one.
        target: t, 0 or more. one_sided: only slopes above it count.
        every, step: the penalty is taken where ``step % every == 0``, `every` times as large, and is 0 elsewhere.
        generator: of u; torch's own by default. y: labels, for a critic that is called ``critic(x, y)``.
        explain: returns the penalty and a sentence: which way it was computed, and what forced it.

    Returns:
        a scalar, without the weight that it usually gets (10), fp32 (fp64 for fp64 samples). Its gradient cannot be
        differentiated again where it was found without double backward.

    Raises:
        ValueError: real and fake are of different shapes or empty, the critic gives something else than scores or ends
            in a sigmoid, an option is wrong. TypeError: a dtype is. RuntimeError: inside transforms of ``torch.func``.

    A critic that couples the samples of a batch (BatchNorm in training) is warned of. With
    ``use_backend("reference")`` every critic is differentiated twice. ``torch.compile`` holds all of it in one graph
    where the critic consists of what `genkernels.networks.SUPPORTED` lists, without `generator` and `explain`;
    elsewhere its graph breaks here.

    Source: Gulrajani et al., "Improved training of Wasserstein GANs", 2017; Petzka et al., "On the regularization of
    Wasserstein GANs", 2018 (one-sided); Karras et al., "Analyzing and improving the image quality of StyleGAN", 2020
    (lazy); Etmann, "A closer look at double backpropagation", 2019.
    """
    arguments = (critic, real, fake, target, one_sided, every, step, generator, y, explain)
    if torch.compiler.is_compiling():
        value = None if explain or generator is not None else _in_graph_at(*arguments[:7], y)
        return outside(_gradient_penalty, *arguments) if value is None else value
    with _critics.beyond_inference():
        return _gradient_penalty(*arguments)


def _in_graph_at(critic, real, fake, target, one_sided, every, step, y) -> Tensor | None:
    """The penalty as a compiled pass finds it, or None where it cannot."""
    real, fake = _check(real, fake, target, one_sided, every, step, None, y)
    key, tensors = _in_graph.held(critic, real, y)
    if not key:
        return None
    if step % every:
        asking = [t.flatten()[:0].sum() for t in tensors if t.requires_grad]  # as a leaf no pass can give one
        return sum(asking[:1], start=_skipped(real))
    x = _between(real, fake, None)
    return torch.ops.genkernels.gradient_penalty_at(key, tensors, x, y, float(target), one_sided, every)


def _check(real, fake, target, one_sided, every, step, generator, y) -> tuple[Tensor, Tensor]:
    real, fake = _critics.checked_pair(WHO, real, fake, y)
    _critics.check_weight(WHO, "target", target)
    checks.flag(WHO, "one_sided", one_sided)
    checks.integer(WHO, "every", every, 1)
    checks.integer(WHO, "step", step, 0)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"{WHO}: generator must be a torch.Generator, got {type(generator).__name__}")
    return real, fake


def _skipped(real: Tensor) -> Tensor:
    return real.new_zeros((), dtype=torch.promote_types(real.dtype, torch.float32))


def _between(real: Tensor, fake: Tensor, generator: torch.Generator | None) -> Tensor:
    """Random points between the pairs."""
    work = torch.promote_types(real.dtype, torch.float32)
    # a compiler of all shapes takes no None
    given = {"device": real.device} if generator is None else {"device": generator.device, "generator": generator}
    u = torch.rand(len(real), dtype=work, **given).to(real.device)
    return ops.interpolate_pairs(real, fake, u)


def _gradient_penalty(critic, real, fake, target, one_sided, every, step, generator, y, explain):
    real, fake = _check(real, fake, target, one_sided, every, step, generator, y)
    if step % every:
        # so that a step without it may call backward all the same
        skipped = _skipped(real).requires_grad_(torch.is_grad_enabled())
        return (skipped, f"none in step {step}: it is taken every {every} steps") if explain else skipped
    x = _between(real, fake, generator)
    with _critics.bare(critic) as bare:
        value, sentence = _at(bare, x, target, one_sided, every, y)
    return (value, sentence) if explain else value


def _held(key, tensors, x, y, target, one_sided, every):
    return _in_graph.run(key, tensors, lambda critic: _at(critic, x, target, one_sided, every, y)[0])


of_others(
    "gradient_penalty_at(str critic, Tensor[] tensors, Tensor x, Tensor? y, float target, bool one_sided, int every) "
    "-> Tensor",
    _held,
)


def _at(critic: Critic, x: Tensor, target: float, one_sided: bool, every: int, y: Tensor | None) -> tuple[Tensor, str]:
    """The penalty at x, and how it was found."""
    network, reason = _critics.network_of(WHO, critic, x, y)
    penalty = NormPenalty(every / len(x), target, one_sided)
    if network is None:
        return _by_autograd(critic, x, y, penalty), f"double backward: {reason}"
    steps, weights = network
    found = _critics.within(critic, x, lambda: penalised(steps, [x], [penalty], weights=weights))
    return found.total, explained(steps)


def _by_autograd(critic: Critic, x: Tensor, y: Tensor | None, penalty) -> Tensor:
    record = torch.is_grad_enabled()
    with torch.enable_grad():
        x = _critics.as_point(x)
        gradient = _critics.gradient_of(WHO, _critics.scores_of(WHO, critic, x, y), x, record)
    return penalty(gradient).sum()
