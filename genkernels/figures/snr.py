"""Signal to noise of an importance-weighted bound's gradients against the number of draws: IWAE and DReG."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from genkernels._words import UsageError
from genkernels.figures._seed import add_seed, checked_seed

if TYPE_CHECKING:
    from torch import Tensor

TITLE = "Signal to noise of the gradients against k: IWAE's encoder learns less from more draws, DReG's more"
DRAWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
ROWS, FEWEST, MOST = 4000, 100, 100_000
OFFSET = 0.3  # of mean and log-scale from the exact posterior's
ENCODER, DECODER = "gradient of the encoder", "gradient of the decoder"
#: Panel, name of the line, the curve at whose end it begins, power of k.
GUIDES = ((ENCODER, "∝ k^½", "DReG", 0.5), (ENCODER, "∝ k^(−½)", "IWAE", -0.5), (DECODER, "∝ k^½", "IWAE", 0.5))


def add_arguments(parser) -> None:
    parser.add_argument(
        "--rows",
        type=int,
        default=ROWS,
        metavar="N",
        help=f"gradients by which mean and deviation are estimated at each k (default: {ROWS})",
    )
    add_seed(parser, "data and draws")


def draw(arguments):
    rows, seed = arguments.rows, checked_seed(arguments.seed)
    if not FEWEST <= rows <= MOST:
        raise UsageError(f"--rows must be from {FEWEST} to {MOST:,}, got {rows}")
    from genkernels import pictures

    series = measured(rows, seed)
    for panel, name, beside, power in GUIDES:
        last = series[panel][beside][1][-1]
        series[panel][name] = (DRAWS, [last * (k / DRAWS[-1]) ** power for k in DRAWS])
    return pictures.panels(
        series,
        captions={ENCODER: "mean and log-scale of q(z|x)", DECODER: "the loadings of p(x|z); DReG's is the same"},
        x_label="k, draws",
        log="xy",
        title="More draws drown the gradient of IWAE's encoder in noise, not that of DReG's",
        note=f"A linear-Gaussian model of two values and one latent, one x; q is {OFFSET:g} off the exact posterior. "
        f"Mean over standard deviation of {rows:,} gradients; the encoder's mean is by DReG, IWAE's being the same.",
    )


def measured(rows: int, seed: int) -> dict[str, dict[str, tuple]]:
    """By the panel, the ratio at each k by the estimator's name."""
    import torch

    from genkernels.losses import importance_loss

    rng = torch.Generator().manual_seed(seed)
    loadings, x = (torch.randn(2, generator=rng, dtype=torch.float64) for _ in range(2))
    precision = 1 + loadings.square().sum()
    mean = ((loadings @ x) / precision + OFFSET).expand(rows, 1)
    log_scale = (-0.5 * precision.log() + OFFSET).expand(rows, 1)

    def gradients(k: int, estimator: str) -> tuple[Tensor, Tensor]:
        """By mean and log-scale, and by the loadings, of each repetition: ``[rows, 2]`` both."""
        of_q = [t.clone().requires_grad_() for t in (mean, log_scale)]
        of_p = loadings.expand(rows, 2).clone().requires_grad_()

        def log_weight(parameters, size, generator, stopped):
            return weighed(parameters, of_p, x, size, generator, stopped)

        bound = importance_loss(of_q, log_weight, k=k, estimator=estimator, generator=rng).bound
        *by_q, by_p = torch.autograd.grad(bound.sum(), [*of_q, of_p])
        return torch.cat(by_q, 1), by_p

    encoder: dict[str, list[float]] = {"IWAE": [], "DReG": []}
    decoder: list[float] = []
    for k in DRAWS:
        (iwae, by_p), (dreg, _) = gradients(k, "iwae"), gradients(k, "dreg")
        signal = dreg.mean(0).abs()
        for name, found in (("IWAE", iwae), ("DReG", dreg)):
            encoder[name].append(_typical(signal / found.std(0)))
        decoder.append(_typical(by_p.mean(0).abs() / by_p.std(0)))
    return {ENCODER: {name: (DRAWS, ratios) for name, ratios in encoder.items()}, DECODER: {"IWAE": (DRAWS, decoder)}}


def weighed(parameters, loadings: Tensor, x: Tensor, size: int, generator, stopped: bool) -> tuple[Tensor, tuple]:
    """log p(x, z) − log q(z|x) of `size` draws a row, and what carries the gradient by q's parameters."""
    import torch

    from genkernels import ops

    mean, log_scale = parameters
    noise = torch.randn(len(mean), size, 1, generator=generator, dtype=mean.dtype)
    z, log_ratio = ops.gaussian_reparameterize(noise, mean, log_scale, stopped=stopped)
    gap = x - z * loadings.unsqueeze(1)
    return -0.5 * gap.square().sum(2) - math.log(2 * math.pi) + log_ratio, (z, log_ratio)


def _typical(ratios: Tensor) -> float:
    return float(ratios.log().mean().exp())
