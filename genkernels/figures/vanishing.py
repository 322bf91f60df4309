"""The gradient that a generator receives while its opponent grows stronger: saturating, non-saturating, Wasserstein."""

from __future__ import annotations

from typing import TYPE_CHECKING

from genkernels._words import UsageError
from genkernels.figures._critics import perceptron, wasserstein_loss
from genkernels.figures._seed import add_seed, checked_seed

if TYPE_CHECKING:
    from torch import Tensor

TITLE = "Vanishing gradients: what a generator receives from a discriminator trained for longer and longer"
DATA = "eight_gaussians"
STEPS, MOST = 1000, 100_000
MEASURES = 24  # evenly spread over the logarithm of the steps
BATCH, HELD, WIDTH, LEARNING_RATE = 128, 1024, 128, 1e-3
#: The generator's loss by its name: whom it is played against, and as which kind.
GAMES = {
    "saturating": ("discriminator", "saturating"),
    "non-saturating": ("discriminator", "logistic"),
    "Wasserstein": ("critic", "wasserstein"),
}
GRADIENT, GAP = "‖∂ loss / ∂ generator‖", "E D(x) − E D(G(z))"


def add_arguments(parser) -> None:
    parser.add_argument(
        "--steps", type=int, default=STEPS, metavar="N", help=f"of the opponents' training (default: {STEPS})"
    )
    add_seed(parser, "weights and points")


def draw(arguments):
    steps, seed = arguments.steps, checked_seed(arguments.seed)
    if not 1 <= steps <= MOST:
        raise UsageError(f"--steps must be from 1 to {MOST:,}, got {steps}")
    from genkernels import pictures
    from genkernels._seeds import fixed_seed

    with fixed_seed(seed):
        at, gradients, gaps = measured(steps, seed)
    return pictures.panels(
        {
            GRADIENT: {name: (at, values) for name, values in gradients.items()},
            GAP: {name: (at, values) for name, values in gaps.items()},
        },
        captions={
            GRADIENT: "saturating ln(1 − σ(D)), non-saturating −ln σ(D),\nWasserstein −D",
            GAP: "logits of the discriminator, scores of the critic",
        },
        x_label="steps of D's training",
        log="xy",
        title="The stronger the discriminator, the less a generator learns by ln(1 − D)",
        note=f"A generator that is untrained and held, against {DATA}. The first two losses have one discriminator, "
        "the third a critic with gradient penalty.",
    )


def measured(steps: int, seed: int) -> tuple[list[int], dict[str, list[float]], dict[str, list[float]]]:
    """The steps at which it was measured; there, by the loss's name, the norm of the generator's gradient; by the
    opponent's name, how far apart it holds real points and samples."""
    import torch

    from genkernels import data, losses

    x = data.load(DATA, seed=seed).train.tensors[0]
    generator, latents = perceptron(2, 2, WIDTH), _latents(HELD)
    opponents = {"discriminator": perceptron(2, 1, WIDTH), "critic": perceptron(2, 1, WIDTH)}
    objectives = {
        "discriminator": lambda d, real, fake: losses.critic_loss(d(real), d(fake)),
        "critic": wasserstein_loss,
    }
    optimisers = {
        name: torch.optim.Adam(opponent.parameters(), LEARNING_RATE, betas=(0.5, 0.9))
        for name, opponent in opponents.items()
    }
    at = sorted({round(steps ** (i / (MEASURES - 1))) for i in range(MEASURES)})
    gradients, gaps = {name: [] for name in GAMES}, {name: [] for name in opponents}
    for step in range(1, steps + 1):
        real = x[torch.randint(len(x), (BATCH,))]
        fake = generator(_latents(BATCH)).detach()
        for name, opponent in opponents.items():
            optimisers[name].zero_grad()
            objectives[name](opponent, real, fake).backward()
            optimisers[name].step()
        if step in at:
            for name, (opponent, kind) in GAMES.items():
                loss = losses.generator_loss(opponents[opponent](generator(latents)), kind)
                gradients[name].append(_norm(torch.autograd.grad(loss, list(generator.parameters()))))
            with torch.no_grad():
                for name, d in opponents.items():
                    gaps[name].append((d(x[:HELD]).mean() - d(generator(latents)).mean()).item())
    return at, gradients, gaps


def _latents(n: int) -> Tensor:
    """Uniform on [−1, 1]²: bounded, and so are the samples, which can be told from the data for certain."""
    import torch

    return 2 * torch.rand(n, 2) - 1


def _norm(gradients: tuple[Tensor, ...]) -> float:
    return sum(g.double().square().sum().item() for g in gradients) ** 0.5
