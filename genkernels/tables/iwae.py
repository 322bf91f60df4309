"""VAE and IWAE by the number of draws in training, as Burda et al. 2016 compare them on MNIST."""

from __future__ import annotations

import statistics
import time

from genkernels._words import UsageError, notice
from genkernels.tables import Table
from genkernels.tables._training import check_arguments, train, training_arguments

TITLE = "Held-out −ln p(x) of VAE and IWAE by k, on binarised digits or images of yours, beside Burda's on MNIST"
STEPS, BATCH = 10_000, 20
DRAWS = (1, 5, 50)
#: Draws by which ln p(x) is estimated, and images that it is estimated on, at most.
IMPORTANCE, EXAMPLES = 5000, 1000
#: How each is trained, as `genkernels.losses.importance_loss` calls it: both are one bound at k = 1.
MODELS = {"VAE": "ciwae:1", "IWAE": "iwae"}
PAPER_DATA = "MNIST, 50,000 images"
#: Burda et al. 2016, table 1, one stochastic layer: −ln p(x) by 5,000 draws, nats.
PAPER = {"VAE": {1: 86.76, 5: 86.47, 50: 86.35}, "IWAE": {1: 86.76, 5: 85.54, 50: 84.78}}


def add_arguments(parser) -> None:
    parser.add_argument(
        "--data", default="digits", metavar="SPEC", help="grey images, as for genkernels train (default: digits)"
    )
    training_arguments(parser, STEPS)
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of each, from --seed on (default: 1)")


def make(arguments) -> Table:
    check_arguments(arguments)
    if not 1 <= arguments.seeds <= 100:
        raise UsageError(f"--seeds must be from 1 to 100, got {arguments.seeds}")
    if arguments.seed + arguments.seeds > 2**63:
        raise UsageError(f"--seed {arguments.seed} leaves no {arguments.seeds} seeds of 64 bits")
    from genkernels import data
    from genkernels._machine import cpu_threads
    from genkernels.models import IWAE
    from genkernels.training import TrainConfig

    bundle = data.load(arguments.data)
    if len(bundle.form.shape) != 3 or bundle.form.grey_levels is None:
        raise UsageError(f"--data must be images with grey levels, which are binarised, got {arguments.data}")
    settings = {**IWAE.presets["mnist"].training, "batch_size": BATCH}
    configs = [
        TrainConfig(max_steps=arguments.steps, seed=seed, eval_every=0, **settings)
        for seed in range(arguments.seed, arguments.seed + arguments.seeds)
    ]
    rows, runs = [], len(DRAWS) * len(MODELS) * len(configs)
    with cpu_threads(arguments.threads):
        for k in DRAWS:
            for model in MODELS:
                if k == 1 and rows:
                    rows += [{**row, "model": model, "paper_nats": PAPER[model][k]} for row in rows[: len(configs)]]
                    continue
                for config in configs:
                    rows.append(_row(model, k, bundle, config))
                    notice(f"{len(rows)} of {runs}: {_told(rows[-1])}")
    return Table(rows, _picture(rows, bundle, arguments.steps))


def _row(name: str, k: int, bundle, config) -> dict:
    """One model, trained with k draws and judged by many."""
    from genkernels._seeds import derive_seed, fixed_seed
    from genkernels.models import IWAE

    began = time.monotonic()
    form = bundle.form
    sizes = {"shape": form.shape, "grey_levels": form.grey_levels, "importance": k, "estimator": MODELS[name]}
    result = train(lambda: IWAE.from_preset("mnist", **sizes), bundle, config)
    x, y = bundle.take("test", min(EXAMPLES, len(bundle.test)))
    with fixed_seed(derive_seed(config.seed, "evaluate")):
        held = result.model.evaluate(zip(x.split(100), y.split(100), strict=True), importance=IMPORTANCE)
    return {
        "model": name,
        "k": k,
        "nats": held["nats"].value,
        "standard_error": held["nats"].standard_error,
        "kl": held["kl"].value,
        "effective_draws": held["effective_draws"].value,
        "largest_weight": held["largest_weight"].value,
        "data": bundle.name,
        "training_examples": len(bundle.train),
        "examples": len(x),
        "draws": IMPORTANCE,
        "steps": result.steps,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "parameters": sum(p.numel() for p in result.model.parameters()),
        "seconds": round(time.monotonic() - began, 1),
        "paper_nats": PAPER[name][k],
        "paper_data": PAPER_DATA,
    }


def _told(row: dict) -> str:
    return (
        f"{row['model']}, k = {row['k']}, seed {row['seed']}: {row['nats']:.2f} ± {row['standard_error']:.2f} nats "
        f"({row['seconds']:.0f} s)"
    )


def _picture(rows: list[dict], bundle, steps: int):
    from genkernels import pictures

    def lines(cell):
        return [
            [model, *(cell([row for row in rows if (row["model"], row["k"]) == (model, k)]) for k in DRAWS)]
            for model in MODELS
        ]

    def here(runs):
        nats = [row["nats"] for row in runs]
        if len(runs) == 1:
            return f"{nats[0]:.2f} ± {runs[0]['standard_error']:.2f}"
        return f"{statistics.mean(nats):.2f} ± {statistics.stdev(nats):.2f}"

    first, seeds = rows[0], sorted({row["seed"] for row in rows})
    size = "×".join(map(str, bundle.form.shape[1:]))
    run = f"{first['training_examples']:,} images, {first['examples']:,} held out; {steps:,} steps of {BATCH}"
    run += f", seed {seeds[0]}" if len(seeds) == 1 else f", seeds {seeds[0]} to {seeds[-1]}"
    spread = "standard error over the held-out images" if len(seeds) == 1 else "standard deviation over the seeds"
    return pictures.table(
        ["", *(f"k = {k}" for k in DRAWS)],
        {
            f"here: {bundle.name.rsplit('/', 1)[-1]}, {size}, {run}": lines(here),
            f"the paper: {PAPER_DATA}": lines(lambda runs: f"{runs[0]['paper_nats']:.2f}"),
        },
        title="−ln p(x) of held-out images by the draws in training, nats",
        note=f"By {IMPORTANCE:,} draws, of images that are binarised by chance, anew in each step. One layer of "
        "50 latents, two layers of 200 units with tanh either way. The VAE's k draws are averaged, IWAE's weighted. "
        f"Compare along k and between the lines, not here and there: the images are others and fewer. ±: {spread}. "
        "The paper: Burda et al., Importance weighted autoencoders, 2016.",
    )
