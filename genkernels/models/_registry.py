"""Which models there are: one line each, and no model is imported before it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, MutableMapping
from typing import Any

from genkernels._words import UsageError, nearest

#: command-line name: module below genkernels.models, and class. A new model is its file and its line here.
_LINES = {
    "nice": "flows.nice:NICE",
    "realnvp": "flows.realnvp:RealNVP",
    "glow": "flows.glow:Glow",
    "maf": "flows.maf:MAF",
    "iaf": "flows.maf:IAF",
    "nsf": "flows.nsf:NSF",
    "residualflow": "flows.residual:ResidualFlow",
    "hybridflow": "flows.hybrid:HybridFlow",
    "pixelcnn": "autoregressive.pixelcnn:PixelCNN",
    "gatedpixelcnn": "autoregressive.gated:GatedPixelCNN",
    "gan": "gan.gan:GAN",
    "wgan": "gan.gan:WGAN",
    "wgangp": "gan.gan:WGANGP",
    "sngan": "gan.sngan:SNGAN",
    "r3gan": "gan.r3gan:R3GAN",
    "bigan": "gan.bigan:BiGAN",
    "cyclegan": "gan.cyclegan:CycleGAN",
    "vae": "vae.vae:VAE",
    "iwae": "vae.iwae:IWAE",
    "hierarchicalvae": "vae.hierarchical:HierarchicalVAE",
    "pixelvae": "vae.hierarchical:PixelVAE",
    "avade": "vae.avade:AVADE",
}

#: What else ``genkernels.models`` offers: the classes to build models of one's own on.
_BASES = {
    "Model": "_model",
    "LikelihoodModel": "_model",
    "FlowModel": "flows.base",
    "PixelModel": "autoregressive.base",
    "AdversarialModel": "gan.base",
    "VariationalModel": "vae.base",
    "Player": "_model",
    "Estimate": "_model",
    "Preset": "_model",
}


class Registry(MutableMapping[str, type]):
    """Classes by name, each imported when it is first asked for; names alone import nothing.

    A model of one's own takes part in the command line, in ``config.json`` and in `build` once it is entered, for as
    long as the process lives::

        genkernels.models.MODELS["mine"] = Mine
        genkernels.models.MODELS["theirs"] = "their.module:Theirs"
    """

    def __init__(self, places: dict[str, str]) -> None:
        self._entries: dict[str, type | str] = dict(places)

    def __getitem__(self, name: str) -> type:
        entry = self._entries[name]
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            entry = self._entries[name] = getattr(importlib.import_module(module), attribute)
        return entry

    def __setitem__(self, name: str, entry: type | str) -> None:
        if not isinstance(entry, type) and not (isinstance(entry, str) and ":" in entry):
            raise TypeError(f"MODELS[{name!r}] must be a class or 'package.module:Class', got {entry!r}")
        self._entries[name] = entry

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:  # Mapping's own would import the class
        return name in self._entries

    def __repr__(self) -> str:
        return f"MODELS({', '.join(self)})"


MODELS = Registry({name: f"genkernels.models.{place}" for name, place in _LINES.items()})

#: Python name: where it is, of all that ``genkernels.models`` gives out when it is first named.
EXPORTS = {place.partition(":")[2]: f"genkernels.models.{place.partition(':')[0]}" for place in _LINES.values()}
EXPORTS |= {name: f"genkernels.models.{module}" for name, module in _BASES.items()}


def model_class(name: str) -> type:
    """The class of a command-line name.

    Raises:
        UsageError: there is none; names the nearest.
    """
    if name in MODELS:
        return MODELS[name]
    raise UsageError(f"unknown model {name!r}{nearest(name, MODELS)}")


def build(name: str, **hparams):
    """The model `name` with constructor arguments `hparams`, as a model's own ``hparams`` holds them.

    Equivalent to::

        genkernels.models.MODELS[name](**hparams)
    """
    return model_class(name)(**hparams)


def names_taking(data: str) -> list[str]:
    """Names of the models of ``images`` or of ``points``."""
    return [name for name, kind in MODELS.items() if data in getattr(kind, "takes", ())]


def names_of_domains(count: int) -> list[str]:
    """Names of the models whose data hold an image of each of so many domains."""
    return [name for name, kind in MODELS.items() if getattr(kind, "domains", 1) == count]


def hparams_of_format_1(name: str, hparams: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments as a ``config.json`` of format 1 told them, in today's names; today's stay as they are.

    The names of then were ``image_shape`` or ``features`` and ``data_levels`` of a flow, ``image_size``, ``channels``
    and ``levels`` of a model of pixels; a multi-scale flow's ``levels`` are ``scales``.
    """
    if name not in _LINES:
        return hparams
    old = dict(hparams)
    if "image_size" in old:
        facts = {"shape": (old.pop("channels"), *old.pop("image_size")), "grey_levels": old.pop("levels")}
    elif "image_shape" in old:
        features, shape, grey_levels = (old.pop(key) for key in ("features", "image_shape", "data_levels"))
        if shape is None:
            shape, grey_levels = (features,), None
        facts = {"shape": tuple(shape), "grey_levels": grey_levels}
        if "levels" in old:
            facts["scales"] = old.pop("levels")
    else:
        return hparams
    return facts | old
