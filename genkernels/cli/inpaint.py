"""``genkernels sample RUN --inpaint PART``: held-out images of which a part is kept and the rest is drawn anew.

A model of the PixelCNN family draws the pixels in raster order, each given those before it. So it draws the bottom of
an image as exactly as a whole one. What is kept on the right or below has no say in what is drawn before it, which is
told; where nothing that is kept comes before what is drawn, it is refused.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from genkernels._words import UsageError, nearest, notice
from genkernels.cli.load import check_fits, load_data
from genkernels.cli.sample import save_npz
from genkernels.data.spec import reason
from genkernels.models import MODELS
from genkernels.pictures import save, sheet
from genkernels.training.sampling import drawing

#: What `known_region` knows: parts of an image that are kept, and parts that are drawn anew.
KEPT = ("top-half", "top-quarter", "left-half")
DRAWN = ("bottom", "right", "centre", "left", "top")
MASKS = (".png", ".npy")
#: What is drawn anew, on a sheet: no grey, which could be the picture's own.
_BLANK = (0.35, 0.55, 0.90)


def complete(arguments, model, config: dict, state: dict, n: int, out: Path) -> int:
    """Completes held-out images; a sheet shows each as it was, what is kept of it, and what was made of that."""
    if arguments.label:
        raise UsageError("--label cannot be given with --inpaint: held-out images have their own classes")
    if not hasattr(model, "inpaint"):
        able = [name for name, kind in MODELS.items() if hasattr(kind, "inpaint")]
        raise UsageError(
            f"{type(model).__name__} cannot in-paint: only models that draw pixel by pixel can, {' and '.join(able)}"
        )
    bundle = load_data(config["data"].get("spec"), config["data"].get("root"))
    bundle = check_fits(bundle, model, config, part="test")  # the user's own data may have changed since
    known, what = known_region(arguments.inpaint, bundle.form.shape)
    unseen = not_seen(known, type(model).__name__)
    if not out.suffix:
        raise UsageError("--inpaint writes a sheet or arrays: --out must end in .png or .npz")
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
    if unseen:
        notice(unseen)
    top = bundle.form.grey_levels - 1
    if out.suffix.lower() == ".npz":
        save_npz(out, drawn / top, config, known=known.numpy(), original=x.numpy())
    else:
        triples = triples_of(x / top, known, drawn / top)
        across = max(1, round((len(x) / 3) ** 0.5))
        title = f"{type(model).__name__} on {config['data']['spec']}, step {state['step']:,}"
        note = f"held-out pictures with {what}, temperature {arguments.temperature:g}"
        headings = ["whole", "kept", "completed"] * across
        facts = {"model": type(model).__name__, "data": config["data"].get("spec"), "step": state["step"]}
        facts |= {"in-painted": arguments.inpaint, "temperature": arguments.temperature, "seed": arguments.seed}
        save(out, sheet(triples, 3 * across, title=title, note=note, headings=headings, group=3), facts)
    print(
        f"{out}: {len(x):,} held-out images (each: whole, kept, completed) with {what}, "
        f"temperature {arguments.temperature:g}, weights of step {state['step']}"
    )
    return 0


def triples_of(whole: Tensor, known: Tensor, drawn: Tensor) -> Tensor:
    """``[3 N, 3, H, W]``: each image, what is kept of it, and what was made of that, in colour."""
    channels = whole.shape[1]
    if channels not in (1, 3):  # a grey tile a channel
        return triples_of(whole.flatten(0, 1)[:, None], known, drawn.flatten(0, 1)[:, None])
    kept = torch.where(known, whole.expand(-1, 3, -1, -1), torch.tensor(_BLANK).view(3, 1, 1))
    return torch.stack([whole.expand_as(kept), kept, drawn.expand_as(kept)], 1).flatten(0, 1)


def known_region(part: str, shape: tuple[int, int, int]) -> tuple[Tensor, str]:
    """``[H, W]`` bool, True where an image ``(C, H, W)`` is kept, and words on it.

    Args:
        part: one of `KEPT` or `DRAWN`, or the file of a mask.

    Raises:
        UsageError: the part is unknown, or all or nothing of so small an image; or the mask is none for it.
    """
    _, height, width = shape
    if Path(part).suffix.lower() in MASKS:
        known = ~_mask(Path(part).expanduser(), height, width)
        what = f"the white of {part} drawn anew"
    elif part in KEPT:
        known = torch.zeros(height, width, dtype=torch.bool)
        rows = {"top-half": height // 2, "top-quarter": height // 4}.get(part, height)
        known[:rows, : width // 2 if part == "left-half" else width] = True
        what = f"the {part} kept"
    elif part in DRAWN:
        known = torch.ones(height, width, dtype=torch.bool)
        rows = {"bottom": slice(height // 2, None), "top": slice(height // 2)}
        rows["centre"] = slice(height // 4, height - height // 4)
        columns = {"right": slice(width // 2, None), "left": slice(width // 2)}
        columns["centre"] = slice(width // 4, width - width // 4)
        known[rows.get(part, slice(None)), columns.get(part, slice(None))] = False
        what = f"the {part} drawn anew"
    else:
        raise UsageError(
            f"--inpaint must be one of {', '.join(KEPT)} (which is kept), {', '.join(DRAWN)} (which is drawn anew), or "
            f"a mask that ends in {' or '.join(MASKS)}, got {part!r}{nearest(part, (*KEPT, *DRAWN), listed=True)}"
        )
    if known.all() or not known.any():
        lacks = "drawn anew" if known.all() else "kept"
        raise UsageError(f"--inpaint {part}: of an image of {height}x{width} pixels nothing would be {lacks}")
    return known, what


def _mask(path: Path, height: int, width: int) -> Tensor:
    """``[H, W]`` bool from a file, True where it is white, or not 0."""
    import numpy as np

    try:
        if path.suffix.lower() == ".npy":
            values = np.load(path, allow_pickle=False)
        else:
            from PIL import Image

            with Image.open(path) as picture:
                if picture.size != (width, height):  # before a pixel is read
                    raise UsageError(f"the mask {path} must be {height}x{width}, got {picture.height}x{picture.width}")
                see_through = "A" in picture.getbands() or "transparency" in picture.info
                if see_through and np.asarray(picture.convert("RGBA"))[..., 3].min() < 255:
                    raise UsageError(f"the mask {path} must be black and white, it is transparent somewhere")
                values = np.asarray(picture.convert("RGB" if picture.mode != "L" else "L"))
                values = values.reshape(height, width, -1)
                values = values[..., 0] if (values == values[..., :1]).all() else values
    except UsageError:
        raise
    except Exception as error:  # Pillow and numpy raise whatever a damaged file makes them stumble over
        pickled = path.suffix.lower() == ".npy" and "allow_pickle" in str(error)
        why = getattr(error, "strerror", None) or ("it is no array of numpy.save" if pickled else reason(error))
        raise UsageError(f"the mask {path} cannot be read: {why}") from None
    if values.shape != (height, width):
        got = "colours" if path.suffix.lower() == ".png" else f"an array of shape {list(values.shape)}"
        raise UsageError(f"the mask {path} must be {height}x{width}, black and white, got {got}")
    white = values == values.dtype.type(255 if path.suffix.lower() == ".png" else 1)
    if odd := int((~(white | (values == 0))).sum()):
        allowed = "black or white" if path.suffix.lower() == ".png" else "False and True, or 0 and 1"
        raise UsageError(f"the mask {path} must be {allowed} alone, {odd:,} of its pixels are not")
    return torch.from_numpy(white)


def not_seen(known: Tensor, name: str) -> str | None:
    """A sentence where some of what is kept comes, in raster order, after something that is drawn.

    Raises:
        UsageError: all of it does.
    """
    kept = known.flatten()
    drawn = (~kept).nonzero()[:, 0]
    if not kept[: drawn[-1]].any():
        raise UsageError(
            f"{name} draws pixels in raster order, each given those before it: of what is kept nothing comes before "
            "what is to be drawn; it can draw the bottom"
        )
    if not (late := int(kept[drawn[0] :].sum())):
        return None
    return (
        f"{name} draws pixels in raster order: {late:,} of the {int(kept.sum()):,} kept ones come after drawn ones and "
        "have no say in what is drawn before them"
    )


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
    """
    parts = []
    with drawing(model, seed) as (device, generator):
        for first in range(0, len(x), batch_size):
            part = slice(first, first + batch_size)
            given = {} if y is None else {"y": y[part].to(device)}
            drawn = model.inpaint(x[part].to(device), known, temperature=temperature, generator=generator, **given)
            parts.append(drawn.cpu())
    return torch.cat(parts)
