r"""What a decoder's outputs say of a datum, :math:`p(x|z)`: Bernoulli, Gaussian, discretised logistic.

Each turns data into a *target* (drawn anew at each call where it is random), and rates it under many outputs at once.
Nothing here knows of latents, so that a decoder of any make may stand in front.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkernels import losses, ops
from genkernels._words import nearest
from genkernels.nn import Dequantize
from genkernels.nn._values import level_indices, readable
from genkernels.nn.dequantize import normal, uniform

#: Log-scales below count as this, with a gradient of 0: without it a density of points, or of pixels that never change,
#: grows without bound. That of `genkernels.ops.logistic_mixture_nll`.
LEAST_LOG_SCALE = -7.0
#: Of a channel, with which a decoder begins, in units of half the range of grey levels.
LEAST_DEVIATION = 0.01


class Likelihood(nn.Module):
    """p(x | z) of one kind of data.

    Args:
        model: its name, for errors.
        shape, grey_levels: as for `genkernels.models.Model`.

    Attributes:
        outputs: how many numbers a decoder gives, channels of an image or features of a point.
        unit: what a log-probability is told in: ``bits/dim`` where it is one of the image's own grey levels, so that it
            compares with a flow's and a PixelCNN's; ``nats`` where it is a density of real numbers, or the probability
            of other data than those given, binarised ones.
    """

    kind: ClassVar[str]
    outputs: int
    unit: str = "nats"

    def __init__(self, model: str, shape: tuple[int, ...], grey_levels: int | None):
        super().__init__()
        self.model, self.shape, self.grey_levels = model, shape, grey_levels

    def target(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Data as they are rated and as an encoder sees them, ``[N, *shape]`` floats; random for binarised and
        dequantised images."""
        raise NotImplementedError

    def shown(self, target: Tensor) -> Tensor:
        """A target as a picture: images with grey levels as floats in [0, 1]."""
        return target

    def start(self, x: Tensor, each_pixel: bool) -> Tensor | None:
        """Outputs that tell how data x lie, without regard to a latent: ``[outputs, *spatial]``, of each pixel where
        that is asked for, and ``[outputs, 1, 1]`` where it is not or one will do for all; None where it does not
        matter."""
        return None

    def log_prob(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Nats, ``[N, K]``, fp32 or wider: each target, ``[N, *shape]``, under K outputs ``[N, K, outputs, *spatial]``
        of a decoder."""
        raise NotImplementedError

    def mean(self, outputs: Tensor) -> Tensor:
        """E x, ``[N, *shape]``, images with grey levels as floats in [0, 1]."""
        raise NotImplementedError

    def draw(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """x, one for each of the outputs ``[N, outputs, *spatial]``."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"outputs={self.outputs}"

    def _marginals(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel of images as they are rated, ``[C]``; no channel is certain."""
        channels = self.target(x, torch.Generator().manual_seed(0)).transpose(0, 1).flatten(1)
        return channels.mean(1), channels.std(1, unbiased=False).clamp(min=LEAST_DEVIATION)

    def _refuse(self, condition: str, got) -> None:
        raise ValueError(f"{self.model}: likelihood {self.kind} needs {condition}, got {got}")

    def _wide(self, outputs: Tensor) -> Tensor:
        return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


class Bernoulli(Likelihood):
    r"""Each pixel is 1 with probability σ(output). Grey images are binarised anew at each call, a pixel being 1 with
    probability its grey level: then the best output is that level, and few images last longer. The encoder sees 0 and
    1: on a background of −1 each of Adam's steps would move a unit by as much as there are pixels.

    .. math:: \log p(x|z) = \sum_i x_i o_i - \mathrm{softplus}(o_i)

    Source: Salakhutdinov and Murray, "On the quantitative analysis of deep belief networks", 2008; Burda et al. 2016.
    """

    kind = "bernoulli"

    def __init__(self, model: str, shape: tuple[int, ...], grey_levels: int | None):
        super().__init__(model, shape, grey_levels)
        if len(shape) != 3:
            self._refuse("images, whose grey levels are probabilities", f"points of shape {shape}")
        self.outputs = shape[0]

    def target(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        p = self._probabilities(x)
        drawn = (uniform(p.shape, p.dtype, p.device, generator) < p).to(p.dtype)
        return torch.where(p.isnan(), p, drawn)  # what is no number is neither 0 nor 1

    def start(self, x: Tensor, each_pixel: bool) -> Tensor:
        mean = self._probabilities(x).double().mean(0)
        mean = mean if each_pixel else mean.mean((1, 2), keepdim=True)
        # half an example of either kind more: no pixel is certain from the start
        return torch.logit((mean * len(x) + 0.5) / (len(x) + 1)).float()

    def _probabilities(self, x: Tensor) -> Tensor:
        if self.grey_levels is None:
            if not x.is_floating_point():
                raise TypeError(f"{self.model}: x must be floats in [0, 1], without grey levels, got {x.dtype}")
            p = x
            if readable(x) and not (x.min() >= 0 and x.max() <= 1) and not x.isnan().any():
                self._refuse("pixels in [0, 1]", f"values from {float(x.min()):g} to {float(x.max()):g}")
        else:
            index = level_indices(self.model, x, self.grey_levels, "its binarisation has no gradient")
            p = index.to(torch.float32) / (self.grey_levels - 1)
        return p

    def log_prob(self, outputs: Tensor, target: Tensor) -> Tensor:
        outputs = self._wide(outputs)
        return (target.unsqueeze(1).to(outputs.dtype) * outputs - F.softplus(outputs)).flatten(2).sum(2)

    def mean(self, outputs: Tensor) -> Tensor:
        return outputs.sigmoid()

    def draw(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        p = self._wide(outputs).sigmoid()
        return torch.where(p.isnan(), p, (uniform(p.shape, p.dtype, p.device, generator) < p).to(p.dtype))


class Gaussian(Likelihood):
    r"""Each value has a mean and a log-scale of its own. Images with grey levels are dequantised uniformly and their
    density is in units where a level has width 1: on average over the noise a lower bound of the levels' probability,
    as a flow's.
    """

    kind = "gaussian"

    def __init__(self, model: str, shape: tuple[int, ...], grey_levels: int | None):
        super().__init__(model, shape, grey_levels)
        self.outputs = 2 * shape[0]
        self.dequantize = None if grey_levels is None else Dequantize(grey_levels)
        # from [-1, 1) to units of a level
        self.offset = 0.0 if grey_levels is None else math.prod(shape) * math.log(2 / grey_levels)
        self.unit = "nats" if grey_levels is None else "bits/dim"

    def target(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if self.dequantize is not None:
            return 2 * self.dequantize(x, generator=generator)[0] - 1
        if not x.is_floating_point():
            raise TypeError(f"{self.model}: x must be floating point, the data being continuous, got {x.dtype}")
        return x

    def start(self, x: Tensor, each_pixel: bool) -> Tensor | None:
        if len(self.shape) == 1:
            return None
        mean, deviation = self._marginals(x)
        return torch.cat([mean, deviation.log()]).view(-1, 1, 1)

    def log_prob(self, outputs: Tensor, target: Tensor) -> Tensor:
        mean, log_scale = self._split(outputs, 2)
        scaled = (target.unsqueeze(1).to(mean.dtype) - mean) * torch.exp(-log_scale)
        nats = -0.5 * scaled.square() - log_scale - 0.5 * math.log(2 * math.pi)
        return nats.flatten(2).sum(2) + self.offset

    def shown(self, target: Tensor) -> Tensor:
        return self._levels(target)

    def mean(self, outputs: Tensor) -> Tensor:
        return self._levels(self._split(outputs, 1)[0])

    def draw(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        mean, log_scale = self._split(outputs, 1)
        return self._levels(mean + log_scale.exp() * normal(mean.shape, mean.dtype, mean.device, generator))

    def _split(self, outputs: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        mean, log_scale = self._wide(outputs).chunk(2, dim)
        return mean, log_scale.clamp(min=LEAST_LOG_SCALE)

    def _levels(self, x: Tensor) -> Tensor:
        if self.grey_levels is None:
            return x
        level = (x + 1) * (self.grey_levels / 2) - 0.5  # a level's share of [-1, 1) has its middle there
        return (level / (self.grey_levels - 1)).clamp(0, 1)


class DiscretizedLogistic(Likelihood):
    """The probability of a pixel's grey level under a logistic distribution, whose tails the lowest and the highest
    take (`genkernels.ops.logistic_mixture_nll` with one component): of three channels each mean also depends linearly
    on the pixel's channels before it.

    Source: Kingma et al., "Improving variational inference with inverse autoregressive flow", 2016; Salimans et al.,
    "PixelCNN++", 2017.
    """

    kind = "logistic"
    unit = "bits/dim"

    def __init__(self, model: str, shape: tuple[int, ...], grey_levels: int | None):
        super().__init__(model, shape, grey_levels)
        if len(shape) != 3 or grey_levels is None:
            what = f"points of shape {shape}" if len(shape) != 3 else "grey_levels=None"
            self._refuse("images with grey levels", what)
        if shape[0] not in (1, 3):
            self._refuse("images of 1 or 3 channels", f"shape {shape}")
        self.outputs = 3 if shape[0] == 1 else 10

    def target(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        index = level_indices(self.model, x, self.grey_levels, "its probability has no gradient")
        return index.to(torch.float32) * (2 / (self.grey_levels - 1)) - 1

    def shown(self, target: Tensor) -> Tensor:
        return (target + 1) / 2

    def start(self, x: Tensor, each_pixel: bool) -> Tensor:
        mean, deviation = self._marginals(x)
        start = mean.new_zeros(self.outputs)  # the last of each channel: it hangs on no other
        start[1::3], start[2::3] = mean, (deviation * math.sqrt(3) / math.pi).log()
        return start.view(-1, 1, 1)

    def log_prob(self, outputs: Tensor, target: Tensor) -> Tensor:
        count, samples = outputs.shape[:2]
        target = target.unsqueeze(1).expand(-1, samples, *self.shape).flatten(0, 1)
        nats = -ops.logistic_mixture_nll(outputs.flatten(0, 1), target, levels=self.grey_levels)
        return nats.view(count, samples)

    def mean(self, outputs: Tensor) -> Tensor:
        # a logit, then of each channel its mean, its log-scale and its row of coefficients
        values = self._wide(outputs)[:, 1:]
        if self.shape[0] == 1:
            x = values[:, :1]
        else:
            (red, _, green_red), (green, _, blue_red), (blue, _, blue_green) = (
                values[:, 3 * i : 3 * i + 3].unbind(1) for i in range(3)
            )
            green = green + green_red.tanh() * red
            blue = blue + blue_red.tanh() * red + blue_green.tanh() * green
            x = torch.stack([red, green, blue], 1)
        return ((x + 1) / 2).clamp(0, 1)

    def draw(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        drawn = losses.sample_logistic_mixture(outputs, generator, levels=self.grey_levels, channels=self.shape[0])
        return (drawn + 1) / 2


LIKELIHOODS: dict[str, type[Likelihood]] = {kind.kind: kind for kind in (Bernoulli, Gaussian, DiscretizedLogistic)}


def likelihood(model: str, name: str | None, shape: tuple[int, ...], grey_levels: int | None) -> Likelihood:
    """The likelihood of a name; None: ``logistic`` of images with grey levels, where their channels allow it, else
    ``gaussian``.

    Raises:
        ValueError: there is none of the name (names the nearest), or it does not rate such data.
    """
    if name is None:
        name = "logistic" if len(shape) == 3 and grey_levels is not None and shape[0] in (1, 3) else "gaussian"
    if name not in LIKELIHOODS:
        hint = nearest(name, LIKELIHOODS, listed=True)
        raise ValueError(f"{model}: likelihood must be one of {', '.join(LIKELIHOODS)}, got {name!r}{hint}")
    return LIKELIHOODS[name](model, shape, grey_levels)
