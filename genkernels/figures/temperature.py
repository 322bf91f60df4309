"""The same draws of a trained model at several temperatures, from cold to hot."""

from __future__ import annotations

import math

from genkernels._words import UsageError, notice

TITLE = "Samples of a run from cold to hot, the same noise in every row"
TEMPERATURES = (0.0, 0.3, 0.5, 0.7, 0.85, 1.0, 1.2)
MOST = 10_000  # samples a row


def add_arguments(parser) -> None:
    parser.add_argument("--run", required=True, metavar="RUN", help="the run's folder")
    parser.add_argument(
        "--temperatures",
        type=float,
        nargs="+",
        default=TEMPERATURES,
        metavar="T",
        help=f"from cold to hot (default: {' '.join(f'{t:g}' for t in TEMPERATURES)})",
    )
    parser.add_argument("--n", type=int, metavar="N", help="samples a row (default: 10 images or 2000 points)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default: 0)")
    parser.add_argument("--checkpoint", default="best", choices=("best", "last"), help="default: best")


def draw(arguments):
    if bad := [t for t in arguments.temperatures if not 0 <= t < math.inf]:
        raise UsageError(f"--temperatures must be 0 or positive, got {bad[0]}")
    if arguments.n is not None and not 1 <= arguments.n <= MOST:
        raise UsageError(f"--n must be from 1 to {MOST:,}, got {arguments.n}")
    import torch

    from genkernels import pictures
    from genkernels.training import load_model
    from genkernels.training.sampling import drawing

    model, config, state, notes = load_model(arguments.run, arguments.checkpoint)
    for note in notes:
        notice(note)
    image = len(model.shape) == 3
    n = arguments.n or (10 if image else 2000)
    draws = {}
    for t in arguments.temperatures:
        with drawing(model, arguments.seed) as (_, generator):  # the same noise, and the same classes, in every row
            draws[f"T = {t:g}"] = model.sample(n, temperature=t, generator=generator)
    title = f"{type(model).__name__} on {config['data'].get('spec')}, step {state['step']:,}: samples by temperature T"
    if not image:
        return pictures.scatter(draws, _real(config, n), title=title, note=_meaning(model))
    images = torch.cat(list(draws.values()))
    if images.shape[1] not in (1, 3):
        raise UsageError(f"temperature: images must have 1 or 3 channels, those of {arguments.run} have {model.shape}")
    return pictures.sheet(images, n, title=title, note=_meaning(model), rows=list(draws))


def _real(config: dict, n: int):
    from genkernels import data
    from genkernels.data.provenance import check_part

    bundle = data.load(config["data"]["spec"], root=config["data"].get("root"))
    check_part(config["data"], bundle, "test")
    return bundle.take("test", n)[0]


def _meaning(model) -> str:
    """What a temperature does to the model's distribution; where that is exact, and why it is not elsewhere."""
    from genkernels.models import FlowModel, PixelModel

    if isinstance(model, PixelModel):
        return "T divides the logits of each value given those before it: each conditional is tempered, not p(x)"
    if not isinstance(model, FlowModel):
        return "T multiplies the standard deviation of the latents"
    scales = "T multiplies the prior's standard deviation"
    if not _constant_determinant(model):
        return f"{scales}: a heuristic, because the determinant depends on x"
    if model.prior.kind != "normal":
        return f"{scales}; the determinant is constant, the prior {model.prior.kind}: its tails widen with T"
    return f"{scales}; exact, p(x)^(1/T²) up to a constant, because the determinant is constant and the prior normal"


def _constant_determinant(model) -> bool:
    """Whether the flow changes volumes alike everywhere, as additive couplings do: asked of the map itself."""
    import torch

    generator = torch.Generator().manual_seed(0)
    latents = tuple(torch.randn(64, *shape, generator=generator) for shape in model.latent_shapes)
    with torch.no_grad():
        y = torch.zeros(64, dtype=torch.int64) if model.num_classes else None
        _, ldj = model.inverse(latents, y)
    return bool(ldj.max() - ldj.min() <= 1e-5 * ldj.abs().max().clamp(min=1.0))
