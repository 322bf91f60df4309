"""`photos32`, `photos64`, `two_photos32`: crops of the two photographs that scikit-learn ships, a temple and a flower,
427×640×3.

Of each photograph a vertical stripe of 128 columns is held out. The two parts are cut apart before anything
is drawn: a training set holds no pixel of a stripe and no crop straddles an edge. Crop i of a part is number
h(seed, i) of all crops that fit, with h the SplitMix64 sequence (Steele, Lea and Flood 2014): a function of
seed and index alone, the same on every machine, so that a resumed run sees what the unbroken one would have
seen.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from genkernels.data.bundle import DataBundle, make_bundle
from genkernels.data.domains import Domains
from genkernels.data.spec import require
from genkernels.data.split import derived_seed, splitmix64

# Of the stripes on a 64-column grid, those nearest their whole photograph in mean colour; their mean
# gradients along x are near it too (13.3 of 14.2, 2.6 of 3.0). A part that is all sky would measure little.
STRIPES = {"china.jpg": (512, 640), "flower.jpg": (384, 512)}
TRAIN, TEST = 50_000, 2_000  # nominal lengths: 368,676 training crops of 32×32 exist, mirror images apart


class PhotoCrops(Dataset):
    """Square crops of a few strips of photographs; gives ``(uint8 [3, size, size], 0)``.

    Attributes:
        crops: int32 ``[length, 4]``: photograph, top, left (in the photograph's own pixels), mirrored.
        strips: for each strip its photograph, its first column there, and its pixels uint8 ``[3, H, W]``.
    """

    def __init__(self, strips: list[tuple[int, int, Tensor]], size: int, length: int, start: int, mirror: bool):
        """Choose the crops; `start` is the state from which SplitMix64 counts."""
        self.strips, self.size = strips, size
        rows = np.array([pixels.shape[1] - size + 1 for _, _, pixels in strips])
        columns = np.array([pixels.shape[2] - size + 1 for _, _, pixels in strips])
        ends = np.cumsum(rows * columns)
        draws = splitmix64(start, length)
        number = (draws >> np.uint64(1)).astype(np.int64) % ends[-1]  # bit 0 is left for the mirror
        strip = np.searchsorted(ends, number, side="right")
        number -= (ends - rows * columns)[strip]
        photo = np.array([photo for photo, _, _ in strips])[strip]
        first = np.array([first for _, first, _ in strips])[strip]
        mirrored = (draws & np.uint64(1)).astype(np.int64) * mirror
        columns = columns[strip]
        top, left = number // columns, first + number % columns
        self.crops = np.stack([photo, top, left, mirrored], axis=1).astype(np.int32)
        self._strip = strip.astype(np.int32)

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        _, top, left, mirrored = self.crops[index].tolist()
        _, first, pixels = self.strips[self._strip[index]]
        crop = pixels[:, top : top + self.size, left - first : left - first + self.size]
        return (crop.flip(-1) if mirrored else crop.clone()), 0


def load(spec: str, size: int, seed: int) -> DataBundle:
    """50,000 training crops (half of them mirrored) and 2,000 held-out crops of size×size."""
    parts = _crops(_photographs(spec), size, seed, "photos")
    what = f"{size}x{size} crops of two photographs, a stripe of each held out"
    return make_bundle(spec, what, parts, (3, size, size), grey_levels=256)


def load_domains(spec: str, size: int, seed: int) -> DataBundle:
    """As many crops of the temple and of the flower, as two domains: one of each in a datum."""
    photos = _photographs(spec)
    both = [_crops({name: pixels}, size, seed, f"photos/{name}") for name, pixels in photos.items()]
    parts = [Domains(*domains) for domains in zip(*both, strict=True)]
    what = f"{size}x{size} crops of two photographs as two domains, a stripe of each held out"
    return make_bundle(spec, what, parts, (6, size, size), grey_levels=256, domains=2)


def _crops(photos: dict[str, Tensor], size: int, seed: int, stream: str) -> list[PhotoCrops]:
    """Crops to train on, and held-out ones; `stream` names the random numbers that place them."""
    train, test = [], []
    for i, (name, pixels) in enumerate(photos.items()):
        low, high = STRIPES[name]
        test.append((i, low, pixels[:, :, low:high].clone()))
        for a, b in ((0, low), (high, pixels.shape[2])):
            if b - a >= size:
                train.append((i, a, pixels[:, :, a:b].clone()))
    return [
        PhotoCrops(train, size, TRAIN, derived_seed(stream, size, "train", seed), mirror=True),
        PhotoCrops(test, size, TEST, derived_seed(stream, size, "test", seed), mirror=False),
    ]


def _photographs(spec: str) -> dict[str, Tensor]:
    """Name to pixels, uint8 [3, 427, 640]."""
    datasets = require(spec, "sklearn.datasets", "scikit-learn")
    require(spec, "PIL.Image", "pillow")  # scikit-learn decodes with it
    return {name: torch.from_numpy(datasets.load_sample_image(name).transpose(2, 0, 1).copy()) for name in STRIPES}
