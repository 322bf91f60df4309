"""Densities of the plane in rows and columns: in a row what is one density, and how others come near it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from genkernels.pictures.plots import figure_of, heading, pixels_of


def densities(
    rows: Mapping[str, Mapping[str, Tensor]],
    *,
    captions: Mapping[tuple[str, str], str] | None = None,
    title: str = "",
    note: str = "",
) -> np.ndarray:
    """Draws densities, a row of panels each on one scale of colours, which its first panel sets.

    Args:
        rows: by the row's name, ``[height, width]`` by the column's name, y upwards. Every row has the same columns.
        captions: a line below a panel, by row and column.
        title: a line above the panels.
        note: smaller lines below the title.

    Returns:
        ``[height, width, 3]`` bytes.

    Raises:
        ValueError: there is no row, the rows have other columns, or one is no matrix.
    """
    columns = [tuple(row) for row in rows.values()]
    if not columns or not columns[0] or len(set(columns)) > 1:
        raise ValueError(f"densities: rows must have the same columns, at least one, got {columns or 'no row'}")
    captions = captions or {}
    side, left, gap = 1.6, 0.55, 0.28  # inches
    width, body = left + 1.7 * len(columns[0]), (side + gap) * len(rows)
    text = heading(title, note, width)
    head = 0.25 * len(text) + 0.4
    height = head + body + 0.1
    figure = figure_of(width, height)
    for i, (row, panels) in enumerate(rows.items()):
        values = {name: panel.detach().cpu().double().numpy() for name, panel in panels.items()}
        if any(value.ndim != 2 for value in values.values()):
            got = ", ".join(str(list(value.shape)) for value in values.values())
            raise ValueError(f"densities: a panel must be [height, width], got {got}")
        largest = float(next(iter(values.values())).max()) or 1.0
        bottom = height - head - (side + gap) * i - side
        for j, (name, value) in enumerate(values.items()):
            box = (left + 1.7 * j) / width, bottom / height, side / width, side / height
            axes = figure.add_axes(box)
            axes.imshow(value, cmap="magma", vmin=0.0, vmax=largest, origin="lower", interpolation="bilinear")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_color("#9aa4ad")
            axes.set_xlabel(captions.get((row, name), ""), fontsize=9, color="#404040", labelpad=3)
            if i == 0:
                axes.set_title(name, fontsize=10.5, weight="bold")
            if j == 0:
                axes.set_ylabel(row, fontsize=11, weight="bold", rotation=0, ha="right", va="center", labelpad=8)
    for i, (part, size, weight, colour) in enumerate(text):
        y = 1 - (0.1 + 0.25 * i) / height
        figure.text(0.15 / width, y, part, fontsize=size, weight=weight, color=colour, va="top")
    return pixels_of(figure)
