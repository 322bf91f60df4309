"""The whole loss of a critic's step: of its scores, and of the slopes at real and generated samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from genkernels import ops
from genkernels.losses import _critics, _in_graph
from genkernels.losses._critics import Critic
from genkernels.losses.adversarial import CRITIC_LOSSES, critic_loss
from genkernels.networks._outside import outside
from genkernels.networks.gradient_penalty import NormPenalty, apart, as_one, explained, interleaved, penalised
from genkernels.ops import checks
from genkernels.ops._operator import of_others

WHO = "critic_step"
PARTS = ("loss", "critic", "r1", "r2", "real_score", "fake_score")


def critic_step(
    critic: Critic,
    real: Tensor,
    fake: Tensor,
    *,
    loss: str = "logistic",
    r1: float = 0.0,
    r2: float = 0.0,
    y: Tensor | None = None,
    terms: bool = False,
    explain: bool = False,
):
    r"""What a critic D minimises in one step: its loss and the squared slopes at real (R1) and generated samples (R2).

    .. math:: \ell(D(\mathrm{real}), D(\mathrm{fake})) + \frac{r_1}{2N} \sum_i \lVert\nabla_x D(\mathrm{real}_i)\rVert^2
        + \frac{r_2}{2N} \sum_i \lVert\nabla_x D(\mathrm{fake}_i)\rVert^2

    Equivalent to::

        r, f = critic(real.requires_grad_()), critic(fake.requires_grad_())
        (g,) = torch.autograd.grad(r.sum(), real, create_graph=True)
        (h,) = torch.autograd.grad(f.sum(), fake, create_graph=True)
        squares = [s.flatten(1).square().sum(1).mean() for s in (g, h)]
        gk.losses.critic_loss(r, f, loss) + r1 / 2 * squares[0] + r2 / 2 * squares[1]

    The penalties are taken where the loss evaluates the critic anyway. Where that consists of what
    `genkernels.networks.SUPPORTED` lists and is piecewise linear, both share the signal that goes backwards and one
    product for the gradient of each weight: four passes, where a step without any penalty takes three. Six, where an
    activation bends.

    A critic that is taken the short way reads its weights once for both batches, where two calls would read them twice:
    one power iteration a step, not two, of the spectral norm of ``torch.nn.utils``. So does, without a penalty, one of
    such steps whose batches are small and even: it is called once, with both.

    ``torch.compile`` holds all of it in one graph, but with `explain`, and but for penalties of critics that hold more
    than `genkernels.networks.SUPPORTED` lists: there its graph breaks.

    Args:
        critic: as for `gradient_penalty`; of a patch map both penalties take the mean.
        real, fake: ``[N, ...]`` of one shape. What a generator's graph is attached to counts as data: no gradient
            reaches the generator. A leaf that asks for a gradient gets one.
        loss: a kind of `critic_loss`. r1, r2: γ, 0 or more; without either it is the critic's ordinary loss.
        y: labels of real and fake alike, for a critic that is called ``critic(x, y)``.
        terms: returns a dict instead: ``loss``, to be minimised, and, without a graph, its parts ``critic``, ``r1`` and
            ``r2``, which add up to it, and the mean scores ``real_score`` and ``fake_score``.
        explain: returns that and a sentence: which way it was computed, and what forced it.

    Returns:
        a scalar to be called ``backward()`` on, fp32 (fp64 for fp64 samples). Its gradient cannot be differentiated
        again where it was found without double backward.

    Raises: as `gradient_penalty`.

    Source: Mescheder et al., "Which training methods for GANs do actually converge?", 2018 (R1, R2); Huang et al.,
    "The GAN is dead; long live the GAN! A modern GAN baseline", 2024.
    """
    _critics.check_weight(WHO, "r1", r1)
    _critics.check_weight(WHO, "r2", r2)
    arguments = (critic, real, fake, loss, r1, r2, y, terms, explain)
    if torch.compiler.is_compiling():
        in_graph = not explain and isinstance(critic, nn.Module)
        parts = _compiled(critic, real, fake, loss, r1, r2, y) if in_graph else None
        if parts is None:
            return outside(_critic_step, *arguments)
        return parts if terms else parts["loss"]
    with _critics.beyond_inference():
        return _critic_step(*arguments)


def _critic_step(critic, real, fake, loss, r1, r2, y, terms, explain):
    real, fake = _critics.checked_pair(WHO, real, fake, y)
    checks.option(WHO, "loss", loss, CRITIC_LOSSES)
    real, fake = (x if x.is_leaf else x.detach() for x in (real, fake))
    if r1 or r2:
        with _critics.bare(critic) as bare:
            parts, sentence = _penalised(bare, real, fake, loss, r1, r2, y)
    else:
        parts, sentence = _without_penalty(critic, real, fake, loss, y), "one backward: there is no penalty"
    result = parts if terms else parts["loss"]
    return (result, sentence) if explain else result


def _compiled(critic: nn.Module, real: Tensor, fake: Tensor, loss: str, r1: float, r2: float, y):
    """The parts as a compiled pass finds them, in its graph, or None where a penalty needs double backward."""
    real, fake = _critics.checked_pair(WHO, real, fake, y)
    checks.option(WHO, "loss", loss, CRITIC_LOSSES)
    real, fake = (x if x.is_leaf else x.detach() for x in (real, fake))
    if r1 or r2:
        key, tensors = _in_graph.held(critic, real, y)
        if not key:
            return None
        found = torch.ops.genkernels.critic_step(key, tensors, real, fake, y, loss, float(r1), float(r2))
        return dict(zip(PARTS, found, strict=True))
    bare = getattr(critic, "_orig_mod", critic)
    _critics.refuse_sigmoid(WHO, _critics.last_layer(bare))
    return _of_scores(_scores(critic, real, fake, y, _in_graph.together(bare, real, fake, y)), loss)


def _held(key, tensors, real, fake, y, loss, r1, r2):
    parts, _ = _in_graph.run(key, tensors, lambda critic: _penalised(critic, real, fake, loss, r1, r2, y))
    return [parts[name] for name in PARTS]


of_others(
    "critic_step(str critic, Tensor[] tensors, Tensor real, Tensor fake, Tensor? y, str loss, float r1, float r2) "
    "-> Tensor[]",
    _held,
)


def _penalised(critic, real, fake, loss, r1, r2, y) -> tuple[dict[str, Tensor], str]:
    """The parts, and how they were found."""
    network, reason = _critics.network_of(WHO, critic, real, y)
    if network is not None and not _critics.gives_one_score(network):
        network, reason = None, "the critic gives several scores a sample"
    if network is None:
        return _by_autograd(critic, real, fake, loss, r1, r2, y), f"double backward: {reason}"
    return _shared(critic, network, real, fake, loss, r1, r2), explained(network.steps, with_loss=True)


def _shared(critic, network, real: Tensor, fake: Tensor, loss: str, r1: float, r2: float) -> dict[str, Tensor]:
    """The step in the passes that loss and penalties share."""

    def objective(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
        return critic_loss(real_scores, fake_scores, loss)

    penalties = [NormPenalty(weight / (2 * len(real))) if weight else None for weight in (r1, r2)]
    arguments = (network.steps, [real, fake], penalties, objective, network.weights)
    found = _critics.within(critic, real, lambda: penalised(*arguments))
    of_real, of_fake = (found.loss.new_zeros(()) if p is None else p.sum() for p in found.penalties)
    return _parts(found.total, found.loss, of_real, of_fake, *found.scores)


def _by_autograd(critic, real, fake, loss: str, r1: float, r2: float, y) -> dict[str, Tensor]:
    """The step by calls of the critic, one a batch, and double backward where there is a penalty."""
    record = torch.is_grad_enabled()
    scores, penalties = [], []
    for x, weight in ((real, r1), (fake, r2)):
        with torch.set_grad_enabled(record or weight > 0):
            x = _critics.as_point(x) if weight else x
            scores.append(_critics.scores_of(WHO, critic, x, y))
            if weight:
                gradient = _critics.gradient_of(WHO, scores[-1], x, record)
                penalties.append(weight / 2 * ops.gradient_penalty(gradient, 0.0).mean())
            else:
                penalties.append(scores[-1].new_zeros(()))
    value = critic_loss(*(s.flatten() for s in scores), loss)
    total = value + penalties[0] + penalties[1]
    return _parts(total if record else total.detach(), value, *penalties, *scores)


def _without_penalty(critic, real: Tensor, fake: Tensor, loss: str, y) -> dict[str, Tensor]:
    """The step by calls of the critic, compiled or not: one a batch, or one of both where they are small."""
    with _critics.bare(critic) as bare:
        network, _ = _critics.network_of(WHO, bare, real, y, penalised=False)
    small = network is not None and as_one(network.steps, [real, fake]) and (y is None or isinstance(y, Tensor))
    # torch adds up rows in four sums, and what is left of the rows to one of them: of odd batches nothing cancels
    together = small and len(real) % 2 == 0
    return _of_scores(_scores(critic, real, fake, y, together), loss)


def _scores(critic, real: Tensor, fake: Tensor, y, together: bool) -> Sequence[Tensor]:
    """Those of both batches, by one call for each or for both."""
    if not together:
        return [_critics.scores_of(WHO, critic, x, y) for x in (real, fake)]
    both = interleaved([real, fake])
    return apart(_critics.scores_of(WHO, critic, both, y if y is None else y.repeat_interleave(2, 0)), 2)


def _of_scores(scores: Sequence[Tensor], loss: str) -> dict[str, Tensor]:
    value = critic_loss(*(s.flatten() for s in scores), loss)
    nothing = value.new_zeros(())
    return _parts(value, value, nothing, nothing, *scores)


def _parts(total: Tensor, value: Tensor, of_real: Tensor, of_fake: Tensor, real_scores: Tensor, fake_scores: Tensor):
    beside = (value, of_real, of_fake, real_scores.mean(), fake_scores.mean())
    return dict(zip(PARTS, (total, *(t.detach() for t in beside)), strict=True))
