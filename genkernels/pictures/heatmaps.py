"""Matrices side by side, each value a coloured square; exact zeros stay white."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from genkernels.pictures.plots import figure_of, heading, pixels_of


def heatmaps(
    matrices: Mapping[str, Tensor], *, captions: Mapping[str, str] | None = None, title: str = "", note: str = ""
) -> np.ndarray:
    """Draws the absolute values of matrices on one scale of colours.

    Args:
        matrices: ``[rows, columns]`` by name, a panel each. Only what is exactly 0 is white.
        captions: lines below a panel, by its name.
        title: a line above the panels.
        note: smaller lines below the title.

    Returns:
        ``[height, width, 3]`` bytes.

    Raises:
        ValueError: there is none, or one is no matrix.
    """
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    values = {name: matrix.detach().cpu().double().abs().numpy() for name, matrix in matrices.items()}
    if not values or any(value.ndim != 2 for value in values.values()):
        got = ", ".join(str(list(value.shape)) for value in values.values()) or "none"
        raise ValueError(f"heatmaps: matrices must be [rows, columns], at least one, got {got}")
    captions = captions or {}
    lines = max((text.count("\n") + 1 for text in captions.values()), default=0)
    width, below = 3.5 * len(values) + 0.7, 0.22 * lines
    text = heading(title, note, width)
    head = 0.25 * len(text)
    height = 3.7 + below + head
    figure = figure_of(width, height)
    tints = LinearSegmentedColormap.from_list("", ["#dbe8f5", "#8fbbe0", "#1667b7", "#0b2f57"])
    tints = tints.with_extremes(bad="white")
    largest = max(float(np.nanmax(value)) for value in values.values()) or 1.0
    scale = PowerNorm(0.4, 0.0, largest)  # small values are told from 0, large ones from one another
    panels = []
    for i, (name, value) in enumerate(values.items()):
        axes = figure.add_subplot(1, len(values), i + 1)
        drawn = axes.imshow(np.ma.masked_equal(value, 0.0), cmap=tints, norm=scale, interpolation="nearest")
        axes.set_title(name, fontsize=11, weight="bold")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color("#9aa4ad")
        axes.set_xlabel(captions.get(name, ""), fontsize=9.5, color="#404040", labelpad=8, linespacing=1.35)
        panels.append(axes)
    figure.subplots_adjust(
        left=0.2 / width,
        right=1 - 0.95 / width,
        bottom=(0.3 + below) / height,
        top=1 - (head + 0.35) / height,
        wspace=0.12,
    )
    box = panels[-1].get_position()
    bar = figure.colorbar(drawn, cax=figure.add_axes((1 - 0.8 / width, box.y0, 0.14 / width, box.height)))
    bar.set_label("|J|")
    bar.outline.set_visible(False)
    for i, (part, size, weight, colour) in enumerate(text):
        figure.text(
            0.2 / width, 1 - (0.1 + 0.25 * i) / height, part, fontsize=size, weight=weight, color=colour, va="top"
        )
    return pixels_of(figure)
