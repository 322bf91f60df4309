"""Augmentation of images inside a GAN's losses, differentiable, with a fixed or an adaptive probability."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from genkernels.nn._seen import enclosing_ddp
from genkernels.nn.dequantize import uniform
from genkernels.ops import checks

KINDS = 5  # brightness, saturation, contrast, translation, cutout: a coin each
VALUES = 7  # one each of the first three, two each of the others


class Augment(nn.Module):
    r"""Changes each image by itself, at random: its colours, its place, and a square of it is taken out.

    Real and generated images go through it alike on their way to the critic, and gradients of any order come back
    through it, so that a small data set is not learnt by heart and the samples do not look augmented. Five changes, in
    this order, each with probability p and independent of the others:

    - brightness, by up to a quarter of the range; saturation, times 0 to 2; contrast, times ½ to 1½;
    - translation, by up to a share of each side, whole pixels; what comes in is the middle of the range;
    - cutout: a rectangle, its centre anywhere in the image, becomes the middle of the range.

    In evaluation mode x is handed on as it is.

    Args:
        p: from 0 to 1. It is a buffer, which may be written to.
        colour: whether brightness, saturation (where there are several channels) and contrast change.
        translation: the farthest, as a share of height and of width, at most 1; 0: none.
        cutout: the rectangle's sides as a share of the image's, at most 1; 0: none.
        value_range: what black and white are, which sets how far brightness goes, and the middle; (0.0, 1.0) gives the
            same pictures in that range. Values may leave it, as the paper has it: nothing is clamped.

    Shapes: x ``[N, C, H, W]``, floats; what comes out has its shape and dtype. ``augment(x, generator)`` draws from the
    generator, 12 numbers an image whatever is switched on, or from torch's where it is None.

    Raises:
        ValueError: an option is out of range, or x has other dimensions. TypeError: x is no tensor of floats.

    Source: Zhao et al., "Differentiable augmentation for data-efficient GAN training", 2020.
    """

    def __init__(
        self,
        p: float = 1.0,
        colour: bool = True,
        translation: float = 0.125,
        cutout: float = 0.5,
        *,
        value_range: tuple[float, float] = (-1.0, 1.0),
    ):
        super().__init__()
        who = type(self).__name__
        for label, value in (("p", p), ("translation", translation), ("cutout", cutout)):
            _check_share(who, label, value)
        pair = isinstance(value_range, tuple | list) and len(value_range) == 2
        low, high = value_range if pair else (0.0, 0.0)
        if not low < high:
            raise ValueError(f"{who}: value_range must be two numbers that rise, got {value_range!r}")
        self.colour, self.translation, self.cutout = colour, translation, cutout
        self.value_range = (float(low), float(high))
        self.register_buffer("p", torch.tensor(float(p)))

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        checks.tensor("Augment", "x", x)
        if x.dim() != 4:
            raise ValueError(f"Augment: x must be [N, C, H, W], got {list(x.shape)}")
        if not self.training:
            return x
        drawn = uniform((len(x), KINDS + VALUES), torch.float32, x.device, generator)
        coins, values = (drawn[:, :KINDS] < self.p).unbind(1), drawn[:, KINDS:].unbind(1)
        if self.colour:
            x = self._recoloured(x, coins[:3], values[:3])
        gone = None
        if self.translation:
            x, gone = _moved(x, self.translation, coins[3], values[3:5])
        if self.cutout:
            cut = _rectangle(x, self.cutout, coins[4], values[5:])
            gone = cut if gone is None else gone | cut
        return x if gone is None else x.masked_fill(gone[:, None], sum(self.value_range) / 2)

    def extra_repr(self) -> str:
        return f"colour={self.colour}, translation={self.translation}, cutout={self.cutout}"

    def _recoloured(self, x: Tensor, coins: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> Tensor:
        """The three changes of colour at once: each is affine in x, its mean over the channels and its mean."""
        low, high = self.value_range
        brightness = torch.where(coins[0], (values[0] - 0.5) * ((high - low) / 2), 0.0)
        saturation = torch.where(coins[1], 2 * values[1], 1.0)
        contrast = torch.where(coins[2], values[2] + 0.5, 1.0)
        b, s, c = (t.to(x.dtype).view(-1, 1, 1, 1) for t in (brightness, saturation, contrast))
        # saturation leaves the image's mean as it is, so that contrast is taken about the mean of x
        offset = (1 - c) * x.mean((1, 2, 3), keepdim=True) + b
        if x.shape[1] == 1:
            return x * c + offset
        return x * (c * s) + (x.mean(1, keepdim=True) * (c * (1 - s)) + offset)


class AdaptiveAugment(Augment):
    r"""`Augment` with a probability that follows how far the critic is overfitting.

    The heuristic is :math:`r = E[\operatorname{sign} D(x_\text{real})]`: 0 where the critic cannot tell, 1 where it
    knows every real image. Every few updates p rises by a step where r is above its target, and falls by one where it
    is below. Neither an update nor a pass waits for the device; p and what was counted are buffers, which checkpoints
    keep. Several processes (``torch.distributed``) have one p, which follows the scores of all of them, or of the group
    in whose pass of ``DistributedDataParallel`` it is: each must call `update` as often as the others.

    Example::

        augment = gk.nn.AdaptiveAugment(images=50_000)
        real_scores, fake_scores = critic(augment(real)), critic(augment(fake))
        augment.update(real_scores)

    Args:
        target: of r, from −1 to 1.
        images: real images in which p goes from 0 to 1: 500,000 in the paper; fewer for a short training.
        every: updates from one step to the next.
        most: the largest p, from which on samples begin to look augmented.
        p: at the beginning. The others: as for `Augment`.

    Raises:
        ValueError: an option is out of range. TypeError: x is no tensor of floats; the module was cast to a half type,
            too coarse for the steps of p (under autocast it stays as it is).

    Source: Karras et al., "Training generative adversarial networks with limited data", 2020, §3.
    """

    def __init__(
        self,
        target: float = 0.6,
        images: int = 500_000,
        every: int = 4,
        most: float = 0.8,
        *,
        p: float = 0.0,
        colour: bool = True,
        translation: float = 0.125,
        cutout: float = 0.5,
        value_range: tuple[float, float] = (-1.0, 1.0),
    ):
        super().__init__(p, colour, translation, cutout, value_range=value_range)
        who = "AdaptiveAugment"
        if not isinstance(target, int | float) or not -1 <= target <= 1:
            raise ValueError(f"{who}: target must be a number from -1 to 1, got {target!r}")
        checks.integer(who, "images", images, 1)
        checks.integer(who, "every", every, 1)
        _check_share(who, "most", most)
        if p > most:
            raise ValueError(f"{who}: p must be at most {most}, the most that it may become, got {p}")
        self.target, self.images, self.every, self.most = target, images, every, most
        self.register_buffer("counted", torch.zeros(3))  # since the last step: Σ sign D(x), images, updates

    @torch.no_grad()
    def update(self, real_scores: Tensor) -> Tensor:
        """Takes in the critic's scores of a batch of augmented real images, and moves p where that is due.

        Args:
            real_scores: ``[N, ...]``, positive for what looks real; of a map of patches each counts.

        Returns:
            r of this batch, of several processes that of all their batches; a scalar without a graph, for the loss
            curves.
        """
        who = "AdaptiveAugment"
        checks.tensor(who, "real_scores", real_scores)
        if real_scores.dim() < 1 or not real_scores.numel():
            raise ValueError(f"{who}: real_scores must be [N, ...] of at least one, got {list(real_scores.shape)}")
        checks.tensor(who, "the module", self.p, (torch.float32, torch.float64))
        scores = real_scores.float()
        r = torch.where(scores.isnan(), scores, scores.sign()).mean()  # the sign of NaN is 0, to torch
        now = torch.stack([len(scores) * r, torch.full_like(r, len(scores))])
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            within = enclosing_ddp()
            dist.all_reduce(now, group=within.process_group if within else None)
        signs, seen, updates = self.counted.unbind()
        signs += now[0]
        seen += now[1]
        updates += 1
        due = updates >= self.every
        step = (signs / seen - self.target).sign() * (seen / self.images)
        # scores of NaN are no reason to lose p
        moved = (self.p + step.nan_to_num(0.0)).clamp(0, self.most)
        # as a vector: what compiled passes write to a single float64, torch (2.13) drops
        self.p.view(1).copy_(torch.where(due, moved, self.p))
        self.counted.masked_fill_(due, 0.0)
        return now[0] / now[1]

    def extra_repr(self) -> str:
        told = f"target={self.target}, images={self.images}, every={self.every}, most={self.most}"
        return f"{told}, {super().extra_repr()}"


def _check_share(who: str, label: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{who}: {label} must be a number from 0 to 1, got {value!r}")


def _moved(x: Tensor, share: float, coin: Tensor, values: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """x moved by whole pixels around its edges, and where ``[N, H, W]`` it came around them."""
    h, w = x.shape[2:]
    sources = []
    for side, value in zip((h, w), values, strict=True):
        reach = int(side * share + 0.5)
        shift = (_whole(value, 2 * reach + 1) - reach) * coin
        sources.append(torch.arange(side, device=x.device) - shift[:, None])  # [N, side]
    rows, columns = sources
    # each pixel is read once, so that the backward pass adds nothing to anything
    index = (rows % h * w)[:, :, None] + (columns % w)[:, None, :]
    moved = x.flatten(2).gather(2, index.flatten(1)[:, None].expand(-1, x.shape[1], -1)).view(x.shape)
    outside = ((rows < 0) | (rows >= h))[:, :, None] | ((columns < 0) | (columns >= w))[:, None, :]
    return moved, outside


def _rectangle(x: Tensor, share: float, coin: Tensor, values: tuple[Tensor, ...]) -> Tensor:
    """Where ``[N, H, W]`` a rectangle lies whose centre is anywhere in the image; nowhere without the coin."""
    spans = []
    for side, value in zip(x.shape[2:], values, strict=True):
        length = int(side * share + 0.5)
        first = _whole(value, side + 1 - length % 2) - length // 2
        place = torch.arange(side, device=x.device) - first[:, None]
        spans.append((place >= 0) & (place < length) & coin[:, None])
    return spans[0][:, :, None] & spans[1][:, None, :]


def _whole(value: Tensor, count: int) -> Tensor:
    """0 to count − 1, int64, of uniform numbers in [0, 1), whose product may be rounded up to count."""
    return (value * count).long().clamp(max=count - 1)
