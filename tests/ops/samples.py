"""Small example calls of each operator, for the tests that every operator must pass."""

import torch

from genkernels import ops
from genkernels.reference import made as reference


def affine_coupling(device="cpu", dtype=torch.float64):
    """`(function of tensors, tensors)`; the function returns a tuple of tensors."""
    generator = torch.Generator().manual_seed(1)
    x, params = (torch.randn(3, 4, 2, 3, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(2))
    return lambda a, b: ops.affine_coupling(a, b, scale_map="sigmoid"), (x, params)


def masked_conv(device="cpu", dtype=torch.float64):
    """As above: RGB, gated, with a bias, a condition and a residual."""
    generator = torch.Generator().manual_seed(2)
    shapes = (2, 3, 4, 5), (6, 3, 3, 3), (6,), (2, 6), (2, 3, 4, 5)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]

    def call(x, weight, bias, condition, residual):
        added = {"condition": condition, "residual": residual, "activation": "gate"}
        return (ops.masked_conv(x, weight, bias, mask_type="B", data_channels=3, **added),)

    return call, tuple(tensors)


def autoregressive_sampling(device="cpu", dtype=torch.float64):
    """A 3×3 type-A stage with a gate, then 1×1 to three levels, over images of 2×3 pixels."""
    generator = torch.Generator().manual_seed(2)
    first = torch.randn(8, 1, 3, 3, generator=generator, dtype=torch.float64)
    first.flatten(2)[:, :, 4:] = 0
    second = torch.randn(3, 4, 1, 1, generator=generator, dtype=torch.float64)
    noise = torch.rand(2, 1, 2, 3, generator=generator, dtype=torch.float64)

    def sample(noise, first, second):
        stages = [ops.Stage(((0, first),), activation="gate"), ops.Stage(((1, second),))]
        return (ops.autoregressive_sampling(stages, noise, levels=3),)

    return sample, tuple(t.to(device, dtype) for t in (noise, first, second))


def made(device="cpu", dtype=torch.float64):
    """The inverse through a small network with a context."""
    generator = torch.Generator().manual_seed(1)
    degrees = [torch.tensor(d, device=device) for d in ([2, 1, 3], [0, 1, 1, 2], [0, 1, 2, 2])]
    order, counts = reference.plan(degrees)
    shapes = [(2, 3), (2, 4), (4, 3), (4,), (4, 4), (4,), (6, 4), (6,)]
    tensors = (torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes)

    def function(z, context, w0, b0, w1, b1, w2, b2):
        layers = (w0, w1, w2), (b0, b1, b2)
        return ops.made_inverse(z, *layers, order, counts, context=context, scale_map="sigmoid")

    return function, tuple(tensors)


def masked_linear(device="cpu", dtype=torch.float64):
    """The layer of `made`, unsorted degrees, one output that sees nothing."""
    generator = torch.Generator().manual_seed(1)
    shapes = (3, 4), (5, 4), (5,)
    tensors = (torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes)
    into, out = torch.tensor([1, 3, 2, 4], device=device), torch.tensor([1, 4, 2, 3, 0], device=device)
    return lambda x, weight, bias: (ops.masked_linear(x, weight, bias, into, out),), tuple(tensors)


def logistic_mixture(device="cpu", dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    params = torch.randn(3, 20, 2, 3, generator=generator, dtype=torch.float64).to(device, dtype)
    x = (torch.randint(17, (3, 3, 2, 3), generator=generator) / 8.0 - 1).to(device)
    return lambda p: (ops.logistic_mixture_nll(p, x, levels=17),), (params,)


SAMPLES = {
    "affine_coupling": affine_coupling,
    "autoregressive_sampling": autoregressive_sampling,
    "logistic_mixture": logistic_mixture,
    "made": made,
    "masked_conv": masked_conv,
    "masked_linear": masked_linear,
}

#: Samples of an operator beside the one of its own name.
FURTHER = {"masked_linear": "made"}

#: Operators that take autocast's lower dtype, as convolutions do; the others compute in fp32.
LOWER_UNDER_AUTOCAST = {"masked_conv", "masked_linear"}
