"""A posterior that no factored Gaussian is, and what each family of posteriors makes of it: the four of `VAE`, and the
Gaussian as IWAE trains and weighs it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from genkernels._words import UsageError
from genkernels.figures._seed import add_seed, checked_seed

if TYPE_CHECKING:
    from torch import Tensor

TITLE = "A curved posterior p(z|x), fitted by a Gaussian, by IWAE, by planar, radial and autoregressive flows"
STEPS, MOST = 2000, 100_000
DRAWS, IMPORTANCE, LEARNING_RATE = 256, 50, 1e-2
#: name: posterior, and how many flows it has.
FITTED = {
    "Gaussian": ("gaussian", 0),
    f"IWAE, k = {IMPORTANCE}": ("gaussian", 0),
    "planar": ("planar", 16),
    "radial": ("radial", 16),
    "IAF": ("iaf", 4),
}
NOISE = 0.3  # standard deviation of x, which is 0
REACH, CELLS = 4.0, 400  # the square [-REACH, REACH]² on which the true posterior is computed
SHOWN = 1500


class Fit(NamedTuple):
    """Draws ``[n, 2]`` of a fitted posterior, of IWAE's by their weights, and how far its bound is below ln p(x)."""

    draws: Tensor
    gap: float
    error: float


def add_arguments(parser) -> None:
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help=f"of each fit (default: {STEPS})")
    add_seed(parser, "weights and draws")


def draw(arguments):
    steps, seed = arguments.steps, checked_seed(arguments.seed)
    if not 1 <= steps <= MOST:
        raise UsageError(f"--steps must be from 1 to {MOST:,}, got {steps}")
    from genkernels._seeds import fixed_seed
    from genkernels.pictures.plots import figure_of, heading, pixels_of

    with fixed_seed(seed):
        fits = {name: fitted(name, steps) for name in FITTED}
    grid, density, _ = truth()
    note = f"p(x|z) = N(z₂ + 3/2 − z₁², {NOISE:g}²) at x = 0, p(z) = N(0, 1): lines of equal p(z|x), draws of q(z|x). "
    note += "IWAE's are chosen by their weights."
    width = 2.6 * len(fits)
    text = heading("A posterior that no factored Gaussian is", note, width)
    head, below = 0.25 * len(text) + 0.35, 0.55
    height = 2.5 + head + below
    figure = figure_of(width, height)
    largest = density.max().item()
    for i, (name, fit) in enumerate(fits.items()):
        axes = figure.add_subplot(1, len(fits), i + 1)
        z = fit.draws[:SHOWN]
        axes.scatter(z[:, 0], z[:, 1], s=2, color="#1667b7", alpha=0.35, linewidths=0)
        levels = [largest * math.exp(-0.5 * r * r) for r in (3, 2, 1)]
        axes.contour(grid, grid, density.T, levels=levels, colors="#404040", linewidths=0.9)
        axes.set(xlim=(-3, 3), ylim=(-2.6, 3.4), xticks=[], yticks=[], aspect="equal")
        axes.spines[:].set_color("#9aa4ad")
        axes.set_title(name, fontsize=11, weight="bold")
        axes.set_xlabel(f"{fit.gap:.3f} ± {fit.error:.3f} nats below ln p(x)", fontsize=9, color="#404040")
    figure.subplots_adjust(
        left=0.1 / width, right=1 - 0.1 / width, bottom=below / height, top=1 - head / height, wspace=0.06
    )
    for i, (part, size, weight, colour) in enumerate(text):
        figure.text(
            0.2 / width, 1 - (0.1 + 0.25 * i) / height, part, fontsize=size, weight=weight, color=colour, va="top"
        )
    return pixels_of(figure)


def log_likelihood(z: Tensor) -> Tensor:
    """ln p(x|z) at x = 0, ``[..., 2]`` to ``[...]``."""
    error = (z[..., 1] + 1.5 - z[..., 0].square()) / NOISE
    return -0.5 * error.square() - math.log(NOISE) - 0.5 * math.log(2 * math.pi)


def truth() -> tuple[Tensor, Tensor, float]:
    """A grid of each coordinate, the posterior's density on it ``[z₁, z₂]``, and ln p(x), by quadrature."""
    import torch

    grid = torch.linspace(-REACH, REACH, CELLS, dtype=torch.float64)
    z = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), -1)
    log_joint = log_likelihood(z) - 0.5 * z.square().sum(-1) - math.log(2 * math.pi)
    log_cell = 2 * math.log(2 * REACH / (CELLS - 1))
    log_evidence = log_joint.flatten().logsumexp(0).item() + log_cell
    return grid, (log_joint - log_evidence).exp(), log_evidence


def fitted(name: str, steps: int) -> Fit:
    """One of `FITTED` by `steps` of Adam, whose step size falls to 0; its gap by 20,000 draws or sets of them."""
    import torch

    from genkernels import losses
    from genkernels.models.vae.posteriors import posterior

    kind, flows = FITTED[name]
    k = IMPORTANCE if name.startswith("IWAE") else 1
    q, h = posterior("figure", kind, 1, 2, flows, 32), torch.ones(1, 1)
    optimizer = torch.optim.Adam(q.parameters(), LEARNING_RATE)

    def log_weight(parameters, size, generator, stopped):
        rows = len(parameters[0])
        z, ratio = q.draw(parameters, torch.randn(rows, size, 2, generator=generator), stopped)
        return log_likelihood(z) + ratio, q.ways(z, ratio)

    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - step / steps)
        if k == 1:
            # without the score term, whose noise outlasts a fit
            loss = -log_weight(q(h), DRAWS, None, True)[0].mean()
        else:
            parameters = q(h.expand(DRAWS // k, 1))
            loss = losses.importance_loss(parameters, log_weight, k=k, estimator="dreg").loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        sets = 20_000 // (10 if k > 1 else 1)
        z, ratio = q.draw(q(h.expand(sets, 1)), torch.randn(sets, k, 2))
        log_w = (log_likelihood(z) + ratio).double()
        bounds = log_w.logsumexp(1) - math.log(k)
        chosen = torch.multinomial(log_w.softmax(1), 1)
        draws = z.gather(1, chosen.unsqueeze(2).expand(-1, 1, 2)).squeeze(1)
    return Fit(draws, truth()[2] - bounds.mean().item(), bounds.std().item() / sets**0.5)
