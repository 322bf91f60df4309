"""A flow that also classifies: one invertible network under a density and a linear classifier (Nalisnick 2019)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkernels._words import nearest
from genkernels.models._model import Estimate, LikelihoodModel, Preset
from genkernels.models._registry import model_class
from genkernels.nn._draws import drawing_from
from genkernels.nn._log_det import no_log_det
from genkernels.nn._modes import in_mode

#: Whose latents may be classified, by their command-line names: those that give them in one pass.
FLOWS = ("nice", "realnvp", "glow", "maf", "residualflow")
_DATA = {"digits": 10, "photos32": 10, "cifar10": 10, "points": 2}  #: preset: classes; the data's own number counts


def _presets() -> dict[str, Preset]:
    """The flows' own sizes: ``digits-glow`` and the like, and those of `Glow` as ``digits``."""
    presets = {}
    for data, classes in _DATA.items():
        for flow in ("glow", "realnvp", "residualflow"):
            sizes = model_class(flow).presets[data].sizes
            presets[f"{data}-{flow}"] = Preset({"flow": flow, "num_classes": classes, **sizes})
        presets[data] = presets[f"{data}-glow"]
    return presets


class HybridFlow(LikelihoodModel):
    r"""A flow whose latents a linear classifier reads, so that one network gives p(x) and p(y|x).

    .. math:: L = \lambda \ln p(x) + \ln p(y\mid x)

    is maximised: the loss is −L, nats an example. The classifier sees all latents, D values, of the dequantised image.
    The presets have the flows' own sizes: ``digits-realnvp``, ``digits-glow`` (also ``digits``),
    ``digits-residualflow``, and so on for the other data.

    Args:
        shape: as the flow takes it.
        num_classes: of the classifier; p(x) knows no class.
        flow: ``realnvp`` (affine couplings), ``glow`` (couplings and 1×1 convolutions), ``residualflow``; ``nice`` and
            ``maf`` will do too.
        weight: λ, a number of at least 0, or ``1/D``: bits/dim and cross-entropy then weigh about alike. 1: the joint
            likelihood, in which D values count against one label. 0: the classifier alone, on an invertible network
            whose log-determinant nobody estimates in training.
        grey_levels: how many values a pixel can take, None for images of real numbers. Images only.
        **sizes: what else the flow's constructor takes.

    Example:
        >>> import torch, genkernels as gk
        >>> model = gk.models.HybridFlow(shape=(4,), num_classes=3, flow="realnvp", couplings=2, hidden=8, weight=0.1)
        >>> x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> model.log_prob(x).shape, model.log_prob_y(x, y).shape, model.classify(x).shape
        (torch.Size([5]), torch.Size([5]), torch.Size([5]))

    Source: Nalisnick et al., "Hybrid models with deep and invertible features", 2019; Chen et al., "Residual flows for
    invertible generative modeling", 2019.
    """

    presets: ClassVar = _presets()
    samples_by_class: ClassVar[bool] = False

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        num_classes: int,
        flow: str = "glow",
        weight: str | float = "1/D",
        grey_levels: int | None = 256,
        **sizes,
    ):
        if flow not in FLOWS:
            hint = nearest(flow, FLOWS, listed=True)
            raise ValueError(f"HybridFlow: flow must be one of {', '.join(FLOWS)}, got {flow!r}{hint}")
        if num_classes < 2:
            raise ValueError(f"HybridFlow: num_classes must be at least 2, got {num_classes}")
        kind = model_class(flow)
        allowed = [name for name in inspect.signature(kind).parameters if name not in ("num_classes", "class_features")]
        if unknown := [name for name in sizes if name not in allowed]:
            raise ValueError(f"HybridFlow: {flow} has no argument {unknown[0]!r}{nearest(unknown[0], allowed)}")
        super().__init__(shape, grey_levels, num_classes)
        self.weight = _weight(weight, self.dim)
        self.flow = kind(shape=shape, grey_levels=grey_levels, **sizes)
        self.classifier = nn.Linear(self.dim, num_classes)

    @classmethod
    def fit_to(cls, form) -> dict[str, Any]:
        """As for `Model`, and ``num_classes``: without labels there is nothing to classify."""
        return {**super().fit_to(form), "num_classes": form.num_classes}

    # --- the two densities ----------------------------------------------------------------------------------------

    def log_prob(self, x: Tensor, y: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """ln p(x), ``[N]``, nats: the flow's own, whatever y is."""
        self._check_shape(x)
        return self.flow.log_prob(x, generator=generator)

    def log_prob_y(self, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """ln p(y|x), ``[N]``, nats.

        Args:
            x: as for `log_prob`. y: ``[N]`` class indices. generator: of the dequantisation noise.
        """
        return -F.cross_entropy(self.logits(x, generator), self._labels(y, len(x)), reduction="none")

    def logits(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """``[N, num_classes]``: ln p(y|x) up to a constant."""
        return self._passed(x, generator, density=False)[1]

    def classify(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The most probable class of each, ``[N]``."""
        return self.logits(x, generator).argmax(1)

    # --- training and judging -------------------------------------------------------------------------------------

    def loss(self, x: Tensor, y: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """−(λ ln p(x) + ln p(y|x)), the mean in nats; without y of the first term alone, as for examples that nobody
        has labelled."""
        return self._terms(x, y, generator)["loss"]

    def losses(self, player: str, x: Tensor, y: Tensor, step: int) -> dict[str, Tensor]:
        return self._terms(x, y)

    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Estimate]:
        """What is minimised, by which the best weights are chosen; what p(x) costs, the cross-entropy, and the accuracy
        of `classify` in percent."""
        columns: list[list[Tensor]] = [[], [], [], []]
        with in_mode(self, training=False), torch.no_grad():
            for x, y in batches:
                log_prob, logits = self._passed(x, None)
                y = self._labels(y, len(x))
                entropy = F.cross_entropy(logits, y, reduction="none")
                values = (
                    self._objective(log_prob, entropy),
                    self.cost(log_prob),
                    entropy,
                    100.0 * (logits.argmax(1) == y),
                )
                for column, value in zip(columns, values, strict=True):
                    column.append(value)
        loss, cost, entropy, accuracy = (torch.cat(column) if column else torch.empty(0) for column in columns)
        return {
            "loss": Estimate.of("loss", "nats", loss),
            self.measure: Estimate.of(self.measure, self.unit, cost),
            "cross_entropy": Estimate.of("cross_entropy", "nats", entropy),
            "accuracy": Estimate.of("accuracy", "%", accuracy, lower_is_better=False),
        }

    def sample(
        self, n: int, temperature: float = 1.0, generator: torch.Generator | None = None, y: Tensor | int | None = None
    ) -> Tensor:
        """Draws from p(x), as the flow does.

        Raises:
            ValueError: y is given, which p(x) does not know.
        """
        if y is not None:
            got = y if isinstance(y, int) else type(y).__name__
            raise ValueError(f"HybridFlow: y must be None, samples are of p(x), which knows no class, got {got}")
        self._check_sample(n, temperature, generator)
        return self.flow.sample(n, temperature, generator)

    def report(self, x: Tensor, y: Tensor) -> list[str]:
        return self.flow.report(x, y)

    def extra_repr(self) -> str:
        return f"weight={self.weight:g}"

    # --- helpers --------------------------------------------------------------------------------------------------

    def _passed(self, x: Tensor, generator, density: bool = True) -> tuple[Tensor | None, Tensor]:
        """ln p(x), or None, and the logits, from one pass through the flow."""
        self._check_shape(x)
        leave_out = not density and not torch.compiler.is_compiling()
        with drawing_from(generator), no_log_det() if leave_out else nullcontext():
            latents, log_det = self.flow.encode(x, generator=generator)
        logits = self.classifier(torch.cat([z.flatten(1) for z in latents], 1))
        return self.flow.density(latents, log_det) if density else None, logits

    def _terms(self, x: Tensor, y: Tensor | None, generator=None) -> dict[str, Tensor]:
        """The loss and what it is made of."""
        if y is None and not self.weight:
            raise ValueError("HybridFlow: with weight=0 the loss is the classifier's alone, y must be given, got None")
        log_prob, logits = self._passed(x, generator, density=self.weight > 0)
        terms = {} if log_prob is None else {self.measure: self.cost(log_prob).mean()}
        entropy = torch.zeros((), device=logits.device)
        if y is not None:
            entropy = terms["cross_entropy"] = F.cross_entropy(logits, self._labels(y, len(x)))
        return {"loss": self._objective(None if log_prob is None else log_prob.mean(), entropy), **terms}

    def _objective(self, log_prob: Tensor | None, cross_entropy: Tensor) -> Tensor:
        return cross_entropy - self.weight * log_prob if self.weight else cross_entropy


def _weight(weight: Any, dim: int) -> float:
    if weight == "1/D":
        return 1 / dim
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise ValueError(f"HybridFlow: weight must be a number of at least 0, or '1/D', got {weight!r}")
    return float(weight)
