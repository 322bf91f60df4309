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
        images, held = images.detach().clone(), int(self.held)
        draws = torch.rand(len(images), 2).tolist()
        for i, (chance, place) in enumerate(draws):
            if held < self.size:
                self.images[held] = images[i]
                held += 1
            elif chance < 0.5:
                k = int(place * self.size)
                kept = self.images[k].clone()
                self.images[k] = images[i]
                images[i] = kept
        self.held.fill_(held)
        return images

    def extra_repr(self) -> str:
        return f"size={self.size}"
