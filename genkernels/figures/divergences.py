"""KL, Jensen-Shannon and Wasserstein distance of two parallel lines in the plane: what critics estimate, and what is
exact."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from genkernels._words import UsageError
from genkernels.figures._critics import perceptron, wasserstein_loss
from genkernels.figures._seed import add_seed, checked_seed

if TYPE_CHECKING:
    from torch import Tensor, nn

TITLE = "Two lines in the plane: KL, JS and Wasserstein distance, critics' estimates against the exact curves"
THETAS = (-1.0, -0.6, -0.3, -0.1, 0.0, 0.1, 0.3, 0.6, 1.0)
STEPS = (30, 100, 300)
MOST = 10_000
BATCH, GRID = 64, 256
WIDTH, LEARNING_RATE = 64, 2e-3


class Divergence(NamedTuple):
    """One distance of p₀ and pθ: what its critic minimises, and the lower bound that a critic gives."""

    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    bound: Callable[[nn.Module, Tensor, Tensor], Tensor]
    exact: Callable[[float], float]
    caption: str


def add_arguments(parser) -> None:
    parser.add_argument(
        "--steps",
        type=int,
        nargs="+",
        default=STEPS,
        metavar="N",
        help=f"of the critics' training, at which their estimates are drawn (default: {' '.join(map(str, STEPS))})",
    )
    add_seed(parser, "weights and points")


def draw(arguments):
    steps, seed = sorted(set(arguments.steps)), checked_seed(arguments.seed)
    if not 1 <= steps[0] or steps[-1] > MOST:
        raise UsageError(f"--steps must be from 1 to {MOST:,}, got {' '.join(map(str, arguments.steps))}")
    from genkernels import pictures
    from genkernels._seeds import derive_seed, fixed_seed

    series, captions = {}, {}
    for name, divergence in divergences().items():
        found = []
        for theta in THETAS:
            with fixed_seed(derive_seed(seed, name, str(theta))):
                found.append(estimates(divergence, theta, steps))
        by_step = {f"after {steps[i]:,} steps": (THETAS, [bounds[i] for bounds in found]) for i in range(len(steps))}
        # all of them are 0 at θ = 0 alone: a needle
        ends = (-1.0, -1e-9, 0.0, 1e-9, 1.0)
        series[name] = {"exact": (ends, [divergence.exact(theta) for theta in ends]), **by_step}
        captions[name] = divergence.caption
    return pictures.panels(
        series,
        captions=captions,
        x_label="θ",
        symlog=list(series)[:1],
        title="Two parallel lines: distances of p₀ and pθ, exact and as critics estimate them",
        note="p₀ is uniform on {0} × [0, 1], pθ on {θ} × [0, 1]. Each dot is a lower bound that a critic of its own "
        f"gives, two hidden layers of {WIDTH} units, after so many steps of training.",
    )


def divergences() -> dict[str, Divergence]:
    """By name, in the order of the panels."""
    from genkernels import losses

    def donsker_varadhan(critic, real, fake):
        scores = critic(fake).flatten()
        return critic(real).mean() - (scores.logsumexp(0) - math.log(len(scores)))

    def jensen_shannon(critic, real, fake):
        return math.log(2) - losses.critic_loss(critic(real), critic(fake)) / 2

    def kantorovich(critic, real, fake):
        # −D is as steep as D
        return (critic(real).mean() - critic(fake).mean()).abs() / steepest(critic, real, fake)

    return {
        "KL(p₀ ‖ pθ)": Divergence(
            lambda critic, real, fake: -donsker_varadhan(critic, real, fake),
            donsker_varadhan,
            lambda theta: math.inf if theta else 0.0,
            "exact: ∞ for θ ≠ 0; the bound of Donsker and Varadhan\nE₀ D − ln Eθ exp D grows without end",
        ),
        "JS(p₀, pθ)": Divergence(
            lambda critic, real, fake: losses.critic_loss(critic(real), critic(fake)),
            jensen_shannon,
            lambda theta: math.log(2) if theta else 0.0,
            "exact: ln 2 for θ ≠ 0, whatever the distance;\nln 2 − half the logistic loss",
        ),
        "W(p₀, pθ)": Divergence(
            wasserstein_loss,
            kantorovich,
            abs,
            "exact: |θ|; E₀ D − Eθ D over D's steepest slope,\ntrained with the gradient penalty",
        ),
    }


def estimates(divergence: Divergence, theta: float, steps: list[int]) -> list[float]:
    """What a fresh critic's lower bound is after each of so many steps, on evenly spread points of both lines."""
    import torch

    critic = perceptron(2, 1, WIDTH)
    optimiser = torch.optim.Adam(critic.parameters(), LEARNING_RATE, betas=(0.5, 0.9))
    even = (torch.arange(GRID) + 0.5) / GRID
    found = []
    for step in range(1, steps[-1] + 1):
        optimiser.zero_grad()
        divergence.loss(critic, line(0.0, torch.rand(BATCH)), line(theta, torch.rand(BATCH))).backward()
        optimiser.step()
        if step in steps:
            found.append(divergence.bound(critic, line(0.0, even), line(theta, even)).item())
    return found


def line(theta: float, height: Tensor) -> Tensor:
    """The points ``[N, 2]`` of the line at θ, at heights ``[N]``."""
    import torch

    return torch.stack([torch.full_like(height, theta), height], dim=1)


def steepest(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """The largest ‖∇D‖ on a grid between the lines: D over it is 1-Lipschitz there."""
    import torch

    share = torch.linspace(0, 1, 17, dtype=real.dtype)[:, None, None]
    between = torch.lerp(real, fake, share).flatten(0, 1).requires_grad_()
    slopes = torch.autograd.grad(critic(between).sum(), between)[0]
    return slopes.norm(dim=1).max()
