"""Residual flows: invertible residual blocks, as free-form as a flow can be (Behrmann 2019; Chen 2019)."""

from __future__ import annotations

import math
import time
from typing import ClassVar

import torch
from torch import Tensor, nn

from genkernels.models._model import Preset
from genkernels.models.flows.base import FlowModel, class_context, logit_layers
from genkernels.nn import (
    ActNorm,
    FlowSequential,
    InvertibleResidual,
    LipschitzConv2d,
    LipschitzLinear,
    LipSwish,
    Prior,
    Squeeze,
    certify,
)
from genkernels.nn.spectral_norm import join, parts_below

#: What `ResidualFlow.report` may spend on bounds.
REPORT_SECONDS = 20.0
_SIZES = {
    "digits": {"shape": (1, 8, 8), "grey_levels": 17, "scales": 2, "blocks": 4, "hidden": 32, "logit": 0.01},
    "photos32": {"shape": (3, 32, 32), "scales": 3, "blocks": 4, "hidden": 64},
    "cifar10": {"shape": (3, 32, 32), "scales": 3, "blocks": 16, "hidden": 512, "logit": 0.05},
    "points": {
        "shape": (2,),
        "blocks": 24,
        "hidden": 64,
        "hidden_layers": 3,
        "coefficient": 0.99,  # of four layers: a block may have 0.96
        "log_det": "exact",
    },
}
#: Maps of slopes near 1 need many steps to fold the plane, and bear large ones.
_TRAINING = {"points": {"lr": 5e-3, "batch_size": 256}}


