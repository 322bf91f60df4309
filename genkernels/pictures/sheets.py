"""Images as a grid of enlarged tiles, with a title and labels where they are wanted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from genkernels.pictures._text import FAINT, INK, typeface, wrapped

#: Pixels that the shorter side of a tile is enlarged to at least, and a sheet's width, where whole factors reach it:
#: source pixels stay squares.
_TILE, _WIDTH = 64, 640
_SHEET = 2048  # pixels of a sheet's side at most, where the factor can still be reduced
_LINE = 96  # grey of the lines between tiles: told apart from black and from white pictures


def sheet(
    images: Tensor,
    columns: int | None = None,
    *,
    title: str = "",
    note: str = "",
    rows: Sequence[str] = (),
    headings: Sequence[str] = (),
    group: int | None = None,
) -> np.ndarray:
    """Lays images out in a grid, row by row.

    Args:
        images: ``[N, C, H, W]``, C = 1 (grey) or 3 (RGB), floats in [0, 1] (others are clipped, NaN is black) or bytes.
        columns: tiles a row; None makes the grid as square as it gets.
        title: a line above the grid.
        note: smaller lines below the title.
        rows: a label for each row, left of it.
        headings: a label for each column, above it.
        group: how many columns belong together: white gaps lie between such groups.

    Returns:
        ``[height, width]`` or ``[height, width, 3]`` bytes: tiles enlarged by a whole factor, separated by grey lines.
        With any text the picture is RGB, the grid on white.

    Raises:
        ValueError: the shape is another, there are not as many labels as rows or columns, or `group` does not divide
            the columns.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"sheet: images must be [N >= 1, 1 or 3, H, W], got {list(images.shape)}")
    n, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    lines = math.ceil(n / columns)
    for name, labels, count in (("rows", rows, lines), ("headings", headings, columns)):
        if labels and len(labels) != count:
            raise ValueError(f"sheet: {name} must be {count} labels, got {len(labels)}")
    group = columns if group is None else group
    if group < 1 or columns % group:
        raise ValueError(f"sheet: group must divide the {columns} columns, got {group}")
    factor = _factor(height, width, lines, columns)
    step_y, step_x = height * factor + _line(factor), width * factor + _line(factor)
    grid = _grid(images, lines, columns, factor)
    grids = [grid[:, i * step_x : (i + group) * step_x + _line(factor)] for i in range(0, columns, group)]
    grid, lefts = _beside(grids, _gap(width, factor))
    if title or note or rows or headings:
        centres = [lefts[i // group] + (i % group + 0.5) * step_x for i in range(columns)]
        return _labelled(grid, step_y, centres, title, note, rows, headings)
    return grid[..., 0] if channels == 1 else grid


def blocks(
    parts: Mapping[str, tuple[Tensor, int]], *, title: str = "", note: str = "", rows: Sequence[str] = ()
) -> np.ndarray:
    """Sheets beside each other, tiles of one size in rows that go on from one to the next.

    Args:
        parts: by the words above it, the images of a block, as `sheet` takes them, and how many of them a row has.
        title, note, rows: as for `sheet`.

    Returns:
        ``[height, width, 3]`` bytes.
    """
    height, width = next(iter(parts.values()))[0].shape[2:]
    lines = max(math.ceil(len(images) / columns) for images, columns in parts.values())
    factor = _factor(height, width, lines, sum(columns for _, columns in parts.values()))
    grids = [_grid(images, lines, columns, factor) for images, columns in parts.values()]
    grids = [np.broadcast_to(grid, (*grid.shape[:2], 3)) for grid in grids]
    whole, lefts = _beside(grids, _gap(width, factor))
    centres = [left + grid.shape[1] / 2 for left, grid in zip(lefts, grids, strict=True)]
    return _labelled(whole, height * factor + _line(factor), centres, title, note, rows, list(parts))


def _factor(height: int, width: int, lines: int, columns: int) -> int:
    """By which pictures are enlarged."""
    wished = max(math.ceil(_TILE / min(height, width)), _WIDTH // (columns * width))
    return max(1, min(wished, _SHEET // max(columns * width, lines * height)))


def _line(factor: int) -> int:
    return max(1, min(factor // 3, 4))


def _grid(images: Tensor, lines: int, columns: int, factor: int) -> np.ndarray:
    _, channels, height, width = images.shape
    line = _line(factor)
    step_y, step_x = height * factor + line, width * factor + line
    grid = np.full((lines * step_y + line, columns * step_x + line, channels), _LINE, np.uint8)
    big = _bytes(images).permute(0, 2, 3, 1).numpy().repeat(factor, 1).repeat(factor, 2)
    for i, picture in enumerate(big):
        top, left = line + i // columns * step_y, line + i % columns * step_x
        grid[top : top + height * factor, left : left + width * factor] = picture
    return grid


def _gap(width: int, factor: int) -> int:
    return max(12, width * factor // 4)


def _beside(grids: Sequence[np.ndarray], gap: int) -> tuple[np.ndarray, list[int]]:
    """Grids of one height in a row, white between them, and where each begins."""
    height, _, channels = grids[0].shape
    white = np.full((height, gap, channels), 255, np.uint8)
    lefts = [sum(grid.shape[1] + gap for grid in grids[:i]) for i in range(len(grids))]
    return np.concatenate([part for grid in grids for part in (white, grid)][1:], 1), lefts


def _bytes(images: Tensor) -> Tensor:
    pixels = images.detach().cpu()
    if pixels.dtype == torch.uint8:
        return pixels
    return (pixels.float().nan_to_num(0.0, 1.0, 0.0).clamp(0, 1) * 255).round().to(torch.uint8)


def _labelled(grid: np.ndarray, step_y: int, centres: Sequence[float], title: str, note: str, rows, headings):
    """The grid on white, a title and a note above it, labels left of its rows and above what has these centres."""
    from PIL import Image, ImageDraw

    height, width = grid.shape[:2]
    size = max(14, width // 64)
    bold, plain = typeface(round(1.15 * size), bold=True), typeface(size)
    gap = size // 2
    left = gap + (max(round(plain.getlength(label)) for label in rows) + gap if rows else 0)
    lines = [(line, bold, INK) for line in wrapped(title, bold, left + width - gap)]
    lines += [(line, plain, FAINT) for line in wrapped(note, plain, left + width - gap)]
    head = gap + sum(round(1.35 * font.size) for _, font, _ in lines) + (gap if lines else 0)
    top = head + (round(1.5 * size) if headings else 0)
    page = Image.new("RGB", (left + width + gap, top + height + gap), "white")
    page.paste(Image.fromarray(np.broadcast_to(grid, (height, width, 3)).copy()), (left, top))
    pen, y = ImageDraw.Draw(page), gap
    for text, font, ink in lines:
        pen.text((gap, y), text, font=font, fill=ink)
        y += round(1.35 * font.size)
    for i, label in enumerate(rows):
        pen.text((left - gap, top + round((i + 0.5) * step_y)), label, font=plain, fill=INK, anchor="rm")
    for centre, label in zip(centres, headings, strict=False):
        pen.text((left + round(centre), top - gap), label, font=plain, fill=INK, anchor="ms")
    return np.asarray(page)
