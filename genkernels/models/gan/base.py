"""What adversarial models share: the two players and their losses, latents, samples, how they are judged."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from genkernels import losses, metrics
from genkernels._config import TrainConfig
from genkernels.models._model import Estimate, Model, Player, Preset
from genkernels.nn import AdaptiveAugment, Augment
from genkernels.nn._modes import call_frozen, in_mode
from genkernels.nn._values import level_indices
from genkernels.nn.dequantize import normal

#: What training takes unless it is told otherwise.
LR = TrainConfig.lr
#: Directions along which samples and held-out examples are compared.
PROJECTIONS = 256


class AdversarialModel(Model):
    r"""A generator G(z), :math:`z \sim N(0, 1)`, and a critic D(x) whose scores are high where it takes x for real.

    In each step the critic moves on a batch and as many samples, and in every so many the generator after it. The
    networks see pixels in [-1, 1]. A step makes gradients for the player that moves, and none for the other.

    Args:
        generator: ``generator(z, y)``, z ``[N, latent]``, gives ``[N, *shape]``. critic: ``critic(x, y)`` gives one
            score each, ``[N, 1]``. y is None where the model has no classes.
        latent: size of z.
        loss: what both minimise, a kind of `genkernels.losses.critic_loss`; ``saturating`` is the generator's alone,
            and ``logistic`` the critic's with it.
        r1, r2: weights of the gradient penalties at the examples and at the samples, as for
            `genkernels.losses.critic_step`.
        n_critic: steps of the critic to one of the generator.
        augment: probability of each change of `genkernels.nn.Augment`, which examples and samples go through on their
            way to the critic, 0: none. Images only.
        adaptive: that probability is where `genkernels.nn.AdaptiveAugment` begins, for one more pass of the critic over
            the examples. Of losses for which a score of 0 is a critic that cannot tell.
        shape, grey_levels, num_classes: as for `Model`.
    """

    #: The critic's loss where it is not called as the generator's.
    _CRITIC_LOSS: ClassVar = {"saturating": "logistic"}

    def __init__(
        self,
        generator: nn.Module,
        critic: nn.Module,
        *,
        latent: int,
        loss: str,
        n_critic: int,
        shape: tuple[int, ...],
        r1: float = 0.0,
        r2: float = 0.0,
        augment: float = 0.0,
        adaptive: bool = False,
        grey_levels: int | None = None,
        num_classes: int | None = None,
    ):
        name = type(self).__name__
        for label, value in (("n_critic", n_critic), ("latent", latent)):
            if value < 1:
                raise ValueError(f"{name}: {label} must be at least 1, got {value}")
        if (augment or adaptive) and len(shape) == 1:
            raise ValueError(f"{name}: augment must be 0 for points, which are no images, got {augment}")
        super().__init__(shape, grey_levels, num_classes)
        self.augment: nn.Module | None = None
        if augment or adaptive:
            self.augment = AdaptiveAugment(p=augment) if adaptive else Augment(augment)
        self.generator, self.critic = generator, critic
        self.latent, self.n_critic, self.loss_kind, self.r1, self.r2 = latent, n_critic, loss, r1, r2

    # --- training -------------------------------------------------------------------------------------------------

    def players(self) -> dict[str, Player]:
        """The critic moves in every step, the generator after it in every `n_critic`-th; its weights are averaged."""
        return {"critic": Player(self.critic, averaged=False), "generator": Player(self.generator, every=self.n_critic)}

    def losses(self, player: str, x: Tensor, y: Tensor, step: int) -> dict[str, Tensor]:
        labels, real = self._labels(y, len(x)), self._scaled(x)
        if player == "generator":
            return self.generator_terms(real, labels)
        with torch.no_grad():
            # under autocast a sample is of a half type
            fake = self.generator(self._latents(len(real)), labels).to(real.dtype)
            real, fake = self._augmented(real), self._augmented(fake)
            if isinstance(self.augment, AdaptiveAugment):
                self.augment.update(self.critic(real, labels))
        return self.critic_terms(real, fake, labels, step)

    def critic_terms(self, real: Tensor, fake: Tensor, y: Tensor | None, step: int) -> dict[str, Tensor]:
        """The critic's loss on examples and as many samples of the same classes, both as the critic sees them: in the
        networks' range, augmented where the model augments."""
        kind = self._CRITIC_LOSS.get(self.loss_kind, self.loss_kind)
        terms = losses.critic_step(self.critic, real, fake, loss=kind, r1=self.r1, r2=self.r2, y=y, terms=True)
        unused = [name for name, weight in (("r1", self.r1), ("r2", self.r2)) if not weight]
        return {name: term for name, term in terms.items() if name not in unused}

    def generator_terms(self, real: Tensor, y: Tensor | None) -> dict[str, Tensor]:
        """The generator's loss on as many samples as there are examples; no gradient reaches the critic."""
        fake = call_frozen(self.critic, self._augmented(self.generator(self._latents(len(real)), y)), y)
        paired = call_frozen(self.critic, self._augmented(real), y) if self.loss_kind == "relativistic" else None
        return {"loss": losses.generator_loss(fake, kind=self.loss_kind, real_scores=paired)}

    # --- samples and judgement ------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self, n: int, temperature: float = 1.0, generator: torch.Generator | None = None, y: Tensor | int | None = None
    ) -> Tensor:
        """G(z) in evaluation mode, without a graph.

        Args:
            n: how many; 0 gives an empty tensor.
            temperature: standard deviation of z.
            generator: of z, on any device.
            y: class indices ``[n]``, or one for all; None draws them evenly where the model has classes.

        Returns:
            ``[n, *shape]``: images as floats in [0, 1], points and images without grey levels as they come.
        """
        self._check_sample(n, temperature, generator)
        labels = self._drawn_labels(y, n, generator)
        with in_mode(self, training=False):
            return self._shown(self.generator(temperature * self._latents(n, generator), labels))

    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor]], projections: int = PROJECTIONS) -> dict[str, Estimate]:
        """The sliced Wasserstein distance between the examples and as many samples, of the same classes where the model
        has any; of points that lie in clusters, one a class, also how many of these are found and the share of samples
        in them.

        Args:
            batches: ``(x, y)``. projections: random directions.
        """
        examples, labels, samples = [], [], []
        for x, y in batches:
            examples.append(self._shown(self._scaled(x)))
            labels.append(y)
            samples.append(self.sample(len(x), y=self._labels(y, len(x))))
        if not examples:
            return {"sliced_wasserstein": Estimate("sliced_wasserstein", "", math.nan, math.nan, 0)}
        real, fake, y = torch.cat(examples), torch.cat(samples), torch.cat(labels)
        distance = metrics.sliced_wasserstein(fake, real, projections)
        found = {"sliced_wasserstein": Estimate("sliced_wasserstein", "", distance, math.nan, len(real))}
        if len(self.shape) == 1 and (clusters := metrics.modes(fake, real, y)):
            for name, unit, value in (
                ("modes", f"of {clusters.count}", clusters.found),
                ("in_a_mode", "%", 100 * clusters.share),
            ):
                found[name] = Estimate(name, unit, value, math.nan, len(real), lower_is_better=False)
        return found

    def extra_repr(self) -> str:
        return f"loss={self.loss_kind}, n_critic={self.n_critic}"

    # --- helpers --------------------------------------------------------------------------------------------------

    def _latents(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return normal((n, self.latent), self._like.dtype, self._like.device, generator)

    def _augmented(self, x: Tensor) -> Tensor:
        return x if self.augment is None else self.augment(x)

    def _scaled(self, x: Tensor) -> Tensor:
        self._check_shape(x)
        return scaled(self, x)

    def _shown(self, x: Tensor) -> Tensor:
        return x if self.grey_levels is None else shown(x)


def scaled(model: Model, x: Tensor) -> Tensor:
    """Examples as the networks see them: grey levels in [-1, 1], real numbers as they are."""
    like = model._like
    if model.grey_levels is None:
        return x.to(like.device, like.dtype)
    instead = "the networks take values in [-1, 1] as they are"
    index = level_indices(type(model).__name__, x, model.grey_levels, instead)
    exact = index.to(like.device, torch.promote_types(like.dtype, torch.float32))
    return (exact * (2 / (model.grey_levels - 1)) - 1).to(like.dtype)


def shown(x: Tensor) -> Tensor:
    """Images of a network, in [-1, 1], as floats in [0, 1]."""
    return ((x + 1) / 2).clamp(0, 1)


def presets(
    sizes: dict[str, dict[str, Any]], *, lr: float, points_lr: float | None = None, **training
) -> dict[str, Preset]:
    """Sizes by name with one training for all: gradients as they are and the step size from the first step on, as all
    papers of this family have it. ``points`` is another name of ``ring2d``, by which points of any set find it.

    Args:
        sizes: constructor arguments by preset.
        lr: of the paper. points_lr: of ``ring2d``, whose networks are small, None: the same.
        **training: further fields of `TrainConfig`.
    """
    found = {}
    for name, size in sizes.items():
        rate = points_lr if points_lr is not None and len(size["shape"]) == 1 else lr
        found[name] = Preset(size, {"clip": 0.0, "warmup": 0, **({} if rate == LR else {"lr": rate}), **training})
    return found | ({"points": found["ring2d"]} if "ring2d" in found else {})
