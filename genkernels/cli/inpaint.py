"""``genkernels sample RUN --inpaint PART``: held-out images of which a part is kept and the rest is drawn anew."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from genkernels import data
from genkernels._words import UsageError
from genkernels.cli.load import check_fits
from genkernels.cli.sample import save_npz
from genkernels.pictures import save, sheet
from genkernels.training.sampling import drawing

#: What `known_region` knows: the part of an image that is kept.
REGIONS = ("top-half", "top-quarter", "left-half")


def complete(arguments, model, config: dict, state: dict, n: int, out: Path) -> int:
    """Completes held-out images; a sheet shows each as it was, what is kept of it, and what was made of that."""
    if arguments.label is not None:
        raise UsageError("--label cannot be given with --inpaint: held-out images have their own classes")
    bundle = data.load(config["data"]["spec"], root=config["data"].get("root"))
    if not bundle.form.is_image:
        raise UsageError(f"--inpaint completes images: the data {bundle.name} are points")
    bundle = check_fits(bundle, model, config, part="test")  # the user's own data may have changed since
    known = known_region(arguments.inpaint, bundle.form.shape)
    x, y = bundle.take("test", n)
    drawn = inpaint(
        model,
        x,
        known,
        y=y if model.num_classes else None,
        temperature=arguments.temperature,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
    )
    top = bundle.form.grey_levels - 1
    if not out.suffix:
        raise UsageError("--inpaint writes a sheet or arrays: --out must end in .png or .npz")
    if out.suffix.lower() == ".npz":
        save_npz(out, drawn / top, config, known=known.numpy(), original=x.numpy())
    else:
        kept = torch.where(known, x / top, 0.5)
        triples = torch.stack([x / top, kept, drawn / top], 1).flatten(0, 1)
        if triples.shape[1] not in (1, 3):
            triples = triples.flatten(0, 1).unsqueeze(1)
        across = max(1, round((len(x) / 3) ** 0.5))
        title = f"{type(model).__name__} on {config['data']['spec']}, step {state['step']:,}"
        note = f"held-out pictures with the {arguments.inpaint} kept, temperature {arguments.temperature:g}"
        headings = ["whole", "kept", "completed"] * across
        facts = {"model": type(model).__name__, "data": config["data"]["spec"], "step": state["step"]}
        facts |= {"kept": arguments.inpaint, "temperature": arguments.temperature, "seed": arguments.seed}
        save(out, sheet(triples, 3 * across, title=title, note=note, headings=headings), facts)
    print(
        f"{out}: {len(x):,} held-out images (each: whole, kept, completed) with the {arguments.inpaint} kept, "
        f"temperature {arguments.temperature:g}, weights of step {state['step']}"
    )
    return 0


def known_region(region: str, shape: tuple[int, int, int]) -> Tensor:
    """``[H, W]`` bool, True where `region` of an image ``(C, H, W)`` is kept.

    Raises:
        UsageError: the region is unknown, or all of so small an image.
    """
    _, height, width = shape
    if region not in REGIONS:
        raise UsageError(f"--inpaint must be one of {', '.join(REGIONS)}, got {region!r}")
    rows = {"top-half": height // 2, "top-quarter": height // 4}.get(region, height)
    columns = width // 2 if region == "left-half" else width
    known = torch.zeros(height, width, dtype=torch.bool)
    known[:rows, :columns] = True
    if not known.any():
        raise UsageError(f"region {region} of an image of {height}x{width} pixels is empty")
    return known


def inpaint(
    model: nn.Module,
    x: Tensor,
    known: Tensor,
    *,
    y: Tensor | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 256,
) -> Tensor:
    """Draws what is unknown of images, in evaluation mode and fp32; known values stay bit for bit.

    Args:
        model: has ``inpaint(x, known, temperature, generator, y)``: a model of the PixelCNN family.
        x: ``[N, C, H, W]`` uint8. known: bool, broadcastable to it. y: ``[N]`` classes, for a model that has some.
        temperature, seed, batch_size: as for `sample`.

    Returns:
        As `x`, on the CPU.

    Raises:
        UsageError: the model cannot do it.
    """
    if not hasattr(model, "inpaint"):
        raise UsageError(
            f"{type(model).__name__} cannot in-paint: only the PixelCNN family draws some pixels given others"
        )
    parts = []
    with drawing(model, seed) as (device, generator):
        for first in range(0, len(x), batch_size):
            part = slice(first, first + batch_size)
            given = {} if y is None else {"y": y[part].to(device)}
            drawn = model.inpaint(x[part].to(device), known, temperature=temperature, generator=generator, **given)
            parts.append(drawn.cpu())
    return torch.cat(parts)
