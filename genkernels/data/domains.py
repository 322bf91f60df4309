"""Two domains of images that nobody has paired, as one data set."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset


class Domains(Dataset):
    """Gives ``(uint8 [2C, H, W], 0)``: an image of the first domain and, in the channels behind it, one of the second.

    There are as many as the larger domain has images; the smaller one begins anew where it ends. That two images come
    together says nothing.

    Args:
        first, second: data sets that give ``(uint8 [C, H, W], label)``, of one shape.
    """

    def __init__(self, first: Dataset, second: Dataset):
        self.first, self.second = first, second

    def __len__(self) -> int:
        return max(len(self.first), len(self.second))

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        index = range(len(self))[index]
        images = [domain[index % len(domain)][0] for domain in (self.first, self.second)]
        return torch.cat(images), 0
