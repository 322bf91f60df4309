"""What the layer tests share: layers in fp64 with non-trivial parameters, and log-determinants by brute force."""

from __future__ import annotations

import weakref
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from genkernels import nn as gnn


class Net(torch.nn.Module):
    """A small smooth network, any spatial rank, that also takes a context ``[N, 3]``."""

    def __init__(self, inputs: int, outputs: int, context: int = 0):
        super().__init__()
        self.first = torch.nn.Linear(inputs, 8)
        self.last = torch.nn.Linear(8, outputs)
        self.context = torch.nn.Linear(context, 8) if context else None

    def forward(self, x, context=None):
        h = self.first(x.movedim(1, -1))
        if context is not None:
            h = h + self.context(context).view(len(x), *[1] * (x.dim() - 2), 8)
        return self.last(torch.tanh(h)).movedim(-1, 1)


def perturb(module: torch.nn.Module, scale: float = 0.3, seed: int = 0) -> torch.nn.Module:
    """Moves every parameter off its start, so that zero-initialised layers are tested as something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return module


def glow_steps(channels: int, count: int, context: int = 0, **options) -> list[torch.nn.Module]:
    """ActNorm, 1×1 convolution, coupling, `count` times."""
    additive = options.get("additive", False)
    layers: list[torch.nn.Module] = []
    for i in range(count):
        net = Net(channels // 2, channels // 2 if additive else channels, context)
        coupling = gnn.AffineCoupling(net, flip=i % 2 == 1, **{"scale_map": "sigmoid", **options})
        layers += [gnn.ActNorm(channels), gnn.InvertibleConv1x1(channels), coupling]
    return layers


def brute_log_det(function, x: torch.Tensor) -> torch.Tensor:
    """log|det| of the Jacobian of ``function`` at each sample of x, by autograd and slogdet."""
    found = []
    for sample in x:
        jacobian = torch.autograd.functional.jacobian(lambda v: function(v.unsqueeze(0))[0].flatten(), sample)
        found.append(torch.linalg.slogdet(jacobian.reshape(sample.numel(), -1)).logabsdet)
    return torch.stack(found)


class Watch(TorchDispatchMode):
    """Counts operations by name, and the bytes of live storages that were made while it watched; `known` ones are
    older."""

    def __init__(self, *known: torch.Tensor):
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.live = self.peak = 0
        self._seen: set[int] = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls[func._schema.name] += 1
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._track(tensor.untyped_storage())
        return out

    def reads(self) -> list[str]:
        """Operations that make the host wait for the device."""
        waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")
        return [name for name in self.calls if name.split("::")[-1] in waits]

    def _track(self, storage):
        key = storage._cdata
        if key not in self._seen:
            self._seen.add(key)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, key, storage.nbytes())

    def _drop(self, key, size):
        self._seen.discard(key)
        self.live -= size
