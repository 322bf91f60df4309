"""Models, by their command-line names in `MODELS`; `build` makes one from its name and ``hparams``."""

from __future__ import annotations

from genkernels._words import UsageError, nearest
from genkernels.models._model import Estimate, LikelihoodModel, Model, Player
from genkernels.models.autoregressive import GatedPixelCNN, PixelCNN, PixelModel
from genkernels.models.flows import IAF, MAF, NICE, FlowModel, Glow, RealNVP

MODELS: dict[str, type[Model]] = {
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
    "Estimate",
    "FlowModel",
    "LikelihoodModel",
    "Model",
    "Player",
    "GatedPixelCNN",
    "Glow",
    "PixelCNN",
    "PixelModel",
    "RealNVP",
    "build",
    "model_class",
]


def model_class(name: str) -> type[Model]:
    """The class of a command-line name.

    Raises:
        UsageError: there is none; names the nearest.
    """
    if name in MODELS:
        return MODELS[name]
    raise UsageError(f"model must be one of {', '.join(MODELS)}, got {name!r}{nearest(name, MODELS, listed=True)}")


def build(name: str, **hparams) -> Model:
    """The model `name` with constructor arguments `hparams`, as a model's own ``hparams`` holds them.

    Equivalent to::

        genkernels.models.MODELS[name](**hparams)
    """
    return model_class(name)(**hparams)
