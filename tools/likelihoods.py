"""Trains several models on the digits for the same time each, and compares their held-out likelihoods.

python tools/likelihoods.py [--seconds S] [--models glow gatedpixelcnn …] [--out DIR] [--json F]

Steps are set beforehand from a short trial of each model, so that learning-rate schedules know their length; what
training took is measured and stands in the result. Leaves the runs and a sheet of samples of each model in DIR.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from genkernels import data, models, pictures, training
from genkernels.benchmarks import machine
from genkernels.training import TrainConfig

TRIAL = 60  # steps; fewer end before the processor is up to speed


def train(name: str, bundle, config: TrainConfig, out: Path | None) -> training.Result:
    torch.manual_seed(config.seed)
    model = models.MODELS[name].from_preset("digits")
    return training.fit(model, bundle, config, out=out, overwrite=True, quiet=True)


def compare(name: str, bundle, seconds: float, out: Path) -> dict:
    """One model's row: what it reached in `seconds` of training."""
    base = {"batch_size": 128, "eval_every": 0, "sample_every": 0, "schedule": "cosine", "lr": 2e-3}
    trial = train(name, bundle, TrainConfig(max_steps=TRIAL, **base), None)
    steps = max(TRIAL, round(seconds * trial.examples_per_second / base["batch_size"]))
    config = TrainConfig(max_steps=steps, ema=min(0.999, 1 - 10 / steps), **base)
    result = train(name, bundle, config, out / name)
    began = time.perf_counter()
    samples = training.sample(result.model, 64, seed=0)
    taken = time.perf_counter() - began
    pictures.save(out / f"{name}.png", pictures.draw(samples))
    held = result.held_out["bits_per_dim"]
    return {
        "model": name,
        "parameters": sum(p.numel() for p in result.model.parameters()),
        "steps": steps,
        "training_seconds": steps * base["batch_size"] / result.examples_per_second,
        "images_per_second": result.examples_per_second,
        "bits_per_dim": held.value,
        "standard_error": held.standard_error,
        "seconds_for_64_samples": taken,
        "config": config.to_dict(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--models", nargs="+", default=["glow", "pixelcnn", "gatedpixelcnn"], choices=models.MODELS)
    parser.add_argument("--out", type=Path, default=Path("likelihoods"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(
            f"likelihoods: --out must be a folder that can be written, got {arguments.out}: {error.strerror}",
            file=sys.stderr,
        )
        return 2
    bundle = data.load("digits")
    rows = []
    print(f"{'model':15}{'held-out bits/dim':>20}{'steps':>9}{'seconds':>10}{'images/s':>11}{'64 samples, s':>15}")
    for name in arguments.models:
        row = compare(name, bundle, arguments.seconds, arguments.out)
        rows.append(row)
        print(
            f"{name:15}{row['bits_per_dim']:>12.4f} ± {row['standard_error']:.3f}{row['steps']:>9,}"
            f"{row['training_seconds']:>10.1f}{row['images_per_second']:>11,.0f}{row['seconds_for_64_samples']:>15.2f}",
            flush=True,
        )
    if arguments.json:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        ceilings = machine.Ceilings(device)
        ceilings.measure([torch.float32], 0.4)
        result = {"machine": machine.describe(device, ceilings, False), "data": bundle.description, "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
