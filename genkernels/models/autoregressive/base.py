"""What the PixelCNN family shares: the likelihood of integer images, cached sampling, in-painting."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkernels import losses, ops
from genkernels._options import Head
from genkernels.models._model import LikelihoodModel
from genkernels.networks._plain import defined_together, plain
from genkernels.nn import MaskedConv2d
from genkernels.nn._modes import in_mode
from genkernels.nn._values import level_indices, readable
from genkernels.nn.dequantize import uniform
from genkernels.ops.autoregressive_sampling import HEADS
from genkernels.reference.autoregressive_sampling import draw_rows


class PixelModel(LikelihoodModel):
    r"""A product of conditionals over the pixels in raster order, the channels of a pixel in their own order.

    .. math:: p(x) = \prod_i p(x_i \mid x_1, \dots, x_{i-1}, y)

    Subclasses define `forward` and `stages`, which tell the same network twice: for a whole image, and for the sampler
    that computes one column of each layer at a pixel.

    Args:
        shape: ``(C, H, W)``. grey_levels: how many values a pixel can take. num_classes: None where labels play no
            part.
        head: what the network's last layer parametrises, ``categorical`` or ``logistic_mixture``. mixtures: logistics
            of the latter.

    Attributes:
        outputs: channels of the network's last layer.
        data_channels: how the masks split channels, as for `MaskedConv2d`.
    """

    takes = ("images",)

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        grey_levels: int = 256,
        num_classes: int | None = None,
        head: str = "categorical",
        mixtures: int = 0,
    ):
        name, channels = type(self).__name__, shape[0]
        if head not in HEADS:
            raise ValueError(f"{name}: head must be one of {', '.join(HEADS)}, got {head!r}")
        if head == "logistic_mixture" and channels not in (1, 3):
            raise ValueError(f"{name}: head logistic_mixture needs 1 or 3 channels, got {channels}")
        if head == "logistic_mixture" and mixtures < 1:
            raise ValueError(f"{name}: mixtures must be at least 1, got {mixtures}")
        super().__init__(shape, grey_levels, num_classes)
        self.head = head
        # a mixture's coefficients tie a pixel's channels together, so its network sees none of them
        self.data_channels = channels if head == "categorical" else 1
        self.outputs = channels * grey_levels if head == "categorical" else mixtures * (3 if channels == 1 else 10)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Head parameters of every pixel, each from the pixels before it.

        Args:
            x: ``[N, C, H, W]`` in [-1, 1]. y: ``[N]`` class indices, where the model has classes.

        Returns:
            ``[N, C*grey_levels, H, W]`` logits, those of channel c being block c; or the mixture's ``[N, 3K or 10K, H,
            W]``.
        """
        raise NotImplementedError

    def stages(self, y: Tensor | None = None) -> list[ops.Stage]:
        """The network as the sampler takes it, for labels y ``[N]``."""
        raise NotImplementedError

    # --- likelihood -----------------------------------------------------------------------------------------------

    def log_prob(self, x: Tensor, y: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Log-probability of integer images ``[N]``, nats; exact.

        Args:
            x: ``[N, C, H, W]`` uint8 level indices or floats in [0, 1]. y: ``[N]`` class indices, where the model has
                classes.
            generator: not used: nothing is drawn.

        Raises:
            ValueError: a shape, a grey level (on the CPU) or a missing y. TypeError: integers other than uint8.
        """
        index = self._index(x)
        scaled = self._scaled(index)
        params = self.forward(scaled, self._labels(y, len(x)))
        if self.head == "logistic_mixture":
            # a half type rounds the levels beyond its 256 (bf16) or 2,048 (fp16) together: the loss asks for them in
            # fp32
            exact = self._scaled(index, torch.promote_types(self._like.dtype, torch.float32))
            return -losses.discretized_logistic_mixture_nll(params, exact, self.grey_levels)
        logits = params.unflatten(1, (self.shape[0], self.grey_levels)).flatten(0, 1)  # each channel as an image
        nats = _cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), index.flatten(0, 1))
        return -nats.view(index.shape).sum((1, 2, 3))

    # --- sampling -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        n: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        y: Tensor | int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Draws from the model, one column of each layer a pixel; no graph is kept and the training mode stays as it
        is.

        Args:
            n: how many; 0 gives an empty tensor.
            temperature: divides the logits (of the mixture too, whose logistic noise it multiplies); 0 takes the mode
                of each pixel in turn.
            generator: of everything random, on any device; the same state gives the same sample on every backend.
            y: class indices ``[n]``, or one for all; None draws them evenly where the model has classes.
            progress: called as ``progress(rows_done, rows)`` after each row of pixels.

        Returns:
            ``[n, C, H, W]``, floats in [0, 1] at exact levels ``k/(grey_levels - 1)``; NaN throughout where a weight is
            not finite.
        """
        self._check_sample(n, temperature, generator)
        return self._draw(n, None, None, temperature, generator, self._drawn_labels(y, n, generator), progress)

    @torch.no_grad()
    def inpaint(
        self,
        x: Tensor,
        known: Tensor,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        y: Tensor | int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Draws the unknown values of images, each given the values before it in raster order; known values stay bit
        for bit.

        A value that is known but comes later has no say in what is drawn before it: keep the top of an image, not its
        bottom.

        Args:
            x: ``[N, C, H, W]`` uint8 level indices or floats in [0, 1]; unknown values may hold anything.
            known: bool, broadcastable to x's shape; three dimensions are ``[C, H, W]``, and refused where they may be
                meant for N pictures. The others: as for `sample`.

        Returns:
            ``[N, C, H, W]`` as x, uint8 or floats; what was drawn lies at exact levels.

        Raises:
            ValueError: a shape, or a known value that is no grey level (on the CPU); x is uint8, which cannot hold NaN,
                and a weight is not finite. TypeError: known is not bool.
        """
        name = type(self).__name__
        self._check_shape(x)
        self._check_sample(len(x), temperature, generator)
        if not isinstance(known, Tensor) or known.dtype != torch.bool:
            got = known.dtype if isinstance(known, Tensor) else type(known).__name__
            raise TypeError(f"{name}: known must be a bool tensor, True where a value is kept, got {got}")
        if known.dim() == 3 and len(known) == len(x) > 1:
            raise ValueError(
                f"{name}: known must have four dimensions where three may be meant for {len(x)} pictures or for their "
                f"channels, got {list(known.shape)}: known[:, None] or known[None]"
            )
        try:
            known = known.to(x.device).expand(x.shape)
        except RuntimeError:
            raise ValueError(
                f"{name}: known must be broadcastable to x's shape {list(x.shape)}, got {list(known.shape)}"
            ) from None
        index = self._index(x.masked_fill(~known, 0))
        drawn = self._draw(
            len(x), index, known, temperature, generator, self._drawn_labels(y, len(x), generator), progress
        )
        if x.dtype == torch.uint8:
            if drawn.isnan().any():
                raise ValueError(f"{name}: every weight must be finite, got one that is not")
            drawn = (drawn * (self.grey_levels - 1)).round()
        return torch.where(known, x, drawn.to(x.device, x.dtype))

    def _draw(self, n, image, known, temperature, generator, labels, progress) -> Tensor:
        channels, height, width = self.shape
        extra = 1 if self.head == "logistic_mixture" else 0
        like = self._like
        noise = uniform(
            (n, channels + extra, height, width), torch.promote_types(like.dtype, torch.float32), like.device, generator
        )
        if self._as_written():
            stages = self.stages(labels)
            index = ops.autoregressive_sampling(
                stages,
                noise,
                levels=self.grey_levels,
                head=self.head,
                image=image,
                known=known,
                temperature=temperature,
                progress=progress,
                rows_per_call=None if progress is None else 1,
            )
            weights = [w for s in stages for w in (*(w for _, w in s.inputs), s.bias, s.condition) if w is not None]
        else:
            index = self._draw_by_calls(image, known, noise, temperature, labels, progress)
            weights = list(self.parameters())
        # a level cannot say that it was drawn from NaN: 0 times the weights does
        return index.to(noise.dtype) / (self.grey_levels - 1) + sum((0 * w).sum() for w in weights)

    # --- helpers --------------------------------------------------------------------------------------------------

    def _as_written(self) -> bool:
        """Whether `stages` tells the network that `forward` runs: nothing hangs on a layer or stands in its place."""
        if not defined_together(type(self), "stages", "forward") or "forward" in self.__dict__:
            return False
        return all(_tells_itself(layer) for layer in self.modules() if layer is not self)

    def _draw_by_calls(self, image, known, noise, temperature, labels, progress) -> Tensor:
        """The definition: the whole network, called for every value."""
        n, _, height, width = noise.shape
        drawn = torch.zeros(n, *self.shape, dtype=torch.int64, device=noise.device)
        if image is not None:
            drawn = torch.where(known, image, drawn).to(noise.device)
            known = known.to(noise.device)

        def network(x: Tensor) -> Tensor:
            return self.forward(x.to(self._like.dtype), labels).to(noise.dtype)

        head = Head[self.head.upper()]
        with in_mode(self, training=False):  # a sample is of the whole network
            for row in range(height):
                draw_rows(network, drawn, noise, known, head, self.grey_levels, temperature, row, row + 1)
                if progress is not None:
                    progress(row + 1, height)
        return drawn

    def _scaled(self, index: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Levels in [-1, 1], in the model's dtype unless another is asked for; rounded once."""
        dtype = self._like.dtype if dtype is None else dtype
        exact = index.to(self._like.device, torch.promote_types(dtype, torch.float32))
        return (exact * (2 / (self.grey_levels - 1)) - 1).to(dtype)

    def _index(self, x: Tensor) -> Tensor:
        """int64 level indices, on the model's device."""
        name = type(self).__name__
        self._check_shape(x)
        index = level_indices(name, x, self.grey_levels, "model(x) takes values in [-1, 1] as they are")
        if x.is_floating_point() and readable(x) and index.isnan().any():
            raise ValueError(f"{name}: x must hold floats in [0, 1], got NaN, which is no grey level")
        return index.to(self._like.device, torch.int64)


def _tells_itself(layer: nn.Module) -> bool:
    if hasattr(layer, "stages"):
        return plain(layer, type(layer)) and defined_together(type(layer), "stages", "forward")
    return any(plain(layer, kind) for kind in (MaskedConv2d, nn.Conv2d, Classes, nn.Dropout2d, nn.ModuleList))


def _cross_entropy(logits: Tensor, index: Tensor) -> Tensor:
    """``[N, H, W]`` nats, of logits ``[N, levels, H, W]``.

    A compiled pass has it in operations of which Inductor makes vector code: ``cross_entropy``'s gradient comes out of
    it several times slower than torch's own kernel.
    """
    if not torch.compiler.is_compiling():
        return F.cross_entropy(logits, index, reduction="none")
    shifted = logits - logits.detach().amax(1, keepdim=True)
    return shifted.exp().sum(1).log() - shifted.gather(1, index.unsqueeze(1)).squeeze(1)


class Classes(nn.Embedding):
    """What a class adds to a layer's pre-activations, ``[N, channels]``; zero at the start."""

    def __init__(self, num_classes: int, channels: int):
        super().__init__(num_classes, channels)
        nn.init.zeros_(self.weight)


def class_bias(classes: nn.Module | None, y: Tensor | None) -> Tensor | None:
    return None if classes is None else classes(y)


def check_width(name: str, width: int, data_channels: int) -> None:
    if width < 1 or width % data_channels:
        raise ValueError(f"{name}: width must be a positive multiple of the {data_channels} channels, got {width}")
