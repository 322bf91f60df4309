"""``genkernels sample``."""

from __future__ import annotations

import re
from collections.abc import Sequence
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
    from genkernels.cli.load import class_names, class_numbers, load, options, surroundings
    from genkernels.cli.train import as_name

    out = _out(arguments.out)
    with surroundings(arguments):
        model, config, state = load(arguments)
        name = config["model"]["name"]
        if not model.has_prior:
            raise UsageError(
                f"{name} translates images and has nothing to sample from: its sheets are in the run's samples/"
            )
        if arguments.inpaint and arguments.settings:
            raise UsageError("--set cannot be given with --inpaint")
        chosen = options(arguments.settings, model.sample, name, reserved=RESERVED)
        wished = class_numbers(arguments.label, model, config)
        points = len(model.shape) == 1
        n = arguments.n or (2000 if points else 16 if arguments.inpaint else 64)
        if out is None:
            words = f"-label{as_name('-'.join(arguments.label))}" if wished else ""
            words += f"-{as_name(arguments.inpaint)}" if arguments.inpaint else ""
            words += "".join("-" + key + re.sub(r"[^\w.+-]", "_", str(value)) for key, value in chosen.items())
            words += {"best": "", "last": "-last"}.get(arguments.checkpoint, f"-step{state['step']}")
            out = Path(arguments.run).expanduser() / "samples" / f"n{n}-t{arguments.temperature:g}"
            out = out.with_name(f"{out.name}-seed{arguments.seed}{words}.png")
            refuse_unwritable(out)
        if not out.suffix and points:
            raise UsageError(f"--out must end in .png or .npz: points have no picture each, got {arguments.out!r}")
        from genkernels.pictures import class_rows, why_not
        from genkernels.training.sampling import sample

        sheet = out.suffix.lower() == ".png"
        if out.suffix.lower() != ".npz" and (missing := why_not(points)):
            raise UsageError(f"writing a PNG: {missing}")
        check_room(n, model, sheet)
        if arguments.inpaint:
            from genkernels.cli.inpaint import complete

            return complete(arguments, model, config, state, n, out)
        if n < len(wished):
            raise UsageError(f"--n must be at least 1 for each of the {len(wished)} classes of --label, got {n}")
        in_rows = sheet and not points and model.samples_by_class and len(wished) != 1
        if in_rows:
            labels = [k for k in wished for _ in range(n // len(wished))] or class_rows(model.num_classes, n)
        elif wished:
            labels = [wished[i * len(wished) // n] for i in range(n)]
        else:  # each class in turn
            labels = [i % model.num_classes for i in range(n)] if model.num_classes and model.samples_by_class else []
        n = len(labels) or n
        drawn = sample(
            model,
            n,
            temperature=arguments.temperature,
            seed=arguments.seed,
            label=labels or None,
            batch_size=arguments.batch_size,
            options=chosen,
        )
    fine = drawn.isfinite().flatten(1).all(1)
    if not fine.any():
        raise UsageError(f"no sample is finite, {out} is left alone: lower --temperature, or train longer")
    if broken := n - int(fine.sum()):
        left_out = "" if sheet else ", and left out"
        notice(f"{broken} of {n} samples are not finite{left_out}: lower --temperature, or train longer")
    facts = {"model": type(model).__name__, "data": config["data"].get("spec"), "step": state["step"]}
    facts |= {"temperature": arguments.temperature, "seed": arguments.seed}
    names = class_names(model, config)
    facts |= {"label": ", ".join(names[k] for k in wished)} if wished else {}
    facts = chosen | facts
    how = ", ".join([f"temperature {arguments.temperature:g}", *(f"{key} {value}" for key, value in chosen.items())])
    if sheet:
        _save_sheet(out, drawn, facts, how, config, labels if in_rows else [], wished, arguments.real)
    else:
        n, labels = int(fine.sum()), [names[k] for k, good in zip(labels, fine, strict=False) if good]
        if out.suffix:
            save_npz(out, drawn[fine], config, **_labelled(labels, names))
        else:
            save_each(out, drawn[fine], facts, labels if len(wished) > 1 else [])
    print(f"{out}: {n:,} samples at {how}, weights of step {state['step']}")
    return 0


def _labelled(labels: list[str], names: list[str]) -> dict:
    """The classes of samples as arrays that ``--data npz:`` reads: by their own numbers, else numbered by name."""
    import numpy as np

    if not labels:
        return {}
    if all(name.isdecimal() for name in names):
        return {"y": np.array([int(label) for label in labels])}
    return {"y": np.array([names.index(label) for label in labels]), "classes": np.array(names)}


def _out(text: str | None) -> Path | None:
    """Where to: a sheet, arrays, or, without an ending, a folder that is empty or not there."""
    if text is None:
        return None
    out = Path(text).expanduser()
    if text.endswith("/") or out.is_dir():
        if out.suffix or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
            raise UsageError(f"--out: the folder {text!r} must be new or empty, and its name without an ending")
        refuse_unwritable(out / "a.png", f"--out {text}")
        return out
    if out.suffix.lower() not in (".png", ".npz"):
        raise UsageError(f"--out must end in .png or .npz, or in / for a PNG of each sample, got {text!r}")
    refuse_unwritable(out)
    return out


def _save_sheet(
    out: Path, drawn, facts: dict, how: str, config: dict, rows: list[int], wished: list[int], beside: bool
) -> None:
    """A sheet under its facts and how it was drawn, beside it held-out examples of the run's data, of the same classes
    where some are chosen."""
    import torch

    from genkernels.cli.load import load_data
    from genkernels.data import DataError
    from genkernels.pictures import save
    from genkernels.training.sampling import shown

    bundle = real = None
    if beside and facts["data"] and not facts["data"].startswith("hf:"):  # which may have to be downloaded
        try:
            bundle = load_data(facts["data"], config["data"].get("root"))
            x, y = bundle.take("test", len(bundle.test) if wished else len(drawn))
            own = torch.isin(y, torch.tensor(wished)) if wished else slice(None)
            most = None if rows else len(drawn)
            real = x[own][:most], y[own][:most]
        except (DataError, OSError) as error:
            notice(f"no held-out examples beside the samples: {error}")
        if bundle and list(bundle.form.shape) != list(config["data"].get("shape") or bundle.form.shape):
            real = None  # the data are no longer the run's
    picture = shown(drawn, facts, how, bundle if real else None, real, rows, config["data"].get("classes"))
    save(out, picture, facts | {"n": len(drawn)})


def save_each(folder: Path, images, facts: dict, labels: Sequence[str] = ()) -> None:
    """A PNG of each image, as large as it is, into a folder that is new, with `labels` into one for each of them as
    ``--data folder:`` reads classes: whole or absent."""
    import shutil

    from genkernels.cli.train import as_name
    from genkernels.pictures import save

    digits = len(str(len(images) - 1))
    pixels = (images.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    if pixels.shape[-1] not in (1, 3):
        raise UsageError(f"--out: pictures must have 1 or 3 channels, got {pixels.shape[-1]}: give --out F.npz")
    existed = folder.exists()
    try:
        for i, picture in enumerate(pixels):
            own = {"label": labels[i]} if labels else {}
            path = folder / (as_name(labels[i]) if labels else "") / f"{i:0{digits}d}.png"
            save(path, picture[..., 0] if picture.shape[-1] == 1 else picture, facts | own | {"number": i})
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        if existed:
            folder.mkdir()
        raise


def check_room(n: int, model, sheet: bool) -> None:
    """A UsageError where so many samples take more memory than there is, or more room than a sheet has."""
    from genkernels._machine import free_memory
    from genkernels._words import bytes_text
    from genkernels.training.checks import MOST_PICTURES

    needed, free = 8 * n * model.dim, free_memory()  # the samples, and the array that is written
    if free is not None and needed > free:
        raise UsageError(f"--n {n:,} takes {bytes_text(needed)} of memory, {bytes_text(free)} are free")
    if len(model.shape) == 3 and n > MOST_PICTURES and sheet:
        raise UsageError(f"--n must be at most {MOST_PICTURES:,} on a sheet, got {n:,}: give --out F.npz")


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
