"""The importance-weighted bound F_k of held-out examples against k, of models that were trained with different k."""

from __future__ import annotations

from genkernels._words import UsageError, notice
from genkernels.figures._seed import add_seed, checked_seed
from genkernels.tables._training import train

TITLE = "The bound F_k against the number of draws k, of a VAE and of IWAEs, on held-out digits"
STEPS, MOST = 1500, 1_000_000
BATCH = 64
#: Draws in training, by the curve's name.
MODELS = {"VAE": 1, "IWAE, k = 5": 5, "IWAE, k = 50": 50}
DRAWS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
EXAMPLES = 360


def add_arguments(parser) -> None:
    parser.add_argument(
        "--steps", type=int, default=STEPS, metavar="N", help=f"of each model's training (default: {STEPS})"
    )
    add_seed(parser, "weights, order and noise")


def draw(arguments):
    steps, seed = arguments.steps, checked_seed(arguments.seed)
    if not 1 <= steps <= MOST:
        raise UsageError(f"--steps must be from 1 to {MOST:,}, got {steps}")
    from genkernels import data, pictures

    bundle = data.load("digits")
    curves = {}
    for name, k in MODELS.items():
        curves[name] = (DRAWS, measured(trained(k, bundle, steps, seed), bundle, seed))
        notice(
            f"{len(curves)} of {len(MODELS)}: {name}, F₁ = {curves[name][1][0]:.2f}, F₁₀₀₀ = {curves[name][1][-1]:.2f}"
        )
    return pictures.panels(
        {"F_k, nats": curves},
        x_label="k, draws from q(z|x)",
        log="x",
        title="More draws, a tighter bound",
        note=f"{bundle.name}, 8×8, 17 grey levels: mean over {EXAMPLES} held-out examples, after {steps:,} steps of "
        f"{BATCH}, seed {seed}. All draws of one k are new ones.",
    )


def trained(k: int, bundle, steps: int, seed: int):
    """A VAE, or an IWAE of k draws, of one size and training."""
    from genkernels.models import IWAE, VAE
    from genkernels.training import TrainConfig

    kind, sizes = (VAE, {}) if k == 1 else (IWAE, {"importance": k})
    settings = kind.presets["digits"].training
    config = TrainConfig(max_steps=steps, seed=seed, batch_size=BATCH, eval_every=0, **settings)
    return train(lambda: kind.from_preset("digits", **sizes), bundle, config).model


def measured(model, bundle, seed: int) -> list[float]:
    """The mean of F_k over the held-out examples, at each k."""
    import torch

    from genkernels._seeds import derive_seed

    x, y = bundle.take("test", EXAMPLES)
    rng = torch.Generator().manual_seed(derive_seed(seed, "draws"))
    model.eval()
    found = []
    with torch.no_grad():
        for k in DRAWS:
            bounds = [
                model.log_bound(part, labels, importance=k, chunk=min(k, 50), generator=rng)
                for part, labels in zip(x.split(90), y.split(90), strict=True)
            ]
            found.append(float(torch.cat(bounds).double().mean()))
    return found
