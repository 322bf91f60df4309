"""torch's own spectral norm, ``torch.nn.utils.parametrizations.spectral_norm``: the module that it puts upon a layer,
called with the weight as a tensor of the graph in the place of ``nn.Parameter``. Its vectors are ours, which it updates
in place, so that they go on from call to call as in training. In rows of weights alone what reaching a weight through
``layer.weight`` costs beside is left out; a pass runs the layers as they are, each of whose weights is asked for once,
so that ``parametrize.cached()`` would change nothing.

It takes a convolution's weight for a matrix: the rows whose norm is the convolution's own are not its own function.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils import parametrizations

from genkernels.benchmarks.cases.spectral_norm import LAYERS, RUNS, own_weights, put
from genkernels.benchmarks.peers import Adapter

PEERS = ("torch",)


def unsupported(peer: str, case) -> str:
    if case.settings["size"] is not None:
        return "takes the weight of a convolution for a matrix"
    return ""


def adapter(peer: str, settings: dict, direction: str, shape: list[int]) -> Adapter:
    layers: list[nn.Module] = []
    sets: dict[int, tuple] = {}  # by the first weight, which is kept beside what belongs to it
    kind = settings["layers"] or "critic"

    def given(tensors: tuple[Tensor, ...]) -> list[nn.Module]:
        """The layers, which are made once, with these weights, u and v."""
        weights = tensors[: len(tensors) // 3]
        if not layers:
            made = LAYERS[kind]([w.shape for w in weights])
            layers.extend(parametrizations.spectral_norm(layer).train() for layer in made)
        if id(weights[0]) not in sets:
            sets[id(weights[0])] = weights, own_weights(kind, weights), tensors[len(weights) :]
        put(layers, *sets[id(weights[0])][1:])
        return layers

    def normalised(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            layer.parametrizations["weight"][0](weight) for layer, weight in zip(given(tensors), tensors, strict=False)
        )

    if settings["layers"]:
        return Adapter(lambda x, *tensors: RUNS[kind](x, given(tensors)))
    return Adapter(normalised)
