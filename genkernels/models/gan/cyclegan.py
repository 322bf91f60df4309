"""CycleGAN: two domains of images without pairs, and a generator from each to the other (Zhu 2017)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from genkernels import losses, metrics
from genkernels.models._model import Estimate, Model, Player
from genkernels.models.gan.base import PROJECTIONS, presets, scaled, shown
from genkernels.models.gan.image_pool import ImagePool
from genkernels.models.gan.translators import patch_critic, translator
from genkernels.nn._modes import call_frozen, in_mode

_SIZES = {
    "two_photos32": {"shape": (6, 32, 32), "width": 32, "blocks": 3},
    "cyclegan256": {"shape": (6, 256, 256), "width": 64, "blocks": 9},
}


class CycleGAN(Model):
    r"""A generator G from A to B, one F back, and a critic of each domain. With least-squares losses for the critics,
    the generators minimise

    .. math:: (D_B(G(a)) - 1)^2 + (D_A(F(b)) - 1)^2 + \lambda\,(|F(G(a)) - a| + |G(F(b)) - b|)

    and, with `identity` ι, :math:`\lambda\iota\,(|G(b) - b| + |F(a) - a|)`, which keeps the tint of an image that is of
    the other domain already. :math:`|\cdot|` is the mean over the values of an image.

    A datum holds an image of each domain, A's channels before B's: data of two domains, ``--data folder:A,B`` or
    ``two_photos32``, give them that way, the two in no relation.

    Args:
        shape: ``(2C, H, W)``, height and width at least 4.
        width: channels of the generators at full resolution and of the critics' first layer. blocks: residual blocks of
            a generator.
        cycle: λ. identity: ι, 0 leaves the term out.
        pool: how many earlier samples a critic may be shown again.
        grey_levels: how many values a pixel can take.
        num_classes: None: labels play no part.

    Source: Zhu et al., "Unpaired image-to-image translation using cycle-consistent adversarial networks", 2017, whose
    networks at 256×256, λ = 10, pool of 50, batches of one, and Adam at 2e-4 with β₁ = 0.5, constant for half of the
    run and then straight down to 0, are the preset ``cyclegan256``. Smaller images are halved less often.
    """

    takes: ClassVar[tuple[str, ...]] = ("images",)
    domains: ClassVar[int] = 2
    has_prior: ClassVar[bool] = False
    presets: ClassVar = presets(_SIZES, lr=2e-4, betas=(0.5, 0.999), batch_size=1, schedule="linear")

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        width: int = 32,
        blocks: int = 3,
        cycle: float = 10.0,
        identity: float = 0.0,
        pool: int = 50,
        grey_levels: int = 256,
        num_classes: int | None = None,
    ):
        if shape[0] % 2:
            raise ValueError(
                f"CycleGAN: shape must be (2C, H, W), a datum holding an image of each of two domains as --data "
                f"folder:A,B gives it, got {shape[0]} channels"
            )
        if min(shape[1:]) < 4:
            raise ValueError(f"CycleGAN: height and width must be at least 4, got {shape[1]}x{shape[2]}")
        if num_classes:
            raise ValueError(f"CycleGAN: num_classes must be None, labels play no part, got {num_classes}")
        for label, value in (("width", width), ("cycle", cycle)):
            if value <= 0:
                raise ValueError(f"CycleGAN: {label} must be above 0, got {value}")
        if identity < 0:
            raise ValueError(f"CycleGAN: identity must be at least 0, got {identity}")
        super().__init__(shape, grey_levels)
        one = (shape[0] // 2, *shape[1:])
        self.cycle, self.identity = cycle, identity
        self.generators = nn.ModuleDict({to: translator(one, width, blocks) for to in "BA"})
        self.critics = nn.ModuleDict({of: patch_critic(one, width) for of in "BA"})
        self.pools = nn.ModuleDict({of: ImagePool(pool, one) for of in "BA"})

    # --- training -------------------------------------------------------------------------------------------------

    def players(self) -> dict[str, Player]:
        """The generators move first, the critics on what they give then."""
        return {"generator": Player(self.generators), "critic": Player(self.critics, averaged=False)}

    def losses(self, player: str, x: Tensor, y: Tensor, step: int) -> dict[str, Tensor]:
        a, b = self._domains(x)
        return self._generator_terms(a, b) if player == "generator" else self._critic_terms(a, b)

    def _generator_terms(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        to_a, to_b = self.generators["A"], self.generators["B"]
        fake_a, fake_b = to_a(b), to_b(a)
        scores = {of: call_frozen(self.critics[of], fake) for of, fake in (("A", fake_a), ("B", fake_b))}
        # the kind's loss is half the square, the paper's generators minimise the whole
        fooling = sum(2 * losses.generator_loss(score, kind="least_squares") for score in scores.values())
        cycle = distance(to_a(fake_b), a) + distance(to_b(fake_a), b)
        terms = {"adversarial": fooling.detach(), "cycle": cycle.detach()}
        loss = fooling + self.cycle * cycle
        if self.identity:
            identity = distance(to_b(b), b) + distance(to_a(a), a)
            terms["identity"] = identity.detach()
            loss = loss + self.cycle * self.identity * identity
        return {"loss": loss, **terms}

    def _critic_terms(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            fakes = {"A": self.generators["A"](b), "B": self.generators["B"](a)}
        terms = {}
        for of, real in (("A", a), ("B", b)):
            scores, fake_scores = self.critics[of](real), self.critics[of](self.pools[of](fakes[of]))
            terms[f"loss_{of.lower()}"] = losses.critic_loss(scores, fake_scores, kind="least_squares")
        return {"loss": sum(terms.values()), **{name: term.detach() for name, term in terms.items()}}

    # --- translations and judgement -------------------------------------------------------------------------------

    def translate(self, x: Tensor, to: str) -> Tensor:
        """Images of one domain in the other, in evaluation mode and without a graph.

        Args:
            x: ``[N, C, H, W]``, uint8 level indices or floats in [0, 1]. to: ``A`` or ``B``.

        Returns:
            As many, floats in [0, 1].
        """
        if to not in self.generators:
            raise ValueError(f"CycleGAN: to must be 'A' or 'B', got {to!r}")
        one = (self.shape[0] // 2, *self.shape[1:])
        if not isinstance(x, Tensor) or tuple(x.shape[1:]) != one:
            got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"CycleGAN: x must be [N, {', '.join(map(str, one))}], got {got}")
        return shown(self._translated(scaled(self, x), to))

    def sample(
        self, n: int, temperature: float = 1.0, generator: torch.Generator | None = None, y: Tensor | int | None = None
    ) -> Tensor:
        """Refused: the model translates images, `translate`, and has nothing to draw them from."""
        raise ValueError(
            "CycleGAN: an image must be given to translate, there is no prior to sample from: translate(x)"
        )

    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor]], projections: int = PROJECTIONS) -> dict[str, Estimate]:
        """The sliced Wasserstein distance between translations and the images of their domain, the mean of both ways;
        and the cycle error, the mean of \\|F(G(a)) − a\\| and \\|G(F(b)) − b\\| in [0, 1].

        Args:
            batches: ``(x, y)``. projections: random directions.
        """
        real: dict[str, list[Tensor]] = {"A": [], "B": []}
        made: dict[str, list[Tensor]] = {"A": [], "B": []}
        errors = []
        for x, _ in batches:
            for source, to, (image, there, back) in self._cycles(x):
                real[source].append(image)
                made[to].append(there)
                errors.append((back - image).abs().flatten(1).mean(1))
        cycle = Estimate.of("cycle", "", torch.cat(errors) if errors else torch.empty(0))
        both = [
            metrics.sliced_wasserstein(torch.cat(made[domain]), torch.cat(real[domain]), projections)
            for domain in ("AB" if errors else "")
        ]
        distance = sum(both) / 2 if both else math.nan
        count = sum(map(len, real["A"]))
        return {"sliced_wasserstein": Estimate("sliced_wasserstein", "", distance, math.nan, count), "cycle": cycle}

    def pictures(self, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """``translations_a``: each tile A, A→B, A→B→A; ``translations_b`` the other way."""
        return {f"translations_{source.lower()}": torch.cat(tiles, 3) for source, _, tiles in self._cycles(x)}

    # --- helpers --------------------------------------------------------------------------------------------------

    def _domains(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The images of A and of B in [-1, 1]."""
        self._check_shape(x)
        a, b = scaled(self, x).chunk(2, 1)
        return a, b

    @torch.no_grad()
    def _translated(self, x: Tensor, to: str) -> Tensor:
        with in_mode(self, training=False):
            return self.generators[to](x)

    def _cycles(self, x: Tensor) -> Iterator[tuple[str, str, list[Tensor]]]:
        """Either way from one domain to the other: the images, translated, and back, in [0, 1]."""
        for (source, to), images in zip(("AB", "BA"), self._domains(x), strict=True):
            there = self._translated(images, to)
            yield source, to, [shown(images), shown(there), shown(self._translated(there, source))]


def distance(x: Tensor, y: Tensor) -> Tensor:
    """The mean size of x − y."""
    return (x - y).abs().mean()
