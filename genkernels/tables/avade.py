"""What likelihood, critic and flow each bring to a variational autoencoder (Lucas et al. 2019), on the digits in place
of CIFAR-10."""

from __future__ import annotations

import time

from genkernels._words import notice
from genkernels.tables import Table
from genkernels.tables._training import check_arguments, train, training_arguments

TITLE = "Bits/dim and Fréchet distance of AV-ADE without some of its parts, on the digits, beside the paper's"
STEPS, BATCH, SAMPLES = 3000, 64, 2000
ORDER = ("gan", "vae", "v-ade", "av-gde", "av-ade")
PAPER_DATA = "CIFAR-10"
#: Lucas et al. 2019, table 1: bits/dim (of the GAN by an encoder trained afterwards), inception score, FID.
PAPER = {
    "gan": (7.0, 6.8, 31.4),
    "vae": (4.4, 2.0, 171.0),
    "v-ade": (3.5, 3.0, 112.0),
    "av-gde": (4.4, 5.1, 58.6),
    "av-ade": (3.9, 7.1, 28.0),
}


def add_arguments(parser) -> None:
    training_arguments(parser, STEPS)


def make(arguments) -> Table:
    check_arguments(arguments)
    from genkernels import data
    from genkernels._machine import cpu_threads
    from genkernels.models import AVADE
    from genkernels.training import TrainConfig

    bundle = data.load("digits")
    settings = AVADE.presets["digits"].training
    config = TrainConfig(
        max_steps=arguments.steps,
        seed=arguments.seed,
        batch_size=BATCH,
        ema=min(0.999, 1 - 10 / max(arguments.steps, 11)),
        eval_every=0,
        **settings,
    )
    rows = []
    with cpu_threads(arguments.threads):
        for variant in ORDER:
            rows.append(_row(variant, bundle, config))
            notice(f"{len(rows)} of {len(ORDER)}: {_told(rows[-1])}")
    return Table(rows, _picture(rows, bundle, config))


def _row(variant: str, bundle, config) -> dict:
    """One model, trained and judged by the held-out digits."""
    import torch

    from genkernels import metrics
    from genkernels.models import AVADE
    from genkernels.models.vae.avade import VARIANTS

    began = time.monotonic()
    result = train(lambda: AVADE.from_preset("digits", variant=variant), bundle, config)
    held, model = result.held_out, result.model
    likelihood, critic, flow = VARIANTS[variant]
    real = model.exact(bundle.take("test", len(bundle.test))[0])
    fake = model.sample(SAMPLES, generator=torch.Generator().manual_seed(config.seed))
    measured = {"bits_per_dim": None, "bits_per_dim_standard_error": None}
    if likelihood:
        bits = held["bits_per_dim"]
        measured = {"bits_per_dim": bits.value, "bits_per_dim_standard_error": bits.standard_error}
    paper_bits, paper_score, paper_fid = PAPER[variant]
    return {
        "variant": variant,
        "likelihood": likelihood,
        "critic": critic,
        "flow": flow,
        **measured,
        "frechet_distance": metrics.frechet_distance(real, fake, metrics.digit_features()),
        "sliced_wasserstein": held["sliced_wasserstein"].value,
        "data": bundle.name,
        "examples": len(real),
        "samples": SAMPLES,
        "steps": result.steps,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.monotonic() - began, 1),
        "paper_bits_per_dim": paper_bits,
        "paper_inception_score": paper_score,
        "paper_fid": paper_fid,
        "paper_data": PAPER_DATA,
    }


def _told(row: dict) -> str:
    bits = "" if row["bits_per_dim"] is None else f"{row['bits_per_dim']:.3f} bits/dim, "
    return f"{row['variant']}: {bits}Fréchet distance {row['frechet_distance']:.1f} ({row['seconds']:.0f} s)"


def _picture(rows: list[dict], bundle, config):
    from genkernels import pictures

    has = {True: "yes", False: "–"}

    def parts(row):
        return [row["variant"].upper(), *(has[row[part]] for part in ("flow", "critic", "likelihood"))]

    ours = [
        [
            *parts(row),
            "–" if row["bits_per_dim"] is None else f"{row['bits_per_dim']:.2f}",
            f"{row['frechet_distance']:.1f}",
            f"{row['sliced_wasserstein']:.4f}",
        ]
        for row in rows
    ]
    theirs = [
        [
            *parts(row),
            f"[{row['paper_bits_per_dim']:.1f}]" if row["variant"] == "gan" else f"{row['paper_bits_per_dim']:.1f}",
            f"{row['paper_fid']:.1f}",
            f"{row['paper_inception_score']:.1f}",
        ]
        for row in rows
    ]
    run = f"{rows[0]['examples']:,} held out; {config.max_steps:,} steps of {BATCH}, seed {config.seed}"
    return pictures.table(
        ["", "flow", "critic", "likelihood", "bits/dim", "Fréchet", "Wasserstein / IS"],
        {
            f"here: {bundle.name}, 8×8, {run}": ours,
            f"the paper: {PAPER_DATA}, 32×32 in colour, far larger networks": theirs,
        },
        title="What flow, critic and likelihood each bring",
        note="Compare directions, not values: data and networks are others. Bits/dim: the held-out bound, lower is "
        f"better. Fréchet: the distance between features of the held-out examples and of {SAMPLES:,} samples: of a "
        "classifier of the digits here, of Inception in the paper (FID); lower is better. Last column: here the sliced "
        "Wasserstein distance of pixels, lower is better; in the paper the inception score, higher is better. In "
        "brackets: by an encoder trained afterwards. The paper: Lucas et al., Adaptive density estimation for "
        "generative models, 2019.",
    )
