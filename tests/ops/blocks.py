"""Networks of residual blocks that contract, for the tests of their two operators."""

import math

import torch

from genkernels.ops._block_checks import WORDS

ACTIVATIONS = WORDS
#: By name: the features or the image of x, the widths, the sizes of the kernels (None: fully connected). Biases "of
#: each" are each sample's own, those of every map, or of the first one.
SHAPES = {
    "mlp": ((5,), (7, 6), None),
    "two maps": ((3,), (8,), None),
    "deep": ((2,), (9, 16, 5), None),
    "wide": ((37,), (70, 41), None),
    "3-1-3": ((2, 5, 4), (6, 7), (3, 1, 3)),
    "3-3": ((3, 4, 4), (5,), (3, 3)),
    "1-1-1": ((4, 3, 3), (9, 5), (1, 1, 1)),
    "3-1-3 of 2x2": ((4, 2, 2), (5, 3), (3, 1, 3)),
    "1-3-1 of one row": ((3, 1, 6), (4, 4), (1, 3, 1)),
    "large": ((3, 17, 19), (20, 24), (3, 1, 3)),
    "broad": ((2, 5, 4), (83, 70), (3, 1, 3)),
    "mlp of each": ((5,), (7, 6), None),
    "first of each": ((5,), (7, 6), None),
    "3-1-3 of each": ((4, 2, 3), (5, 3), (3, 1, 3)),
}
#: Of blocks whose biases are each sample's own, with their activations: what Triton's interpreter and the emulated CUDA
#: kernels take, of several samples.
OF_EACH = [("mlp of each", "clipswish"), ("first of each", "elu"), ("3-1-3 of each", "lipswish")]


def block(name, activation="lipswish", samples=4, norm=0.8, device="cpu", dtype=torch.float64, seed=0):
    """``(x, weights, biases, parameters)``: each map's norm is at most `norm`, the activation's about 1."""
    size, widths, kernels = SHAPES[name]
    generator = torch.Generator().manual_seed(seed)
    twice = 2 if activation == "clipswish" else 1

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    outs, ins = [*widths, size[0]], [size[0], *(twice * w for w in widths)]
    weights = []
    for i, (out, into) in enumerate(zip(outs, ins, strict=True)):
        kernel = () if kernels is None else (kernels[i],) * 2
        weight = draw(out, into, *kernel)
        # the norm of a convolution is at most the root of its taps times that of the matrix
        taps = 1 if kernels is None else kernels[i]
        weights.append(norm * weight / (taps * torch.linalg.matrix_norm(weight.flatten(1), 2)))
    own = [name.endswith("of each") and (i == 0 or not name.startswith("first")) for i in range(len(outs))]
    biases = [draw(samples, out) if each else draw(out) for out, each in zip(outs, own, strict=True)]
    low = {"leaky_relu": 0.1, "elu": 0.5}.get(activation, 0.6)
    parameters = low + 0.4 * torch.rand(len(widths), generator=generator, dtype=torch.float64)
    x = draw(samples, *size)
    moved = [t.to(device, dtype) for t in (x, *weights, *biases, parameters)]
    return moved[0], moved[1 : 1 + len(outs)], moved[1 + len(outs) : -1], moved[-1]


def network(weights, biases, activation, parameters):
    """g, written with torch.nn.functional alone."""
    act = {
        "relu": lambda z, p: z.relu(),
        "leaky_relu": lambda z, p: torch.where(z > 0, z, p * z),
        "elu": lambda z, p: torch.where(z > 0, z, p * (z.clamp(max=0).exp() - 1)),
        "silu": lambda z, p: z * z.sigmoid(),
        "tanh": lambda z, p: z.tanh(),
        "lipswish": lambda z, p: z * (p * z).sigmoid() / 1.1,
        "clipswish": lambda z, p: torch.cat([z * (p * z).sigmoid(), -z * (-p * z).sigmoid()], 1) / (1.1 * 1.004),
    }[activation]

    def g(x):
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            x = act(x, parameters[i - 1]) if i else x
            common, own = (bias, None) if bias.dim() == 1 else (None, bias)
            if weight.dim() == 2:
                x = torch.nn.functional.linear(x, weight, common)
            else:
                x = torch.nn.functional.conv2d(x, weight, common, padding=weight.shape[-1] // 2)
            if own is not None:
                x = x + own.view(*own.shape, *[1] * (x.dim() - 2))
        return x

    return g


def jacobians(g, x):
    """``[N, D, D]`` by torch.func."""
    size = math.prod(x.shape[1:])
    return torch.stack([torch.func.jacrev(lambda s: g(s[None])[0])(sample).reshape(size, size) for sample in x])
