"""Random layers with the sizes that they take, for what must hold of any geometry, and their norms by definition."""

import math
import random
from collections.abc import Iterator

import torch
from torch import nn

from genkernels.networks.operator_norm import geometry_of, sizes_of
from genkernels.reference.spectral_norm import CIRCULAR, CONVOLUTION, Geometry, apply

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
#: Of a kernel of 3×3 that keeps the size.
SAME = Geometry(CONVOLUTION, padding=(0, 1, 1))
PLAIN = {"bias": False, "dtype": torch.float64}
#: Of inputs, an axis each, by the number of axes.
LARGEST = {1: 14, 2: 7, 3: 4}


def convolutions(count: int, seed: int = 0) -> Iterator[tuple[nn.Module, tuple[int, ...]]]:
    """So many fp64 convolutions without bias, and the sizes of their inputs without channels."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    while count:
        dims = rng.choice((1, 1, 2, 2, 3))
        size = tuple(rng.randint(1, LARGEST[dims]) for _ in range(dims))
        kernel = [rng.randint(1, 3 if dims == 3 else 4) for _ in range(dims)]
        stride, dilation = ([rng.choice((1, 1, 2, 3)) for _ in range(dims)] for _ in range(2))
        padding = [rng.randint(0, 3) for _ in range(dims)]
        groups = rng.choice((1, 1, 2, 3))
        c_in, c_out = groups * rng.randint(1, 3), groups * rng.randint(1, 3)
        given = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, **PLAIN}
        mode = rng.choice(("zeros", "zeros", "circular", "same", "transposed"))
        if mode == "transposed":
            extra = [rng.randint(0, max(s, d) - 1) for s, d in zip(stride, dilation, strict=True)]
            layer = TRANSPOSED[dims - 1](c_in, c_out, kernel, output_padding=extra, **given)
        elif mode == "same":
            given.update(stride=1, padding="same", padding_mode=rng.choice(("zeros", "circular")))
            layer = CONVOLUTIONS[dims - 1](c_in, c_out, kernel, **given)
        else:
            layer = CONVOLUTIONS[dims - 1](c_in, c_out, kernel, padding_mode=mode, **given)
        if rng.random() < 0.3:  # all of one sign: norms that large inputs reach at frequency 0
            layer.weight.data.abs_()
        try:
            layer(torch.zeros(1, c_in, *size, dtype=torch.float64))
        except (RuntimeError, ValueError):
            continue  # the kernel does not fit, or pads more than a turn
        count -= 1
        yield layer, size


def matrix_of(layer: nn.Module, size: tuple[int, ...]) -> torch.Tensor:
    """The layer written as a matrix, ``[outputs, inputs]``."""
    g, (v_shape, u_shape) = geometry_of(layer), sizes_of(layer, size)
    unit = torch.eye(torch.Size(v_shape).numel(), dtype=torch.float64).view(-1, *v_shape)
    return torch.stack([apply(layer.weight.detach(), g, v, u_shape).flatten() for v in unit], 1)


def norm_of(layer: nn.Module, size: tuple[int, ...]) -> float:
    return float(torch.linalg.matrix_norm(matrix_of(layer, size), 2))


def kind_of(layer: nn.Module) -> str:
    g = geometry_of(layer)
    strided = "strided " if max(g.stride) > 1 else ""
    return strided + ("transposed" if g.transposed else "circular" if g.kind == CIRCULAR else "zeros")


def norm2d(weight, size, g=SAME):
    """The norm of a convolution that keeps its size, from the matrix that it is."""
    unit = torch.eye(weight.shape[1] * g.groups * math.prod(size), dtype=weight.dtype)
    columns = torch.vmap(lambda v: apply(weight, g, v.view(-1, *size), (weight.shape[0], *size)))(unit).flatten(1)
    gram = columns @ columns.t() if len(columns) <= columns.shape[1] else columns.t() @ columns
    return math.sqrt(float(torch.linalg.eigvalsh(gram)[-1]))
