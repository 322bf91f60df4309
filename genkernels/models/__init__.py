"""Models, by their command-line names in `MODELS`; `build` makes one from its name and ``hparams``.

Every model takes the same words for its data: ``shape``, ``(C, H, W)`` or ``(D,)``; ``grey_levels``, how many values a
pixel can take, None for points and for images of real numbers; ``num_classes``, None where labels play no part.

``torch.compile`` takes each player's loss as one graph (``fullgraph=True``), values and gradients those of eager mode.
What is decided by numbers or by what was called before is one operator in it: where a roulette stops the series of a
`ResidualFlow`, whether a weight of `SNGAN` has been normalised in this step. Before torch 2.13, whose compiler can
first ask what a network consists of, the graph breaks, and the values stay, in a `ResidualFlow`, in gradient penalties
(`WGANGP`, `R3GAN`, `AVADE`), and in an importance-weighted bound of several draws in chunks or by ``dreg``, ``stl`` and
``piwae``.

A class is imported when it is first named, so that the names alone cost nothing.
"""

from __future__ import annotations

import importlib

from genkernels.models._registry import EXPORTS, MODELS, build, model_class

__all__ = ["MODELS", "build", "model_class", *EXPORTS]


def __getattr__(name: str):
    if name in EXPORTS:
        return getattr(importlib.import_module(EXPORTS[name]), name)
    raise AttributeError(f"module 'genkernels.models' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
