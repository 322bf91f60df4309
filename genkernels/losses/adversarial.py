"""Losses of critics and generators, of the scores that a critic gave: means over the batch, in forms that neither
overflow nor lose their gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from genkernels.ops import checks

#: What a critic may minimise.
CRITIC_LOSSES = ("logistic", "hinge", "wasserstein", "relativistic", "least_squares")
#: What a generator may minimise.
GENERATOR_LOSSES = (*CRITIC_LOSSES, "saturating")
SHAPES = "[N], [N, 1], [N, 1, 1, 1] or a patch map [N, 1, h, w]"


def critic_loss(real_scores: Tensor, fake_scores: Tensor, kind: str = "logistic") -> Tensor:
    r"""What a critic minimises, of its scores r of real and f of generated samples.

    Equivalent to::

        {
            "logistic": F.softplus(-r).mean() + F.softplus(f).mean(),
            "hinge": F.relu(1 - r).mean() + F.relu(1 + f).mean(),
            "wasserstein": f.mean() - r.mean(),
            "relativistic": F.softplus(f - r).mean(),  # pairs: as many of either
            "least_squares": 0.5 * (r - 1).square().mean() + 0.5 * f.square().mean(),
        }[kind]

    Args:
        real_scores, fake_scores: logits (no sigmoid has been taken): ``[N]``, ``[N, 1]`` and ``[N, 1, 1, 1]`` mean the
            same; of a patch map ``[N, 1, h, w]`` each patch counts as a sample, as in pix2pix and CycleGAN.
        kind: ``logistic`` (Goodfellow 2014), ``hinge`` (Miyato 2018), ``wasserstein`` (Arjovsky 2017), ``relativistic``
            (pairs, Jolicoeur-Martineau 2018; Huang 2024), ``least_squares`` (Mao 2017, targets 1 and 0).

    Returns:
        a scalar, fp32 (fp64 for fp64 scores).

    Raises:
        ValueError: scores are of another shape, there are none, or, of ``relativistic``, not as many of either; the
            kind is unknown. TypeError: scores are no floating-point tensors.

    Source: Goodfellow et al., "Generative adversarial nets", 2014, and the papers named above.
    """
    who = "critic_loss"
    checks.option(who, "kind", kind, CRITIC_LOSSES)
    r, f = as_scores(who, "real_scores", real_scores), as_scores(who, "fake_scores", fake_scores)
    if kind == "logistic":
        return -(F.logsigmoid(r).mean() + F.logsigmoid(-f).mean())
    if kind == "hinge":
        return F.relu(1 - r).mean() + F.relu(1 + f).mean()
    if kind == "wasserstein":
        return f.mean() - r.mean()
    if kind == "least_squares":
        return 0.5 * (r - 1).square().mean() + 0.5 * f.square().mean()
    _check_pairs(who, real_scores, fake_scores)
    return -F.logsigmoid(r - f).mean()


def generator_loss(fake_scores: Tensor, kind: str = "logistic", real_scores: Tensor | None = None) -> Tensor:
    r"""What a generator minimises, of the critic's scores f of its samples.

    Equivalent to::

        {
            "logistic": F.softplus(-f).mean(),  # non-saturating: -log sigmoid(f)
            "saturating": -F.softplus(f).mean(),  # log(1 - sigmoid(f))
            "hinge": -f.mean(),
            "wasserstein": -f.mean(),
            "relativistic": F.softplus(r - f).mean(),  # pairs: as many of either
            "least_squares": 0.5 * (f - 1).square().mean(),
        }[kind]

    Args:
        fake_scores: as for `critic_loss`. kind: as there, or ``saturating``, whose gradient vanishes where the critic
            is sure.
        real_scores: r, of ``relativistic`` alone.

    Returns:
        a scalar, fp32 (fp64 for fp64 scores).

    Raises:
        ValueError: as `critic_loss`; real scores are missing. TypeError: scores are no floating-point tensors.

    Source: Goodfellow et al., "Generative adversarial nets", 2014, and the papers that `critic_loss` names.
    """
    who = "generator_loss"
    checks.option(who, "kind", kind, GENERATOR_LOSSES)
    f = as_scores(who, "fake_scores", fake_scores)
    if kind == "logistic":
        return -F.logsigmoid(f).mean()
    if kind == "saturating":
        return F.logsigmoid(-f).mean()
    if kind == "least_squares":
        return 0.5 * (f - 1).square().mean()
    if kind != "relativistic":
        return -f.mean()
    if real_scores is None:
        raise ValueError(f"{who}: real_scores must be given for kind 'relativistic', got None")
    r = as_scores(who, "real_scores", real_scores)
    _check_pairs(who, real_scores, fake_scores)
    return -F.logsigmoid(f - r).mean()


def as_scores(who: str, label: str, scores: Tensor) -> Tensor:
    """Scores as ``[N, patches]``, in fp32 at least."""
    checks.tensor(who, label, scores)
    check_score_shape(who, label, scores.shape)
    return scores.reshape(len(scores), -1).to(torch.promote_types(scores.dtype, torch.float32))


def check_score_shape(who: str, label: str, shape) -> None:
    """That `shape` is that of scores, one a sample or a map of them, of one sample or more."""
    shape = list(shape)
    if len(shape) not in (1, 2, 4) or shape[1:2] not in ([], [1]):
        raise ValueError(f"{who}: {label} must be {SHAPES}, got {shape}")
    if 0 in shape:
        raise ValueError(f"{who}: {label} must hold one score or more, got {shape}")


def _check_pairs(who: str, real_scores: Tensor, fake_scores: Tensor) -> None:
    if real_scores.numel() != fake_scores.numel() or len(real_scores) != len(fake_scores):
        raise ValueError(
            f"{who}: relativistic scores come in pairs, as many real as fake, got {list(real_scores.shape)} and "
            f"{list(fake_scores.shape)}"
        )
