"""Trains Glow on real handwritten digits, on the fused and on the reference path, from one seed, and shows what came of
it.

python tools/demo.py [--steps N] [--out DIR]

Leaves in DIR: the two runs (``fused``, ``reference``), ``samples.png``, ``speed.json``, ``speed.png`` and
``summary.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

import genkernels as gk
from genkernels import benchmarks, data, models, pictures, training
from genkernels.training import TrainConfig

PATHS = {"fused": "auto", "reference": "reference"}


def train(name: str, bundle, config: TrainConfig, out: Path) -> training.Result:
    torch.manual_seed(config.seed)
    model = models.Glow.from_preset("digits")
    backend = PATHS[name]
    print(f"\n{name}: Glow on {bundle.description}", flush=True)
    with gk.use_backend(backend):
        result = training.fit(model, bundle, config, out=out / name, overwrite=True)
    if result.interrupted:
        print(f"demo: interrupted after step {result.steps} of the {name} path", file=sys.stderr)
        sys.exit(128 + result.signal)
    return result


def held(result: training.Result) -> models.Estimate:
    return result.held_out["bits_per_dim"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    began = time.monotonic()
    out = arguments.out
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"demo: --out must be a folder that can be written, got {out}: {error.strerror}", file=sys.stderr)
        return 2
    if arguments.steps < 1:
        print(f"demo: --steps must be at least 1, got {arguments.steps}", file=sys.stderr)
        return 2
    bundle = data.load("digits")
    config = TrainConfig(max_steps=arguments.steps, batch_size=128, seed=arguments.seed, eval_every=0, sample_every=0)
    results = {name: train(name, bundle, config, out) for name in PATHS}

    fused, reference = results["fused"], results["reference"]
    samples = training.sample(fused.model, 64, temperature=0.8, seed=arguments.seed)
    pictures.save(out / "samples.png", pictures.draw(samples))

    print("\nThe hot path alone: affine_coupling, forward + backward", flush=True)
    rows = [f"affine_coupling/{scale_map}" for scale_map in ("exp", "sigmoid", "tanh")]
    gate = benchmarks.main(rows, json=out / "speed.json", plot=out / "speed.png", dtypes=["float32"])

    difference = abs(held(fused).value - held(reference).value)
    speedup = fused.examples_per_second / reference.examples_per_second
    summary = {
        name: {
            "bits_per_dim": held(r).value,
            "images_per_second": r.examples_per_second,
            "steps": r.steps,
            "device": r.device,
            "final_loss": r.losses[-1],
        }
        for name, r in results.items()
    }
    summary["machine"] = json.loads((out / "speed.json").read_text())["machine"]
    summary |= {"difference_bits_per_dim": difference, "speedup": speedup, "seconds": time.monotonic() - began}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")

    print(f"\n{'path':12}{'held-out bits/dim':>20}{'images/s':>12}")
    for name, r in results.items():
        print(f"{name:12}{held(r).value:>14.4f} ± {held(r).standard_error:.3f}{r.examples_per_second:>11,.0f}")
    print(f"\nheld-out bits/dim differ by {difference:.4f}; the fused path is {speedup:.2f}x as fast ({fused.device})")
    print(
        f"samples: {out / 'samples.png'}   speed table: {out / 'speed.png'}   all of it in "
        f"{time.monotonic() - began:.0f} s"
    )
    return gate


if __name__ == "__main__":
    sys.exit(main())
