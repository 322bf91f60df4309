"""The training step of an importance-weighted autoencoder that a case of `importance_bound` measures, with its weights
as inputs: the one stochastic layer of Burda et al., 2016, two hidden layers each way.

The yardstick ("one pass") is all samples in one graph, by the operators: what the step in chunks, whose memory does not
grow with k, may be compared with. It computes the decoder's forward pass twice.

Bytes: images and weights read once, the gradients written once. Flops: two a weight, three times (forward, by inputs,
by weights) for the encoder an image, for the decoder a sample.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkernels import losses, ops
from genkernels.backends import use_backend
from genkernels.benchmarks.cases import Case

SEED = 1


class Autoencoder(nn.Module):
    """Binary images of `data` pixels, `latent` numbers."""

    def __init__(self, data: int, hidden: int, latent: int):
        super().__init__()
        self.encoder, self.decoder = _layers(data, hidden, 2 * latent), _layers(latent, hidden, data)
        self.data, self.latent = data, latent

    def loss(self, x: Tensor, k: int, chunk: int | None) -> Tensor:
        def log_weight(parameters, size, generator, stopped):
            mean, log_scale = parameters
            noise = torch.randn((len(x), size, self.latent), generator=generator, device=x.device)
            z, ratio = ops.gaussian_reparameterize(noise.to(mean.dtype), mean, log_scale, stopped=stopped)
            logits = self.decoder(z)
            pixels = x[:, None].expand_as(logits)
            return ratio - F.binary_cross_entropy_with_logits(logits, pixels, reduction="none").sum(2), (z, ratio)

        parameters = self.encoder(x).chunk(2, 1)
        return losses.importance_loss(parameters, log_weight, k=k, chunk=chunk, seed=SEED).loss


def _layers(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    sizes = (inputs, hidden, hidden, outputs)
    layers = [layer for i in range(3) for layer in (nn.Linear(sizes[i], sizes[i + 1]), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def step_case(net: Autoencoder, batch: int, k: int, chunk: int) -> Case:
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    numbers = sum(math.prod(shape) for shape in shapes.values())
    encoder, decoder = (sum(p.numel() for p in part.parameters()) for part in (net.encoder, net.decoder))

    def by_definition(x: Tensor) -> Tensor:
        with use_backend("reference"):
            return net.loss(x, k, chunk)

    return Case(
        name="importance_bound/step",
        shape=(batch, k, net.data),
        dtype=torch.float32,
        direction="step",
        inputs=functools.partial(_inputs, shapes, (batch, net.data)),
        op=_differentiated(net, lambda x: net.loss(x, k, chunk)),
        reference=_differentiated(net, by_definition),
        outputs=("loss", *(f"gradient of {name}" for name in shapes)),
        bytes=4 * (batch * net.data + 2 * numbers),
        flops=6 * batch * (encoder + k * decoder),
        settings={"chunk": chunk},
        compiled="a step draws its noise from generators of its own, which torch.compile does not take",
        yardstick=_differentiated(net, lambda x: net.loss(x, k, None)),
    )


def _differentiated(net: nn.Module, loss):
    """A loss as a function of images and of the network's weights, which gives it and its gradients by the weights."""
    parameters = list(net.parameters())

    @torch.enable_grad()
    def run(x, *weights):
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.data = weight
        value = loss(x.detach())
        return value.detach(), *torch.autograd.grad(value, parameters)

    return run


def _inputs(shapes, images, rng) -> dict[str, Tensor]:
    draw = functools.partial(torch.randn, generator=rng, device=rng.device)
    named = {"x": torch.rand(images, generator=rng, device=rng.device).round()}
    for name, shape in shapes.items():
        named[name] = draw(shape) * (shape[1] ** -0.5 if len(shape) > 1 else 0.1)
    return named
