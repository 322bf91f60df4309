"""``genkernels sample``."""

from __future__ import annotations

import sys
from pathlib import Path

from genkernels.training.errors import UsageError


def run(arguments) -> int:
    for flag, value in (("--n", arguments.n), ("--batch-size", arguments.batch_size)):
        if value is not None and value < 1:
            raise UsageError(f"{flag} must be at least 1, got {value}")
    if not 0 <= arguments.temperature < float("inf"):
        raise UsageError(f"--temperature must be 0 or positive, got {arguments.temperature}")
    from genkernels.cli.load import check_writable, classes_of, load
    from genkernels.training.loop import forced_backend

    out = Path(arguments.out).expanduser() if arguments.out else None
    if out is not None:
        if out.suffix.lower() not in (".png", ".npz"):
            raise UsageError(f"--out must end in .png or .npz, got {str(out)!r}")
        check_writable(out)
    with forced_backend(arguments.backend):
        model, config, state = load(arguments)
        points = config["data"].get("levels") is None
        n = arguments.n or (2000 if points else 64)
        if out is None:
            label = "" if arguments.label is None else f"-label{arguments.label}"
            name = f"n{n}-t{arguments.temperature:g}-seed{arguments.seed}{label}.png"
            out = Path(arguments.run).expanduser() / "samples" / name
            check_writable(out)
        from genkernels.training.grids import draw, save_png, why_not
        from genkernels.training.sampling import sample, unusable

        if out.suffix.lower() == ".png" and (missing := why_not(points)):
            raise UsageError(f"writing a PNG: {missing}")
        images = sample(
            model, n, temperature=arguments.temperature, seed=arguments.seed, label=arguments.label,
            num_classes=classes_of(config), batch_size=arguments.batch_size,
        )  # fmt: skip
    if broken := unusable(images):
        print(
            f"genkernels: {broken} of {n} samples are not finite: train longer, or lower --temperature", file=sys.stderr
        )
    if out.suffix.lower() == ".npz":
        _save_npz(out, images, config)
    else:
        save_png(out, draw(images))
    print(f"{out}: {n:,} samples at temperature {arguments.temperature:g}, weights of step {state['step']}")
    return 0


def _save_npz(path: Path, images, config: dict) -> None:
    """Writes ``x`` (and ``levels``) as ``--data npz:`` reads them: level indices for images, float32 for points."""
    import numpy as np

    from genkernels.training.checkpoint import replacing

    levels = config["data"].get("levels")
    arrays = {"x": images.float().numpy()}
    if levels is not None:
        arrays = {
            "x": (images.nan_to_num(0.0) * (levels - 1)).round().clamp(0, levels - 1).byte().numpy(),
            "levels": np.array(levels),
        }
    with replacing(path) as file:
        np.savez(file, **arrays)