class ResidualFlow(FlowModel):
    """Blocks y = x + g(x) whose networks contract, an ActNorm between them: i-ResNet with ``log_det="series"``,
    Residual Flow with ``"unbiased"``.

    A density costs the series of a log-determinant, a sample a fixed point for each block.

    Args:
        shape: ``(C, H, W)``, height and width multiples of 2^(scales − 1), or ``(D,)``.
        scales: groups of blocks, with a `Squeeze` between two of them; all latents stay to the end. Images only.
        blocks: residual blocks a scale. hidden: width of their networks: 3×3, 1×1 and 3×3 convolutions for images,
            fully connected for points. hidden_layers: of the latter.
        coefficient: the Lipschitz constant that each layer is held to, below 1.
        n_power_iterations: of the spectral norm, a training step.
        log_det, terms, stop, p, probes, first_term: of the log-determinant, as for `InvertibleResidual`.
        atol: the largest residual that the inverse leaves.
        logit: above 0: images are taken from [0, 1] to the real line by ``logit(α + (1 - 2α)x)`` with this α.
        learned_prior: mean and scale of the latents are learned.
        grey_levels: how many values a pixel can take, None for images of real numbers. Images only.
        num_classes: condition prior and networks on a class y. class_features: size of its embedding.

    Example:
        >>> import torch, genkernels as gk
        >>> model = gk.models.ResidualFlow.from_preset("points", blocks=2)
        >>> model.log_prob(torch.randn(3, 2)).shape
        torch.Size([3])

    Source: Behrmann et al., "Invertible residual networks", 2019 (CIFAR-10: 3.45 bits/dim); Chen et al., "Residual
    flows for invertible generative modeling", 2019 (3.28, with 16 blocks of 512 channels at each of three scales, which
    the preset ``cifar10`` has, and fully connected ones behind them, which it has not; Adam at 1e-3, batches of 64).
    The preset ``points`` has 1.43 nats on held-out ``spirals`` after 3,000 steps; of 8 blocks, 0.97 a layer and batches
    of 64 at 1e-3, 8,000 steps had 2.09, and of these only the sizes of step and batch changed, 3,000 steps 1.88.
    """

    presets: ClassVar = {name: Preset(sizes, _TRAINING.get(name, {})) for name, sizes in _SIZES.items()}

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        scales: int = 3,
        blocks: int = 16,
        hidden: int = 128,
        hidden_layers: int = 2,
        coefficient: float = 0.97,
        n_power_iterations: int = 2,
        log_det: str = "unbiased",
        terms: int = 2,
        stop: str = "adaptive",
        p: float = 0.5,
        probes: int = 1,
        first_term: str = "auto",
        atol: float = 1e-5,
        logit: float = 0.0,
        learned_prior: bool = True,
        grey_levels: int | None = 256,
        num_classes: int | None = None,
        class_features: int = 16,
    ):
        classes, context = class_context(num_classes, class_features)
        images, of_layers = len(shape) == 3, {"coefficient": coefficient, "n_power_iterations": n_power_iterations}
        size = tuple(shape)
        if images:
            halvings = 2 ** (scales - 1)
            if scales < 1:
                raise ValueError(f"ResidualFlow: scales must be at least 1, got {scales}")
            if shape[1] % halvings or shape[2] % halvings:
                raise ValueError(
                    f"ResidualFlow: height and width must be multiples of {halvings} for scales={scales}, got "
                    f"{shape[1]}x{shape[2]}"
                )
        layers: list[nn.Module] = logit_layers(logit) if images else []
        for scale in range(scales if images else 1):
            if scale:
                layers.append(Squeeze())
                size = (size[0] * 4, size[1] // 2, size[2] // 2)
            for _ in range(blocks):
                net = ResidualNet(size, hidden, hidden_layers, context, of_layers)
                estimator = {"terms": terms, "stop": stop, "p": p, "probes": probes, "first_term": first_term}
                layers += [ActNorm(size[0]), InvertibleResidual(net, log_det, **estimator, atol=atol)]
        layers.append(ActNorm(size[0]))
        super().__init__(
            [FlowSequential(*layers)],
            [],
            Prior(size[0], learned=learned_prior, num_classes=num_classes),
            latent_shapes=[size],
            shape=shape,
            grey_levels=grey_levels,
            num_classes=num_classes,
            classes=classes,
        )
        join(parts_below(self))  # one update a step for all blocks

    def set_log_det(self, log_det: str, **options) -> None:
        """Another estimator in every block; arguments as for `InvertibleResidual`."""
        for block in self.residual_blocks():
            block.set_log_det(log_det, **options)

    def residual_blocks(self) -> list[InvertibleResidual]:
        return [module for module in self.modules() if isinstance(module, InvertibleResidual)]

    def lipschitz_bound(self, block: InvertibleResidual) -> tuple[float, list[tuple[float, float]]]:
        """An upper bound of a block's Lipschitz constant, rounding included, and the two ends for each of its layers:
        `LipSwish` adds nothing, so that it is the product of the upper ends (`genkernels.nn.certify`)."""
        ends = [certify(layer) for layer in block.net.modules() if isinstance(layer, LipschitzLinear | LipschitzConv2d)]
        return math.prod(high for _, high in ends), ends

    @torch.no_grad()
    def report(self, x: Tensor, y: Tensor) -> list[str]:
        """Of each block: the iterations and the largest residual of its inverse on this batch, and its bound."""
        outputs: dict[nn.Module, Tensor] = {}
        blocks = self.residual_blocks()
        hooks = [b.register_forward_hook(lambda block, _, out: outputs.__setitem__(block, out[0])) for b in blocks]
        try:
            self.encode(x, self._labels(y, len(x)))
        finally:
            for hook in hooks:
                hook.remove()
        context = self._context(self._labels(y, len(x)))
        solved = [block.solve(outputs[block], context) for block in blocks]
        lines = [
            f"inverse: {max(int(s.iterations.max()) for s in solved)} iterations at most in a block, "
            f"{sum(float(s.iterations.double().mean()) for s in solved):.1f} in all on average, largest residual "
            f"{max(float(s.residual.max()) for s in solved):.1e}"
        ]
        began = time.monotonic()
        for i, block in enumerate(blocks):
            if time.monotonic() - began > REPORT_SECONDS:
                lines.append(f"the bounds of {len(blocks) - i} more blocks are left out: they take too long")
                break
            bound, ends = self.lipschitz_bound(block)
            layers = ", ".join(f"{low:.3f} to {high:.3f}" for low, high in ends)
            lines.append(f"block {i}: Lipschitz constant at most {bound:.3f}; norms of its layers {layers}")
        return lines


class ResidualNet(nn.Module):
    """The network of a residual block: layers of a bounded norm with `LipSwish` in between.

    Args:
        size: of x, ``(D,)`` or ``(C, H, W)``. hidden: width. hidden_layers: of the fully connected one.
        context_features: size of the context ``[N, context_features]``, of which a linear map is added behind the first
            layer; 0: none.
        of_layers: options of each layer.
    """

    def __init__(self, size, hidden: int, hidden_layers: int, context_features: int, of_layers: dict):
        super().__init__()
        if len(size) == 1:
            widths = [size[0], *[hidden] * hidden_layers, size[0]]
            linear = [LipschitzLinear(a, b, **of_layers) for a, b in zip(widths[:-1], widths[1:], strict=True)]
        else:
            at = {"input_size": tuple(size[1:]), **of_layers}
            linear = [
                LipschitzConv2d(size[0], hidden, 3, padding=1, **at),
                LipschitzConv2d(hidden, hidden, 1, **at),
                LipschitzConv2d(hidden, size[0], 3, padding=1, **at),
            ]
        self.first = linear[0]
        rest = [layer for after in linear[1:] for layer in (LipSwish(), after)]
        self.rest = nn.Sequential(*rest)
        self.context = nn.Linear(context_features, hidden, bias=False) if context_features else None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.first(x)
        if context is not None:
            shift = self.context_shift(context)
            h = h + shift.view(*shift.shape, *[1] * (x.dim() - 2))
        return self.rest(h)

    def context_shift(self, context: Tensor) -> Tensor:
        """What the context adds behind the first layer, ``[N, hidden]``."""
        return self.context(context)
