"""Samples of earlier steps, which a critic is shown among those of today (Shrivastava 2017)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ImagePool(nn.Module):
    """Keeps up to `size` images; each that comes in goes out as it is or, once the pool is full and with probability
    1/2, takes the place of one drawn from it, which goes out instead.

    What it holds are buffers without a graph, so that a run that goes on has the pool that it had.

    Args:
        size: how many; 0 keeps none and gives back what it is given.
        shape: ``(C, H, W)`` of an image.

    Source: Shrivastava et al., "Learning from simulated and unsupervised images through adversarial training", 2017;
    the rule is that of Zhu et al., "Unpaired image-to-image translation", 2017.
    """

    def __init__(self, size: int, shape: tuple[int, ...]):
        super().__init__()
        self.size = size
        self.register_buffer("images", torch.zeros(size, *shape))
        self.register_buffer("held", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """``[N, C, H, W]`` in, as many out."""
        if not self.size:
            return images.detach()
        draws = torch.rand(len(images), 2, dtype=torch.float32)
        exchanged = draws[:, 0].lt(0.5).to(images.device)
        places = draws[:, 1].double().mul(self.size).long().to(images.device)
        given = [self._passed(*one) for one in zip(images.detach(), exchanged, places, strict=True)]
        return torch.stack(given) if given else images.detach()

    def _passed(self, image: Tensor, exchanged: Tensor, place: Tensor) -> Tensor:
        """What goes out for one image. The host waits for nothing, and a compiled pass holds it."""
        full = self.held >= self.size
        exchanged = exchanged & full
        place = torch.where(full, place, self.held).view(1)
        kept = self.images.index_select(0, place)
        self.images.index_copy_(0, place, torch.where(full & ~exchanged, kept, image.to(kept.dtype)))
        self.held.add_(~full)
        return torch.where(exchanged, kept[0].to(image.dtype), image)

    def extra_repr(self) -> str:
        return f"size={self.size}"
