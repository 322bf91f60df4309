"""What stands for a generator within a compiled pass, which can hold none."""

from __future__ import annotations

import torch
from torch import Tensor

from genkernels._seeds import derive_seed
from genkernels.ops._operator import in_graph


class Stream:
    """Draws what ``torch.Generator(device).manual_seed(derive_seed(seed, part))`` would. Its state is a tensor on
    the CPU, as `seed` may be."""

    def __init__(self, seed: Tensor | int, part: int, device: torch.device):
        self.device = device
        seed = seed if isinstance(seed, Tensor) else torch.tensor(seed)
        self._state = torch.ops.genkernels.stream_begun(seed, part, device)

    def normal(self, shape, dtype: torch.dtype) -> Tensor:
        """As ``torch.randn(shape, generator=…)``."""
        drawn, self._state = torch.ops.genkernels.stream_normal(self._state, shape, dtype, self.device)
        return drawn


def again(seed: Tensor, after: Tensor) -> Tensor:
    """The same seed, of which a compiler knows nothing before `after` is there: what is drawn from it is computed then
    once more, not kept until then."""
    return torch.ops.genkernels.stream_again(seed, after)


def _begun(seed, part, device):
    return torch.Generator(device).manual_seed(derive_seed(int(seed), part)).get_state()


def _fake_begun(seed, part, device):
    return seed.new_empty(torch.Generator(device).get_state().shape, dtype=torch.uint8)


def _normal(state, size, dtype, device):
    generator = torch.Generator(device)
    generator.set_state(state)
    drawn = torch.randn(size, dtype=dtype, device=device, generator=generator)
    return drawn, generator.get_state()


def _fake_normal(state, size, dtype, device):
    return torch.empty(size, dtype=dtype, device=device), torch.empty_like(state)


in_graph(
    "stream_again(Tensor seed, Tensor after) -> Tensor", lambda seed, _: seed.clone(), lambda seed, _: seed.clone()
)
in_graph("stream_begun(Tensor seed, int part, Device device) -> Tensor", _begun, _fake_begun)
in_graph(
    "stream_normal(Tensor state, SymInt[] size, ScalarType dtype, Device device) -> (Tensor, Tensor)",
    _normal,
    _fake_normal,
)
