"""FID and the Inception score, on a network whose weights the user brings: nothing is downloaded."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from genkernels._words import UsageError
from genkernels.metrics._sets import all_finite, flattened, rows
from genkernels.metrics.frechet import frechet_distance
from genkernels.ops import checks


class InceptionScore(NamedTuple):
    """Its mean over the splits of a set, 1 to the number of classes, and their standard deviation."""

    mean: float
    spread: float


def fid(real: Tensor, fake: Tensor, weights: str | os.PathLike, *, batch_size: int = 64) -> float:
    """The Fréchet distance on the 2,048 features of Inception-v3, by torchmetrics' network.

    Equivalent to::

        frechet_distance(real, fake, NoTrainInceptionV3("inception-v3-compat", ["2048"], weights))

    Args:
        real: images ``[N, 1 or 3, H, W]``, floats in [0, 1] or bytes, 0 to 255. fake: ``[M, 1 or 3, H, W]``. They are
            resized to 299×299 by the network; papers take N = M = 50,000.
        weights: the file with the network's weights, ``pt_inception-2015-12-05-6726825d.pth`` as torch-fidelity has it.
        batch_size: of the network's calls.

    Returns:
        FID, NaN where a value is not finite.

    Raises:
        UsageError: torchmetrics or torch-fidelity is missing, or there is no such file. ValueError: images have another
            shape, floats leave [0, 1], or a set has less than two examples. TypeError: images are neither floats nor
            bytes, or only one set is of bytes.

    Source: Heusel et al., "GANs trained by a two time-scale update rule", 2017.
    """
    flattened("fid", {"real": real, "fake": fake}, least=2)
    if not all_finite(real, fake):
        return math.nan
    network = _inception("fid", "2048", weights).to(real.device)
    return frechet_distance(real, fake, lambda x: network(_bytes("fid", x)), batch_size=batch_size)


@torch.no_grad()
def inception_score(
    x: Tensor, network: str | os.PathLike | Callable[[Tensor], Tensor], splits: int = 10, *, batch_size: int = 64
) -> InceptionScore:
    r"""How sure a classifier is of each sample, and how many classes they share out among them.

    .. math:: \exp\Big(\frac1N \sum_i KL\big(p(y|x_i)\,\|\,\bar p(y)\big)\Big)

    Args:
        x: images ``[N, 1 or 3, H, W]``, floats in [0, 1] or bytes, 0 to 255.
        network: the file with Inception-v3's weights, as for `fid`; or a classifier of one's own, which gives logits
            ``[n, classes]`` for a batch of x as it is: ``genkernels.metrics.digit_features().logits`` for digits.
        splits: parts of x, in its order, each scored by itself; N at least.
        batch_size: of the network's calls.

    Returns:
        `InceptionScore`: mean and standard deviation (of the splits taken for all there are, as the paper's code does),
        NaN where a logit is not finite.

    Raises:
        UsageError: torchmetrics or torch-fidelity is missing, or there is no such file. ValueError: fewer examples than
            splits, an option out of range, `network` gives something else than a row of logits an example, and of
            images for Inception as for `fid`. TypeError: x is no tensor of numbers.

    Source: Salimans et al., "Improved techniques for training GANs", 2016.
    """
    who = "inception_score"
    checks.integer(who, "splits", splits, 1)
    checks.integer(who, "batch_size", batch_size, 1)
    flattened(who, {"x": x}, least=splits)
    if not all_finite(x):
        return InceptionScore(math.nan, math.nan)
    if callable(network):
        logits = rows(who, "network", network, x, batch_size)
    else:
        inception = _inception(who, "logits_unbiased", network).to(x.device)
        logits = rows(who, "network", lambda some: inception(_bytes(who, some)), x, batch_size)
    log_p = logits.double().log_softmax(1)
    scores = torch.stack([_score(part) for part in log_p.tensor_split(splits)])
    return InceptionScore(scores.mean().item(), scores.std(unbiased=False).item())


def _score(log_p: Tensor) -> Tensor:
    """exp of the mean divergence of the rows from their mean, which is their mutual information with the class."""
    log_mean = log_p.logsumexp(0) - math.log(len(log_p))
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_mean), p).sum(1).mean().exp()  # 0 ln 0 is 0, NaN stays


def _inception(who: str, layer: str, weights: str | os.PathLike) -> nn.Module:
    for package in ("torch_fidelity", "torchmetrics"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            name = package.replace("_", "-")
            raise UsageError(
                f"{who}: this needs {name}, which cannot be imported here ({error}): pip install 'torchmetrics[image]'"
            ) from error
    from torchmetrics.image.fid import NoTrainInceptionV3

    path = Path(weights).expanduser()
    if not path.is_file():
        raise UsageError(f"{who}: weights must be the file of Inception-v3's weights, got {str(path)!r}: no such file")
    return NoTrainInceptionV3("inception-v3-compat", [layer], str(path))


def _bytes(who: str, x: Tensor) -> Tensor:
    """Images as the network takes them, three channels of bytes."""
    if x.dim() != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"{who}: images must be [N, 1 or 3, H, W], got {list(x.shape)}")
    if x.is_floating_point():
        low, high = (bound.item() for bound in x.aminmax())
        if low < 0 or high > 1:
            raise ValueError(f"{who}: images must be floats in [0, 1] or bytes, got values from {low:g} to {high:g}")
        x = (x * 255).round().to(torch.uint8)
    elif x.dtype != torch.uint8:
        raise TypeError(f"{who}: images must be floats in [0, 1] or bytes, got {x.dtype}")
    return x.expand(-1, 3, -1, -1)
