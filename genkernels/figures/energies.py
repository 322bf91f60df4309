"""The four energies of Rezende & Mohamed (2015), table 1, and what planar and radial flows make of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from genkernels._words import UsageError
from genkernels.figures._seed import add_seed, checked_seed

if TYPE_CHECKING:
    from torch import Tensor

TITLE = "Four energies U(z) of the plane, fitted by planar and radial flows"
LAYERS, STEPS = (2, 8, 32), 2000
MOST_LAYERS, MOST_STEPS = 256, 100_000
BATCH = 256
LEARNING_RATES = {"planar": 1e-2, "radial": 2e-2}
#: Of a panel: its edge, squares on a side, and the samples that are counted in them.
EDGE, SQUARES, SAMPLES = 4.0, 80, 200_000


def add_arguments(parser) -> None:
    parser.add_argument(
        "--layers",
        type=int,
        nargs="+",
        default=LAYERS,
        metavar="K",
        help=f"of the flows (default: {' '.join(map(str, LAYERS))})",
    )
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help=f"of each fit (default: {STEPS:,})")
    add_seed(parser, "parameters and samples")


def draw(arguments):
    layers, steps, seed = sorted(set(arguments.layers)), arguments.steps, checked_seed(arguments.seed)
    if not 0 <= layers[0] or layers[-1] > MOST_LAYERS:
        raise UsageError(f"--layers must be from 0 to {MOST_LAYERS}, got {' '.join(map(str, arguments.layers))}")
    if not 1 <= steps <= MOST_STEPS:
        raise UsageError(f"--steps must be from 1 to {MOST_STEPS:,}, got {steps}")
    import torch

    from genkernels import pictures
    from genkernels._seeds import derive_seed, fixed_seed

    log_z = log_constants()
    names = [f"U{i}" for i in "₁₂₃₄"]
    truth = torch.exp(-energies(_centres()) - log_z[:, None, None])
    rows = {name: {"exp(−U)/Z": truth[i]} for i, name in enumerate(names)}
    captions = {}
    for kind in LEARNING_RATES:
        for k in layers:
            with fixed_seed(derive_seed(seed, kind, str(k))):
                flow = fit(kind, k, steps)
                with torch.no_grad():
                    z, log_q = flow.sample(SAMPLES)
            # the same points serve the picture and the divergence
            divergence = (log_q + energies(z)).double().mean(1) + log_z
            for i, name in enumerate(names):
                column = f"{kind}, K = {k}"
                rows[name][column] = _counted(z[i])
                captions[name, column] = f"KL {divergence[i]:.3f}".replace("-", "−")
    return pictures.densities(
        rows,
        captions=captions,
        title="Four energies of the plane, exp(−U) and planar and radial flows of K layers fitted to it",
        note=f"Each flow starts from a normal distribution with its own means and deviations and minimises E[ln q + U] "
        f"in {steps:,} steps of {BATCH} samples, U tempered in the first half. Left: the density itself; others: "
        f"{SAMPLES:,} samples, counted. KL(q ‖ p) in nats, of the same samples. |z| ≤ {EDGE:g} on both axes; U₂ to U₄, "
        "which hold z₁ nowhere, have a wall at |z₁| = 4.",
    )


def energies(z: Tensor) -> Tensor:
    """U₁ to U₄, ``[4, ...]``: of each at its own points ``[4, ..., 2]``."""
    import torch

    def well(distance: Tensor, width: float) -> Tensor:
        return -0.5 * (distance / width) ** 2

    first, second = z.unbind(-1)
    wave = torch.sin(math.pi / 2 * first)
    bump = 3 * torch.exp(well(first[2] - 1, 0.6))
    step = 3 * torch.sigmoid((first[3] - 1) / 0.3)
    wall = 0.5 * ((first.abs() - EDGE).clamp(min=0) / 0.4) ** 2
    off = second - wave
    radius = torch.linalg.vector_norm(z[0], dim=-1)
    found = [
        -well(radius - 2, 0.4) - torch.logaddexp(well(first[0] - 2, 0.6), well(first[0] + 2, 0.6)),
        wall[1] - well(off[1], 0.4),
        wall[2] - torch.logaddexp(well(off[2], 0.35), well(off[2] + bump, 0.35)),
        wall[3] - torch.logaddexp(well(off[3], 0.4), well(off[3] + step, 0.35)),
    ]
    return torch.stack(found)


def log_constants(edge: float = 8.0, spacing: float = 0.05) -> Tensor:
    """ln Z of each, ``[4]``, by a sum over a grid."""
    import torch

    line = torch.arange(-edge, edge + spacing / 2, spacing, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
    return torch.logsumexp(-energies(grid.expand(4, *grid.shape)).flatten(1), 1) + 2 * math.log(spacing)


class Flow(NamedTuple):
    """Four flows, one an energy: each example of the operator is one of them, with parameters of its own."""

    kind: str
    mean: Tensor  #: ``[4, 1, 2]``, of the distribution that it starts from
    log_scale: Tensor  #: ``[4, 1, 2]``
    parameters: list[Tensor]  #: ``[4, K, ...]``

    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        """z ``[4, n, 2]`` and ln q(z) ``[4, n]``."""
        import torch

        from genkernels import ops

        noise = torch.randn(4, n, 2)
        operator = {"planar": ops.planar_flow, "radial": ops.radial_flow}[self.kind]
        z, ldj = operator(self.mean + self.log_scale.exp() * noise, *self.parameters)
        return z, -0.5 * noise.square().sum(-1) - math.log(2 * math.pi) - self.log_scale.sum(-1) - ldj


def fit(kind: str, layers: int, steps: int) -> Flow:
    """Four flows that have minimised E_q[ln q + U], drawn from torch's generator."""
    import torch

    from genkernels import nn as gnn

    def stacked(name: str) -> Tensor:
        return torch.stack([getattr(layer, name).detach() for layer in fresh])

    fresh = [{"planar": gnn.PlanarFlow, "radial": gnn.RadialFlow}[kind](2, layers) for _ in range(4)]
    parameters = [stacked(name) for name, _ in fresh[0].named_parameters()]
    if kind == "planar":  # so that its layers bend the plane in different places
        parameters[2] = torch.randn_like(parameters[2])
    flow = Flow(kind, torch.zeros(4, 1, 2), torch.zeros(4, 1, 2), parameters)
    learned = [t.requires_grad_() for t in (flow.mean, flow.log_scale, *parameters)]
    optimiser = torch.optim.Adam(learned, LEARNING_RATES[kind], fused=True)
    slower = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, 2 * (1 - step / steps)))
    for step in range(steps):
        z, log_q = flow.sample(BATCH)
        tempered = min(1.0, 0.01 + 2 * step / steps)  # else a flow settles on the part of U that it meets first
        loss = (log_q + tempered * energies(z)).mean(1).sum()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 10.0)
        optimiser.step()
        slower.step()
    return flow


def _centres() -> Tensor:
    """The middles of a panel's squares, for each energy, ``[4, SQUARES, SQUARES, 2]``."""
    import torch

    line = (torch.arange(SQUARES) + 0.5) * (2 * EDGE / SQUARES) - EDGE
    return torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).expand(4, -1, -1, -1)


def _counted(z: Tensor) -> Tensor:
    """The density of points ``[n, 2]`` in a panel's squares; those outside count, too."""
    import torch

    place = ((z + EDGE) * (SQUARES / (2 * EDGE))).floor()
    inside = ((place >= 0) & (place < SQUARES)).all(1)
    column, row = place[inside].long().unbind(1)
    counts = torch.bincount(row * SQUARES + column, minlength=SQUARES**2).view(SQUARES, SQUARES)
    return counts / (len(z) * (2 * EDGE / SQUARES) ** 2)
