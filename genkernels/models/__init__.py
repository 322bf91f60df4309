"""Models, by their command-line names in `MODELS`; `build` makes one from its name and ``hparams``."""

from __future__ import annotations

import difflib

from torch import nn

from genkernels.models.autoregressive import GatedPixelCNN, PixelCNN, PixelModel
from genkernels.models.flows import IAF, MAF, NICE, FlowModel, Glow, RealNVP

MODELS: dict[str, type[nn.Module]] = {
    "nice": NICE,
    "realnvp": RealNVP,
    "glow": Glow,
    "maf": MAF,
    "iaf": IAF,
    "pixelcnn": PixelCNN,
    "gatedpixelcnn": GatedPixelCNN,
}

__all__ = [
    "IAF",
    "MAF",
    "MODELS",
    "NICE",
    "FlowModel",
    "GatedPixelCNN",
    "Glow",
    "PixelCNN",
    "PixelModel",
    "RealNVP",
    "build",
    "model_class",
]


def model_class(name: str) -> type[nn.Module]:
    """The class of a command-line name.

    Raises:
        ValueError: there is none; names the nearest.
    """
    if name in MODELS:
        return MODELS[name]
    near = difflib.get_close_matches(str(name).lower(), MODELS, n=2)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}{hint}")


def build(name: str, **hparams) -> nn.Module:
    """The model `name` with constructor arguments `hparams`, as a model's own ``hparams`` holds them.

    Equivalent to::

        genkernels.models.MODELS[name](**hparams)
    """
    return model_class(name)(**hparams)
