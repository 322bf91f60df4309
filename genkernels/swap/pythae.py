"""pythae: the masked convolution of its PixelCNN."""

from __future__ import annotations

from pythae.models.normalizing_flows.pixelcnn import pixelcnn_model, utils

from genkernels.swap._causal import NO_MASK, Multiplied, mask_type
from genkernels.swap._rules import Becomes, Library, stays


class MaskedConv2d(Multiplied, utils.MaskedConv2d):
    """pythae's ``MaskedConv2d``."""


def _convolution(thing) -> Becomes | str:
    return NO_MASK if mask_type(thing, thing.mask) is None else Becomes(MaskedConv2d)


LIBRARY = Library(
    "pythae",
    ("0.1.2",),
    {
        utils.MaskedConv2d: _convolution,
        pixelcnn_model.PixelCNN: stays(
            "its convolutions are swapped one by one; pixels are drawn by PixelCNNSampler, which is no module"
        ),
    },
)
