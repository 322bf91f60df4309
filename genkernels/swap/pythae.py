"""pythae: the masked convolution of its PixelCNN."""

from __future__ import annotations

from pythae.models.normalizing_flows.pixelcnn import pixelcnn_model, utils
from torch import Tensor

from genkernels.swap._causal import Masked, mask_type
from genkernels.swap._rules import Becomes, Library, left_alone, stays


class MaskedConv2d(Masked, utils.MaskedConv2d):
    """pythae's ``MaskedConv2d``: dead taps are left out, and the weight is multiplied by no mask."""

    def forward(self, input: Tensor) -> Tensor:
        convolved = None if left_alone(self) else self._gk_convolved(input)
        return super().forward(input) if convolved is None else convolved


def _convolution(thing) -> Becomes | str:
    if mask_type(thing, thing.mask) is None:
        return "its mask, its padding or its groups are not those of a masked convolution here"
    return Becomes(MaskedConv2d)


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
