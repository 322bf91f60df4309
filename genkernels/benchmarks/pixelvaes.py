"""Whole samples of a `PixelVAE` that cases of `autoregressive_sampling` measure, from noise, with its weights as
inputs: the levels' latents from their priors, whose cells see one another, the decoder, and the pixels.

The reference is the naive loop: a pass of a prior for every cell of its grid, a pass of the whole PixelCNN for every
pixel. Its passes bound what can be gained: of D pixels no more than D times, were all else free, and the 8×8 digits
have 64.

The yardstick ("one pass") is one of each: of the levels, their latents given, of the decoder, and of the PixelCNN.

Bytes: weights, noise and image, each once. Flops: one pass of the PixelCNN over its live taps, two a multiplication.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from genkernels import ops
from genkernels.backends import use_backend
from genkernels.benchmarks.cases import Case
from genkernels.nn import MaskedConv2d


def sampling_case(preset: str, count: int, compiled: str, **sizes) -> Case:
    """`count` images of a preset; `sizes` in place of some of its own. compiled: why there is no such baseline."""
    from genkernels.models import PixelVAE  # not for a look at the catalogue

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = PixelVAE.from_preset(preset, **sizes).eval()
    network, shapes = model.likelihood.network, dict(model.named_parameters())
    uniform = (count, model.shape[0] + (network.head == "logistic_mixture"), *model.shape[1:])

    def sample(noise: Tensor, latents: Tensor, *weights: Tensor) -> Tensor:
        features = _features(model, latents, weights)
        stages = network.stages(features)
        return ops.autoregressive_sampling(stages, noise, levels=model.grey_levels, head=network.head)

    def naive(*tensors: Tensor) -> Tensor:
        with use_backend("reference"):
            return sample(*tensors)

    def one_pass(noise: Tensor, latents: Tensor, *weights: Tensor) -> Tensor:
        features = _features(model, latents, weights, held=True)
        return network(2 * noise[:, : model.shape[0]] - 1, features)

    live = sum(float(m.masked_weight().count_nonzero()) for m in network.modules() if isinstance(m, MaskedConv2d))
    live += sum(block.link.weight.numel() for block in network.blocks)
    stored = sum(p.numel() for p in model.parameters())
    return Case(
        name=f"autoregressive_sampling/pixelvae,{preset}",
        shape=(count, *model.shape),
        dtype=torch.float32,
        direction="sample",
        inputs=functools.partial(_inputs, shapes, (count, model.latent), uniform),
        op=sample,
        reference=naive,
        outputs=("image",),
        bytes=4 * stored + 12 * count * model.dim,
        flops=int(2 * live) * count * math.prod(model.shape[1:]),
        settings={"head": network.head, "levels": model.grey_levels},
        compiled=compiled,
        yardstick=one_pass,
    )


def _features(model, latents: Tensor, weights: tuple[Tensor, ...], held: bool = False) -> Tensor:
    """What the PixelCNN is given, of the levels' noise; or of latents, where it stands for them."""
    for parameter, weight in zip(model.parameters(), weights, strict=True):
        parameter.data = weight
    levels = model.as_levels(latents)
    drawn = model.posterior(len(latents), levels, held=levels if held else None)
    return model.decoder(drawn.features)


def _inputs(shapes, latents, uniform, rng) -> dict[str, Tensor]:
    """The model's own first weights; some tenths more where all are one number: 0, with which no cell would see
    another, or the 1 of a normalisation."""
    draw = functools.partial(torch.randn, generator=rng, device=rng.device)
    named = {"noise": torch.rand(uniform, generator=rng, device=rng.device), "latents": draw(latents)}
    for name, own in shapes.items():
        fan = max(own[0].numel(), 1) if own.dim() > 1 else 10
        own = own.detach().to(rng.device)
        named[name] = own if own.unique().numel() > 1 else own + 0.3 * draw(own.shape) * fan**-0.5
    return named
