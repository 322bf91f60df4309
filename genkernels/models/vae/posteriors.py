r"""Approximate posteriors :math:`q(z|x)`, amortised: an encoder's features give the parameters of a distribution for
each example, and standard normal noise becomes latents whose density is known.

::

    parameters = posterior(h)                              # a tuple of tensors, one row an example
    z, log_ratio = posterior.draw(parameters, noise)       # [N, K, L], [N, K]: log p(z) - log q(z|x)

Latents ``[N, K, L]``: N examples, K draws of each, L latents. Nothing here knows of data or decoders.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from genkernels import losses, ops
from genkernels._words import nearest
from genkernels.backends import current_backend
from genkernels.nn import MADE, AutoregressiveTransform
from genkernels.nn._modes import call_frozen
from genkernels.reference._elementary_scores import planar_score, radial_score
from genkernels.reference.importance_bound import gaussian_reparameterize as plainly

Parameters = tuple[Tensor, ...]

#: Softplus of this is 1, at which both elementary flows are the identity.
NEUTRAL = math.log(math.e - 1)


#: Below so many numbers on a CPU a call of the operator takes what it saves, and a little more within a training step:
#: with one draw of 2 latents for 64 examples a step of the preset `points` took 1.76 ms by plain PyTorch, 1.96 by the
#: operator, on one core; of 16 latents, `digits`, 3.74 and 3.85.
FEW = 1 << 11


class GaussianPosterior(nn.Module):
    r"""Independent latents, :math:`z = \mu + e^{s} \epsilon`; and the base of posteriors that go on from there.

    Args:
        features: of h. latent: L.

    Attributes:
        has_kl: whether the divergence from the prior is known without drawing, `kl`.
    """

    kind: ClassVar[str] = "gaussian"

    def __init__(self, features: int, latent: int):
        super().__init__()
        self.latent = latent
        self.head = nn.Linear(features, 2 * latent)

    @property
    def has_kl(self) -> bool:
        return True

    def forward(self, h: Tensor) -> Parameters:
        """The parameters from features ``[N, features]``: mean and log-scale, ``[N, L]`` each, then those of more."""
        return tuple(self.head(h).chunk(2, 1))

    def draw(
        self, parameters: Parameters, noise: Tensor, stopped: bool = False, prior: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Latents, and how much less likely they are here than under the prior.

        Args:
            parameters: of N examples. noise: standard normal, ``[N, K, L]``.
            stopped: the densities' gradient is that through z alone, as if the parameters in them were constants.
            prior: that of N(0, 1) is in the ratio; False leaves −log q(z|x), for another prior than that.

        Returns:
            z ``[N, K, L]`` and ``log p(z) - log q(z|x)``, ``[N, K]`` in nats, fp32 or wider.
        """
        mean, log_scale = parameters
        if noise.device.type == "cpu" and noise.numel() < FEW and current_backend() == "auto":
            if torch.is_autocast_enabled("cpu"):
                dtype = torch.promote_types(torch.promote_types(noise.dtype, mean.dtype), log_scale.dtype)
                noise, mean, log_scale = noise.to(dtype), mean.to(dtype), log_scale.to(dtype)
            if noise.dtype == mean.dtype == log_scale.dtype:
                return plainly(noise, mean, log_scale, prior, stopped)
        return ops.gaussian_reparameterize(noise, mean, log_scale, prior=prior, stopped=stopped)

    def kl(self, parameters: Parameters) -> Tensor:
        """KL(q || N(0, 1)) of each latent, ``[N, L]`` in nats."""
        return losses.gaussian_kl(*parameters[:2], reduce=False)

    def ways(self, z: Tensor, log_ratio: Tensor) -> tuple[Tensor, ...]:
        """Through which of a stopped `draw`'s results a gradient reaches the parameters: none is made of another."""
        return z, log_ratio

    def mean(self, parameters: Parameters) -> Tensor:
        """The latents of no noise, ``[N, L]``: of a Gaussian its mean."""
        mean = parameters[0]
        return self.draw(parameters, torch.zeros_like(mean).unsqueeze(1))[0].squeeze(1)


