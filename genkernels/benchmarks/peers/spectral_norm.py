"""torch's own spectral norm, ``torch.nn.utils.parametrizations.spectral_norm``: the module that it puts upon a layer,
called with the weight as a tensor of the graph in the place of ``nn.Parameter``. Its vectors are ours, which it updates
in place, so that they go on from call to call as in training. What reaching a weight through ``layer.weight`` costs
beside is left out.

It takes a convolution's weight for a matrix: the rows whose norm is the convolution's own are not its own function.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils import parametrizations

from genkernels.benchmarks.cases.spectral_norm import scores
from genkernels.benchmarks.peers import Adapter

PEERS = ("torch",)


def unsupported(peer: str, case) -> str:
    if case.settings["size"] is not None:
        return "takes the weight of a convolution for a matrix"
    return ""


def adapter(peer: str, settings: dict, direction: str, shape: list[int]) -> Adapter:
    norms: list[nn.Module] = []

    def normalised(*tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(tensors) // 3
        weights, u, v = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        norms.extend(_norm(weight) for weight in weights[len(norms) :])
        for norm, left, right in zip(norms, u, v, strict=True):
            norm._u, norm._v = left, right
        return tuple(norm(weight) for norm, weight in zip(norms, weights, strict=True))

    if settings["pass"]:
        return Adapter(lambda x, *tensors: scores(x, normalised(*tensors)))
    return Adapter(normalised)


def _norm(weight: Tensor) -> nn.Module:
    layer = nn.Linear(*weight.flatten(1).T.shape, bias=False)
    return parametrizations.spectral_norm(layer).parametrizations.weight[0].train()
