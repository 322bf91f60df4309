"""``genkernels sample``."""

from __future__ import annotations

from pathlib import Path

from genkernels._files import refuse_unwritable
from genkernels._words import UsageError, notice

#: Arguments of a model's `sample` that are options of their own.
RESERVED = ("x", "n", "temperature", "generator", "y")


def run(arguments) -> int:
    for flag, value in (("--n", arguments.n), ("--batch-size", arguments.batch_size)):
        if value is not None and value < 1:
            raise UsageError(f"{flag} must be at least 1, got {value}")
    if not 0 <= arguments.temperature < float("inf"):
        raise UsageError(f"--temperature must be 0 or positive, got {arguments.temperature}")
    if not -(2**63) <= arguments.seed < 2**63:
        raise UsageError(f"--seed must be an integer of 64 bits, got {arguments.seed}")
    from genkernels.backends import current_backend, use_backend
    from genkernels.cli.load import class_number, load, options
    from genkernels.cli.train import as_name

    out = Path(arguments.out).expanduser() if arguments.out else None
    if out is not None:
        if out.suffix.lower() not in (".png", ".npz"):
            raise UsageError(f"--out must end in .png or .npz, got {str(out)!r}")
        refuse_unwritable(out)
    with use_backend(arguments.backend or current_backend()):
        model, config, state = load(arguments)
        if not model.has_prior:
            name = config["model"]["name"]
            raise UsageError(
                f"{name} translates images and has nothing to sample from: its sheets are in the run's samples/"
            )
        if arguments.inpaint and arguments.settings:
            raise UsageError("--set cannot be given with --inpaint")
        chosen = options(arguments.settings, model.sample, config["model"]["name"], reserved=RESERVED)
        points = config["data"].get("grey_levels") is None
        n = arguments.n or (2000 if points else 16 if arguments.inpaint else 64)
        if out is None:
            label = "" if arguments.label is None else f"-label{as_name(arguments.label)}"
            label += f"-{arguments.inpaint}" if arguments.inpaint else ""
            label += "".join(f"-{key}{value}" for key, value in chosen.items() if str(value).isalnum())
            name = f"n{n}-t{arguments.temperature:g}-seed{arguments.seed}{label}.png"
            out = Path(arguments.run).expanduser() / "samples" / name
            refuse_unwritable(out)
        from genkernels.pictures import draw, save, why_not
        from genkernels.training.sampling import sample

        if out.suffix.lower() == ".png" and (missing := why_not(points)):
            raise UsageError(f"writing a PNG: {missing}")
        if arguments.inpaint:
            from genkernels.cli.inpaint import complete

            return complete(arguments, model, config, state, n, out)
        images = sample(
            model,
            n,
            temperature=arguments.temperature,
            seed=arguments.seed,
            label=class_number(arguments.label, model, config),
            batch_size=arguments.batch_size,
            options=chosen,
        )
    kept = images[images.isfinite().flatten(1).all(1)]
    if not len(kept):
        raise UsageError(f"no sample is finite, {out} is left alone: train longer, or lower --temperature")
    npz = out.suffix.lower() == ".npz"
    if broken := n - len(kept):
        left_out = ", and left out" if npz else ""
        notice(f"{broken} of {n} samples are not finite{left_out}: train longer, or lower --temperature")
    if npz:
        save_npz(out, kept, config)
    else:
        save(out, draw(images))
    count = len(kept) if npz else n
    print(f"{out}: {count:,} samples at temperature {arguments.temperature:g}, weights of step {state['step']}")
    return 0


def save_npz(path: Path, images, config: dict, **more) -> None:
    """Writes ``x`` (and ``levels``) as ``--data npz:`` reads them: level indices for images, float32 for points."""
    import numpy as np

    from genkernels._files import replacing

    levels = config["data"].get("grey_levels")
    arrays = {"x": images.float().numpy()}
    if levels is not None:
        arrays = {"x": (images * (levels - 1)).round().clamp(0, levels - 1).byte().numpy(), "levels": np.array(levels)}
    arrays |= more
    with replacing(path) as file:
        np.savez(file, **arrays)
