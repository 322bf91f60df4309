"""Models of discrete images, one value after the other, with an exact likelihood."""

from genkernels.models.autoregressive.base import PixelModel
from genkernels.models.autoregressive.gated import GatedPixelCNN
from genkernels.models.autoregressive.pixelcnn import PixelCNN

__all__ = ["GatedPixelCNN", "PixelCNN", "PixelModel"]
