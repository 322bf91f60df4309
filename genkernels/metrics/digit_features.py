"""Features of 8×8 digits, of a classifier small enough to be trained where it is needed."""

from __future__ import annotations

import copy
import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkernels._seeds import fixed_seed
from genkernels.ops import checks

EPOCHS, BATCH, LEARNING_RATE = 10, 64, 3e-3
NOISE = 0.15  # on the shades, so that scans that were trained on look like others


class DigitFeatures(nn.Module):
    """A classifier of `digits`: two convolutions, a hidden layer, whose 64 units are the features, ten logits.

    Shapes: x ``[N, 1, 8, 8]``, floats in [0, 1] or uint8 indices of the 17 grey levels. Features ``[N, 64]``. Logits
    ``[N, 10]``.

    Raises:
        ValueError: x has another shape, or leaves its range. TypeError: it has another dtype.
    """

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 64),
            nn.LeakyReLU(0.2),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.uint8 and not x.is_floating_point():
            raise TypeError(f"digit_features: x must be uint8 level indices or floats in [0, 1], got {x.dtype}")
        if x.dim() != 4 or x.shape[1:] != (1, 8, 8):
            raise ValueError(f"digit_features: x must be [N, 1, 8, 8], got {list(x.shape)}")
        shades = x / 16 if x.dtype == torch.uint8 else x
        if x.numel() and (shades.amin() < 0 or shades.amax() > 1):  # both false for NaN, whose features are NaN
            low, high = (bound.item() for bound in x.detach().aminmax())
            raise ValueError(
                f"digit_features: x must be uint8 level indices up to 16 or floats in [0, 1], got {x.dtype} from "
                f"{low:g} to {high:g}"
            )
        return self.body(shades.to(self.head.weight.dtype))

    def logits(self, x: Tensor) -> Tensor:
        """What the classifier says of x, ``[N, 10]``."""
        return self.head(self(x))


def digit_features(seed: int = 0) -> DigitFeatures:
    """A network that turns 8×8 digits into 64 features, for `frechet_distance` and `precision_recall`.

    It is trained on the 1,437 training scans of `digits`, which takes a second or two, on the CPU, once a process and
    seed: the same seed gives the same features on the same machine, and leaves torch's generators as they were.

    Args:
        seed: of the weights and of the order of the scans, 0 or more. Distances on features of different seeds do not
            compare.

    Returns:
        A `DigitFeatures` of its own, in evaluation mode, frozen: gradients pass through it to x. ``.to("cuda")`` for
        x there.

    Raises:
        DataError: scikit-learn, which ships the scans, is missing. ValueError: seed is no such integer.
    """
    checks.integer("digit_features", "seed", seed, 0)
    return copy.deepcopy(_trained(seed))


@functools.cache
def _trained(seed: int) -> DigitFeatures:
    from genkernels import data

    # whatever surrounds the first call: evaluation runs without gradients, perhaps in bf16
    with fixed_seed(seed), torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        x, y = data.load("digits").train.tensors
        x, network = x / 16, DigitFeatures()
        optimiser = torch.optim.Adam(network.parameters(), LEARNING_RATE)
        batches = [rows for _ in range(EPOCHS) for rows in torch.randperm(len(x)).split(BATCH)]
        decay = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, len(batches))
        for rows in batches:
            optimiser.zero_grad()
            noisy = x[rows] + NOISE * torch.randn_like(x[rows])
            logits = network.head(network.body(noisy))  # the noise leaves [0, 1]
            F.cross_entropy(logits, y[rows]).backward()
            optimiser.step()
            decay.step()
    return network.eval().requires_grad_(False)