class FlowPosterior(GaussianPosterior):
    """A Gaussian whose draws go through `flows` invertible maps; 0 of them leave the Gaussian as it is."""

    def __init__(self, features: int, latent: int, flows: int):
        super().__init__(features, latent)
        self.flows = flows

    @property
    def has_kl(self) -> bool:
        return not self.flows

    def draw(
        self, parameters: Parameters, noise: Tensor, stopped: bool = False, prior: bool = True
    ) -> tuple[Tensor, Tensor]:
        mean, log_scale, *rest = parameters
        if not self.flows:
            return super().draw((mean, log_scale), noise, stopped, prior)
        first, surprise = super().draw((mean, log_scale), noise, prior=False)  # -log q of the first latents
        z, log_det = self.flow(first, rest)
        surprise = surprise + log_det
        if stopped and z.requires_grad:
            surprise = self.stopped_surprise(z, surprise, first, parameters)
        return z, surprise + log_normal(z) if prior else surprise

    def ways(self, z: Tensor, log_ratio: Tensor) -> tuple[Tensor, ...]:
        return (z,) if self.flows else super().ways(z, log_ratio)

    def flow(self, z: Tensor, parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
        """``[N, K, L]`` to ``(z, log-determinant [N, K])``."""
        raise NotImplementedError

    def stopped_surprise(self, z: Tensor, surprise: Tensor, first: Tensor, parameters: Parameters) -> Tensor:
        """`surprise`, −log q(z|x) ``[N, K]`` of the z that the flow makes of `first`, with a gradient by z alone: its
        score, for which no z has to be turned back."""
        mean, log_scale, *rest = (p.detach() for p in parameters)
        score = (mean.unsqueeze(1) - first.detach()) * torch.exp(-2 * log_scale).unsqueeze(1)
        return _BySlope.apply(z, surprise.detach(), -self.score(score, first.detach(), rest))

    def score(self, score: Tensor, z: Tensor, parameters: list[Tensor]) -> Tensor:
        """∇ log q after the flow, fp32 or wider, of what has `score` before it, at z; without a graph."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"flows={self.flows}"


class PlanarPosterior(FlowPosterior):
    r"""Planar flows, :math:`z + \hat u \tanh(w^\top z + b)`, each with w, u, b of the example; near the identity
    at the start.

    Source: Rezende and Mohamed, "Variational inference with normalizing flows", 2015.
    """

    kind = "planar"

    def __init__(self, features: int, latent: int, flows: int, width: int):
        super().__init__(features, latent, flows)
        self.shapes = [(flows, latent), (flows, latent), (flows,)]
        self.more = None
        if flows:
            w = F.normalize(torch.randn(flows, latent), dim=1)
            self.more = small_head(features, [w, NEUTRAL * w, torch.zeros(flows)])

    def forward(self, h: Tensor) -> Parameters:
        return super().forward(h) + split_rows(self.more, h, self.shapes)

    def flow(self, z: Tensor, parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
        return ops.planar_flow(z, *parameters)

    def score(self, score: Tensor, z: Tensor, parameters: list[Tensor]) -> Tensor:
        return planar_score(score, z, *parameters)


class RadialPosterior(FlowPosterior):
    r"""Radial flows, :math:`z + \beta (z - c) / (\alpha + |z - c|)`, each with c, α, β of the example; near the
    identity at the start.

    Source: Rezende and Mohamed, "Variational inference with normalizing flows", 2015.
    """

    kind = "radial"

    def __init__(self, features: int, latent: int, flows: int, width: int):
        super().__init__(features, latent, flows)
        self.shapes = [(flows, latent), (flows,), (flows,)]
        self.more = None
        if flows:
            self.more = small_head(features, [torch.randn(flows, latent), *[torch.full((flows,), NEUTRAL)] * 2])

    def forward(self, h: Tensor) -> Parameters:
        return super().forward(h) + split_rows(self.more, h, self.shapes)

    def flow(self, z: Tensor, parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
        return ops.radial_flow(z, *parameters)

    def score(self, score: Tensor, z: Tensor, parameters: list[Tensor]) -> Tensor:
        return radial_score(score, z, *parameters)


class IAFPosterior(FlowPosterior):
    r"""Inverse autoregressive flows: :math:`z_i \sigma_i + t_i` with :math:`\sigma = \mathrm{sigmoid}(s + 2)`, s and t
    of latent i from a `MADE` of the latents before it and of the encoder's features; the order of the latents turns
    round between two of them. The determinant is that of a triangle.

    The 2 is the paper's forget-gate bias: a flow that has not been trained keeps most of what it is given. Where the
    paper adds :math:`(1 - \sigma) m`, t stands as it comes, which is the same family.

    Args:
        width: units of each of the two hidden layers of a MADE.

    Source: Kingma et al., "Improving variational inference with inverse autoregressive flow", 2016.
    """

    kind = "iaf"

    def __init__(self, features: int, latent: int, flows: int, width: int):
        super().__init__(features, latent, flows)
        made = [
            MADE(latent, width, order=("natural", "reversed")[i % 2], context_features=features) for i in range(flows)
        ]
        with torch.no_grad():
            for net in made:
                net.layers[-1].weight.mul_(0.1)  # begins as nearly one scale and one shift for all
        # what is one pass from noise to latents: the transform that MAF calls its forward
        self.transforms = nn.ModuleList(AutoregressiveTransform(net, scale_map="sigmoid") for net in made)

    def forward(self, h: Tensor) -> Parameters:
        return (*super().forward(h), h) if self.flows else super().forward(h)

    def flow(self, z: Tensor, parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
        count, draws, _ = z.shape
        (h,) = parameters
        h, z = h.repeat_interleave(draws, 0), z.flatten(0, 1)
        total = 0.0
        for transform in self.transforms:
            z, log_det = transform(z, h)
            total = total + log_det
        return z.unflatten(0, (count, draws)), total.view(count, draws)

    def stopped_surprise(self, z: Tensor, surprise: Tensor, first: Tensor, parameters: Parameters) -> Tensor:
        count, draws, _ = z.shape
        mean, log_scale, h = (p.detach() for p in parameters)
        h, z = h.repeat_interleave(draws, 0), z.flatten(0, 1)
        total = 0.0
        for transform in reversed(self.transforms):
            z, log_det = call_frozen(_Inverse(transform), z, h)
            total = total + log_det
        z, total = z.unflatten(0, (count, draws)), total.view(count, draws)
        noise = (z - mean.unsqueeze(1)) * torch.exp(-log_scale).unsqueeze(1)
        return log_scale.sum(1, keepdim=True) - log_normal(noise) - total


class _Inverse(nn.Module):
    """A transform's inverse as a call."""

    def __init__(self, transform: nn.Module):
        super().__init__()
        self.transform = transform

    def forward(self, z: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.transform.inverse(z, h)


POSTERIORS: dict[str, type[GaussianPosterior]] = {
    kind.kind: kind for kind in (GaussianPosterior, PlanarPosterior, RadialPosterior, IAFPosterior)
}


def posterior(model: str, name: str, features: int, latent: int, flows: int, width: int) -> GaussianPosterior:
    """The posterior of a name; `flows` and `width` are those of the posteriors that have any.

    Raises:
        ValueError: there is none of the name; names the nearest.
    """
    if name not in POSTERIORS:
        hint = nearest(name, POSTERIORS, listed=True)
        raise ValueError(f"{model}: posterior must be one of {', '.join(POSTERIORS)}, got {name!r}{hint}")
    kind = POSTERIORS[name]
    return kind(features, latent, flows, width) if issubclass(kind, FlowPosterior) else kind(features, latent)


class _BySlope(torch.autograd.Function):
    """Values ``[N, K]`` whose gradient by z ``[N, K, L]`` is given."""

    @staticmethod
    def forward(ctx, z, values, slope):
        ctx.save_for_backward(slope)
        ctx.dtype = z.dtype
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors
        return (grad.unsqueeze(2) * slope).to(ctx.dtype), None, None


def log_normal(z: Tensor) -> Tensor:
    """log N(z; 0, 1), summed over the last dimension, fp32 or wider."""
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return -0.5 * z.square().sum(-1) - 0.5 * math.log(2 * math.pi) * z.shape[-1]


def small_head(features: int, starts: list[Tensor]) -> nn.Linear:
    """A layer whose outputs are `starts`, one after the other, and differ little between examples before training."""
    start = torch.cat([start.flatten() for start in starts])
    head = nn.Linear(features, len(start))
    with torch.no_grad():
        head.weight.mul_(0.1)
        head.bias.copy_(start)
    return head


def split_rows(head: nn.Module | None, h: Tensor, shapes: list[tuple[int, ...]]) -> Parameters:
    """A layer's outputs ``[N, …]`` as tensors ``[N, *shape]``; none where there is no layer."""
    if head is None:
        return ()
    rows = head(h).split([math.prod(shape) for shape in shapes], 1)
    return tuple(row.unflatten(1, shape) for row, shape in zip(rows, shapes, strict=True))
