"""The four structures of a Jacobian that make its determinant affordable, computed from layers of this library."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from genkernels._words import UsageError
from genkernels.figures._seed import add_seed, checked_seed

if TYPE_CHECKING:
    from torch import Tensor, nn

TITLE = "Four Jacobians: low rank, triangular, structured, free-form, of this library's layers"
FEATURES, MOST = 16, 128
DRAWS = 200  # of the unbiased estimate


def add_arguments(parser) -> None:
    parser.add_argument("--features", type=int, default=FEATURES, metavar="D", help=f"default: {FEATURES}")
    add_seed(parser, "weights and x")


class Structure(NamedTuple):
    """One kind of layer: how its log-determinant is found, and that way taken, from the layer, x and J."""

    layer: nn.Module
    made_of: str
    formula: str
    log_det: Callable[[nn.Module, Tensor, Tensor], str]


def draw(arguments):
    features, seed = arguments.features, checked_seed(arguments.seed)
    if not 2 <= features <= MOST or features % 2:
        raise UsageError(f"--features must be even, from 2 to {MOST}, got {features}")
    import torch

    from genkernels import pictures
    from genkernels._seeds import fixed_seed

    matrices, captions = {}, {}
    with fixed_seed(seed):
        x = torch.randn(features, dtype=torch.float64)
        for name, structure in structures(features).items():
            matrix = matrices[name] = jacobian(structure.layer, x)
            found = torch.linalg.slogdet(matrix)[1].item()
            way = structure.log_det(structure.layer, x, matrix)
            captions[name] = f"{structure.made_of}\n{structure.formula}\n{way}; slogdet of J {found:.4f}".replace(
                "-", "−"
            )
    return pictures.heatmaps(
        matrices,
        captions=captions,
        title="Four structures of J = ∂f(x)/∂x that make ln |det J| affordable",
        note=f"Layers of random weights on D = {features} features, at one x, in fp64; rows are outputs, columns "
        "inputs. White: exactly 0.",
    )


def structures(features: int) -> dict[str, Structure]:
    """The layers, their random weights from torch's generator, fp64, in evaluation mode."""
    import torch
    from torch import nn

    from genkernels import nn as gnn

    half, wide = features // 2, 16 * features  # so wide that no entry is 0 by dead units alone

    def contraction(*widths: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for a, b in zip(widths, widths[1:], strict=False):
            layers += [gnn.LipSwish(), gnn.LipschitzLinear(a, b)]
            with torch.no_grad():  # so that each is held to its bound
                layers[-1].parametrizations.weight.original.mul_(4)
        return nn.Sequential(*layers[1:])

    bottleneck = gnn.InvertibleResidual(contraction(features, 1, features), "exact")
    nn.init.constant_(bottleneck.net[0].bias, 2.0)  # where the unit is steep
    made = gnn.AutoregressiveTransform(gnn.MADE(features, (wide, wide)))
    coupling = gnn.AffineCoupling(nn.Sequential(nn.Linear(half, wide), nn.Tanh(), nn.Linear(wide, features)))
    residual = gnn.InvertibleResidual(contraction(features, wide, wide, features), "unbiased")
    found = {
        "(a) Low rank": Structure(
            bottleneck,
            "InvertibleResidual, one hidden unit (as planar)",
            "J = I + u hᵀ,  det J = 1 + hᵀu: O(D)",
            lambda layer, x, matrix: f"ln |1 + hᵀu| = {math.log(abs(1 + matrix.trace().item() - len(matrix))):.4f}",
        ),
        "(b) Lower triangular": Structure(
            made,
            "AutoregressiveTransform of a MADE (MAF)",
            "det J = ∏ σᵢ(x₁ … xᵢ₋₁): O(D)",
            lambda layer, x, matrix: f"Σ ln σᵢ = {_told(layer, x):.4f}",
        ),
        "(c) Structured": Structure(
            coupling,
            "AffineCoupling, the first half passes",
            "det J = ∏ σᵢ(x₁), i in the second half: O(D)",
            lambda layer, x, matrix: f"Σ ln σᵢ = {_told(layer, x):.4f}",
        ),
        "(d) Free-form": Structure(
            residual,
            "InvertibleResidual, x + g(x), Lip(g) < 1",
            "ln det J = Σₖ (−1)ᵏ⁺¹ tr(∂g/∂x)ᵏ / k, unbiased estimate",
            _estimated,
        ),
    }
    for structure in found.values():
        structure.layer.double().eval()
    return found


def jacobian(layer: nn.Module, x: Tensor) -> Tensor:
    """∂f(x)/∂x ``[D, D]`` of a layer that mixes no samples: D copies of x, row i from output i of copy i."""
    import torch

    copies = x.expand(len(x), -1).clone().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(layer(copies)[0].diagonal().sum(), copies)[0]


def _told(layer: nn.Module, x: Tensor) -> float:
    """The log-determinant that the layer itself gives."""
    import torch

    with torch.no_grad():
        return layer(x[None])[1].item()


def _estimated(layer: nn.Module, x: Tensor, matrix: Tensor) -> str:
    import torch

    draws = torch.tensor([_told(layer, x) for _ in range(DRAWS)], dtype=torch.float64)
    return f"mean of {DRAWS} draws {draws.mean():.3f} ± {draws.std() / math.sqrt(DRAWS):.3f}"
