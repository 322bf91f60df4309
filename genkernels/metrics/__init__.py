"""How good a set of samples is: distances between two sets of examples, and what a set covers of another.

Sets are tensors, images ``[N, C, H, W]`` or points ``[N, D]``, and the numbers Python floats, computed in fp64, NaN
where an example is not finite. Nothing is downloaded. Two finite sets of one distribution are some distance apart: what
real examples give against other real ones is the mark for a model.

>>> import torch
>>> from genkernels import metrics
>>> x = torch.arange(6.0).view(3, 2)
>>> round(metrics.frechet_distance(x, x + torch.tensor([3.0, 4.0])), 6)
25.0
"""

from genkernels.metrics.digit_features import DigitFeatures, digit_features
from genkernels.metrics.frechet import frechet_distance
from genkernels.metrics.inception import InceptionScore, fid, inception_score
from genkernels.metrics.modes import Modes, modes
from genkernels.metrics.precision_recall import PrecisionRecall, precision_recall
from genkernels.metrics.sliced_wasserstein import sliced_wasserstein

__all__ = [
    "DigitFeatures",
    "InceptionScore",
    "Modes",
    "PrecisionRecall",
    "digit_features",
    "fid",
    "frechet_distance",
    "inception_score",
    "modes",
    "precision_recall",
    "sliced_wasserstein",
]
