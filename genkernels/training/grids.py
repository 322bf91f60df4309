"""Sample sheets: images as a grid of enlarged tiles, 2-D points as a scatter plot. Needs Pillow, and matplotlib for
points."""

from __future__ import annotations

import importlib.util
import io
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from genkernels._files import replacing

_TILE = (
    64  # pixels that a tile is enlarged to at least; by whole factors, so that every source pixel stays a sharp square
)
_SHEET = 2048  # pixels of a sheet's side at most, where the factor can still be reduced
_LINE = 96  # grey of the lines between tiles: told apart from black and from white pictures


def why_not(points: bool) -> str | None:
    """None where sheets can be drawn here, else the package that is missing: Pillow, and for points matplotlib too."""
    for module, package in (("PIL", "Pillow"), *([("matplotlib", "matplotlib")] if points else [])):
        if importlib.util.find_spec(module) is None:
            return f"{package} is not installed: pip install 'genkernels[train]'"
    return None


def tile(images: Tensor, columns: int | None = None) -> np.ndarray:
    """Lays images out in a grid.

    Args:
        images: ``[N, C, H, W]``, C = 1 (grey) or 3 (RGB), floats in [0, 1] (others are clipped, NaN is black) or bytes.
        columns: tiles a row; None makes the grid as square as it gets.

    Returns:
        ``[rows, columns]`` or ``[rows, columns, 3]`` bytes: tiles enlarged by a whole factor, separated by grey lines.

    Raises:
        ValueError: the shape is another.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"tile: images must be [N >= 1, 1 or 3, H, W], got {list(images.shape)}")
    pixels = images.detach().cpu()
    if pixels.dtype != torch.uint8:
        pixels = (pixels.float().nan_to_num(0.0, 1.0, 0.0).clamp(0, 1) * 255).round().to(torch.uint8)
    n, channels, height, width = pixels.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    factor = max(1, min(math.ceil(_TILE / max(height, width)), _SHEET // max(columns * width, rows * height)))
    big = pixels.permute(0, 2, 3, 1).numpy().repeat(factor, 1).repeat(factor, 2)
    line = max(1, factor // 4)
    step_y, step_x = height * factor + line, width * factor + line
    sheet = np.full((rows * step_y + line, columns * step_x + line, channels), _LINE, np.uint8)
    for i, picture in enumerate(big):
        top, left = line + i // columns * step_y, line + i % columns * step_x
        sheet[top : top + height * factor, left : left + width * factor] = picture
    return sheet[..., 0] if channels == 1 else sheet


def scatter(points: Tensor, reference: Tensor | None = None) -> np.ndarray:
    """Draws points of the plane, beside real ones on the same axes where given.

    Args:
        points: ``[N, D]``, the first two features are drawn (D = 1: a histogram).
        reference: ``[M, D]`` real examples.

    Returns:
        ``[rows, columns, 3]`` bytes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [("samples", points)] if reference is None else [("samples", points), ("data", reference)]
    panels = [(name, values.detach().cpu().float().reshape(len(values), -1).numpy()) for name, values in panels]
    figure = Figure(figsize=(5 * len(panels), 5), dpi=100)
    canvas = FigureCanvasAgg(figure)
    frame = panels[-1][1]  # the data's, where there are any: a few wild samples must not shrink everything else
    finite = frame[np.isfinite(frame).all(1)]
    for i, (name, values) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1, title=f"{name} ({len(values):,})")
        values = values[np.isfinite(values).all(1)]
        if values.shape[1] == 1:
            axes.hist(values[:, 0], bins=80)
            continue
        axes.scatter(values[:, 0], values[:, 1], s=3, alpha=0.5, linewidths=0)
        if len(finite):
            low, high = finite[:, :2].min(0), finite[:, :2].max(0)
            middle, half = (low + high) / 2, 0.55 * max(float((high - low).max()), 1e-6)
            axes.set(xlim=(middle[0] - half, middle[0] + half), ylim=(middle[1] - half, middle[1] + half))
        axes.set_aspect("equal", adjustable="box")
    figure.tight_layout()
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def draw(samples: Tensor, reference: Tensor | None = None) -> np.ndarray:
    """`tile` for images ``[N, C, H, W]``, `scatter` for points ``[N, D]``; other channel counts are drawn as grey
    tiles."""
    if samples.ndim == 4:
        return tile(samples if samples.shape[1] in (1, 3) else samples.flatten(0, 1).unsqueeze(1))
    return scatter(samples, reference)


def save_png(path: Path, pixels: np.ndarray) -> None:
    """Writes a picture ``[H, W]`` or ``[H, W, 3]`` of bytes, whole or not at all."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    with replacing(Path(path)) as file:
        file.write(buffer.getvalue())
