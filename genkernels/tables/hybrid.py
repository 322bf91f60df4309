"""Hybrid flows: what λ buys and costs, by the kind of flow (Chen et al. 2019, on the digits in place of CIFAR-10)."""

from __future__ import annotations

import time

from genkernels._words import notice
from genkernels.tables import Table
from genkernels.tables._training import check_arguments, train, training_arguments

TITLE = "Accuracy and bits/dim of hybrid flows by λ, on the digits, beside the paper's"
STEPS, BATCH = 600, 128
BLOCKS = {"realnvp": "Coupling", "glow": "+ 1×1 conv", "residualflow": "Residual"}
WEIGHTS = {"0": 0.0, "1/D": "1/D", "1": 1.0}
PAPER_DATA = "CIFAR-10"
#: Chen et al. 2019: accuracy in percent, bits/dim where they tell it.
PAPER = {
    "realnvp": {"0": (89.77, None), "1/D": (87.58, 4.30), "1": (67.62, 3.54)},
    "glow": {"0": (90.82, None), "1/D": (87.96, 4.09), "1": (67.38, 3.47)},
    "residualflow": {"0": (91.78, None), "1/D": (90.47, 3.62), "1": (70.32, 3.39)},
}


def add_arguments(parser) -> None:
    training_arguments(parser, STEPS)


def make(arguments) -> Table:
    check_arguments(arguments)
    from genkernels import data
    from genkernels._machine import cpu_threads
    from genkernels.training import TrainConfig

    bundle = data.load("digits")
    config = TrainConfig(
        max_steps=arguments.steps,
        seed=arguments.seed,
        batch_size=BATCH,
        lr=2e-3,
        schedule="cosine",
        ema=min(0.999, 1 - 10 / max(arguments.steps, 11)),
        eval_every=0,
    )
    rows = []
    with cpu_threads(arguments.threads):
        for flow in BLOCKS:
            for label in WEIGHTS:
                rows.append(_row(flow, label, bundle, config))
                notice(f"{len(rows)} of {len(BLOCKS) * len(WEIGHTS)}: {_told(rows[-1])}")
    return Table(rows, _picture(rows, bundle, config))


def _row(flow: str, label: str, bundle, config) -> dict:
    """One cell of the table, trained."""
    from genkernels.models import HybridFlow

    began = time.monotonic()
    result = train(lambda: HybridFlow.from_preset(f"digits-{flow}", weight=WEIGHTS[label]), bundle, config)
    held, (paper_accuracy, paper_bits) = result.held_out, PAPER[flow][label]
    measured = {}
    for name in ("accuracy", "bits_per_dim", "cross_entropy"):
        measured |= {name: held[name].value, f"{name}_standard_error": held[name].standard_error}
    return {
        "flow": flow,
        "weight": label,
        "lambda": result.model.weight,
        **measured,
        "data": bundle.name,
        "examples": held["accuracy"].examples,
        "steps": result.steps,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "parameters": sum(p.numel() for p in result.model.parameters()),
        "seconds": round(time.monotonic() - began, 1),
        "paper_accuracy": paper_accuracy,
        "paper_bits_per_dim": paper_bits,
        "paper_data": PAPER_DATA,
    }


def _told(row: dict) -> str:
    return (
        f"{row['flow']}, λ = {row['weight']}: accuracy {row['accuracy']:.1f} %, {row['bits_per_dim']:.3f} bits/dim "
        f"({row['seconds']:.0f} s)"
    )


def _picture(rows: list[dict], bundle, config):
    from genkernels import pictures

    ours = {block: [BLOCKS[block]] for block in BLOCKS}
    for row in rows:
        accuracy = f"{row['accuracy']:.1f} ± {row['accuracy_standard_error']:.1f}"
        ours[row["flow"]] += [accuracy, _number(row["bits_per_dim"])]
    theirs = [
        [BLOCKS[flow], *(cell for accuracy, bits in cells.values() for cell in (f"{accuracy:.2f}", _number(bits)))]
        for flow, cells in PAPER.items()
    ]
    sizes = ", ".join(f"{row['parameters'] / 1000:.0f}" for row in rows[:: len(WEIGHTS)])
    run = f"{rows[0]['examples']:,} held out; {config.max_steps:,} steps of {BATCH}, seed {config.seed}"
    return pictures.table(
        ["", *["accuracy, %", "bits/dim"] * len(WEIGHTS)],
        {
            f"here: {bundle.name}, 8×8, {run}": list(ours.values()),
            f"the paper: {PAPER_DATA}, 32×32 in colour, far larger networks": theirs,
        },
        spans=[("", 1), *((f"λ = {label}", 2) for label in WEIGHTS)],
        title="Hybrid flows: λ ln p(x) + ln p(y|x) maximised",
        note=f"Compare directions, not values: the data are others, and here the flows have {sizes} thousand "
        "parameters, each its own preset. λ = 0 trains the classifier alone: nobody minimises its bits/dim. D is the "
        "number of values of an image. ±: standard error over the held-out images. The paper: Chen et al., Residual "
        "flows for invertible generative modeling, 2019.",
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
