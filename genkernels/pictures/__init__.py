"""Pictures: images as a `sheet` of enlarged tiles, or several sheets as `blocks`; a model's `samples` beside real
examples, `class_rows` for those of classes; points as a `scatter` plot, losses as `curves`, matrices as `heatmaps`,
densities of the plane as `densities`, curves side by side as `panels`, results as a `table`; and `save`.

Each gives pixels, ``[H, W]`` or ``[H, W, 3]`` bytes, which `save` writes and TensorBoard takes. Needs Pillow, and
matplotlib for plots and for text; both are imported when something is drawn. `why_not` says early what is missing.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from genkernels.pictures.densities import densities
from genkernels.pictures.files import save, why_not
from genkernels.pictures.heatmaps import heatmaps
from genkernels.pictures.panels import panels
from genkernels.pictures.plots import curves, scatter
from genkernels.pictures.samples import class_rows, samples
from genkernels.pictures.sheets import blocks, sheet
from genkernels.pictures.tables import table

__all__ = [
    "blocks",
    "class_rows",
    "curves",
    "densities",
    "draw",
    "heatmaps",
    "panels",
    "samples",
    "save",
    "scatter",
    "sheet",
]
__all__ += ["table", "why_not"]


def draw(samples: Tensor, real: Tensor | None = None) -> np.ndarray:
    """Draws whatever a model gives: images as a `sheet`, points as a `scatter` plot.

    Args:
        samples: images ``[N, C, H, W]`` in [0, 1] (where C is neither 1 nor 3, a grey tile a channel), or points
            ``[N, D]``.
        real: real points to draw beside the samples; images are drawn without.

    Returns:
        ``[rows, columns]`` or ``[rows, columns, 3]`` bytes.

    Equivalent to::

        sheet(samples) if samples.ndim == 4 else scatter(samples, real)
    """
    if samples.ndim == 4:
        return sheet(samples if samples.shape[1] in (1, 3) else samples.flatten(0, 1).unsqueeze(1))
    return scatter(samples, real)
