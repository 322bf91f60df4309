"""Critics whose penalty and whose step the cases of `gradient_penalty` measure, with their weights as inputs.

The yardstick ("one pass") of a step is the same step without penalty: three passes through the critic, where four are
the least with one. Double backward takes seven and more.

Bytes: both batches and the weights read once, the gradients written once. Flops: two a weight and place of its output,
for the sample's passes that the method needs: four for the penalty alone; for a step four times both batches.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from genkernels import losses
from genkernels.benchmarks.cases import Case
from genkernels.networks import trace
from genkernels.reference import gradient_penalty as reference

#: Of R1 and R2, as R3GAN's on CIFAR-10 at its end.
GAMMA = 0.05


class Residual(nn.Module):
    """The critic of WGAN-GP on 32×32 images: four blocks of two 3×3 convolutions, the first two halving the size."""

    def __init__(self, width: int):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(_Block(width, halves) for halves in (True, True, False, False))
        self.head = nn.Linear(width, 1)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(torch.relu(x).mean((2, 3)))


class _Block(nn.Module):
    def __init__(self, width: int, halves: bool):
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.pool = nn.AvgPool2d(2) if halves else nn.Identity()

    def forward(self, x):
        return self.pool(x + self.second(torch.relu(self.first(torch.relu(x)))))


def convolutional(width: int, size: int = 32) -> nn.Module:
    """SN-GAN's eight layers, 3×3 of stride 1 and 4×4 of stride 2 in turn, of the widths w, 2w, 4w and 8w."""
    channels, layers = 3, []
    for factor in (1, 2, 4):
        wide = width * factor
        layers += [nn.Conv2d(channels, wide, 3, 1, 1), nn.LeakyReLU(0.1), nn.Conv2d(wide, 2 * wide, 4, 2, 1)]
        layers += [nn.LeakyReLU(0.1)]
        channels = 2 * wide
    last = [nn.Conv2d(channels, channels, 3, 1, 1), nn.LeakyReLU(0.1), nn.Flatten()]
    return nn.Sequential(*layers, *last, nn.Linear(channels * (size // 8) ** 2, 1))


def penalty_case(variant: str, critic: nn.Module, batch: int, size: int) -> Case:
    def penalty(critic, real, fake):
        return losses.gradient_penalty(critic, real, real)

    def plain(critic, real, fake):
        _, slopes = _slopes(critic, real)
        return reference.gradient_penalty(slopes, 1.0, False)[0].mean()

    return _case(f"{variant} penalty", critic, batch, size, penalty, plain, None, batch)


def step_case(variant: str, critic: nn.Module, batch: int, size: int) -> Case:
    def step(critic, real, fake):
        return losses.critic_step(critic, real, fake, r1=GAMMA, r2=GAMMA)

    def plain(critic, real, fake):
        (r, of_real), (f, of_fake) = _slopes(critic, real), _slopes(critic, fake)
        squares = (reference.gradient_penalty(slopes, 0.0, False)[0] for slopes in (of_real, of_fake))
        r1, r2 = (GAMMA / 2 * each.mean() for each in squares)
        return losses.critic_loss(r, f) + r1 + r2

    def bare(critic, real, fake):
        return losses.critic_step(critic, real, fake)

    return _case(f"{variant} step", critic, batch, size, step, plain, bare, 2 * batch)


def _slopes(critic: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The scores and their gradients by x, to be differentiated again."""
    x = x.requires_grad_()
    scores = critic(x)
    return scores, torch.autograd.grad(scores.sum(), x, create_graph=True)[0]


def _case(variant, critic, batch, size, op, plain, bare, samples) -> Case:
    shapes = {name: tuple(p.shape) for name, p in critic.named_parameters()}
    numbers = sum(math.prod(shape) for shape in shapes.values())
    image = (3, size, size)
    return Case(
        name=f"gradient_penalty/{variant}",
        shape=(batch, *image),
        dtype=torch.float32,
        direction="step",
        inputs=functools.partial(_inputs, shapes, (batch, *image)),
        op=_differentiated(critic, op),
        reference=_differentiated(critic, plain),
        outputs=("loss", *(f"gradient of {name}" for name in shapes)),
        bytes=4 * (2 * batch * math.prod(image) + 2 * numbers),
        flops=4 * samples * _flops(critic, image),
        compiled="torch.compile cannot differentiate twice",
        yardstick=None if bare is None else _differentiated(critic, bare),
    )


def _differentiated(critic: nn.Module, loss: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """A loss of a critic, real and fake samples as a function of these and of the critic's weights, which gives the
    loss and its gradients by the weights."""
    parameters = list(critic.parameters())

    @torch.enable_grad()
    def run(real, fake, *weights):
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.data = weight
        value = loss(critic, real.detach(), fake.detach())
        return value.detach(), *torch.autograd.grad(value, parameters, materialize_grads=True)

    return run


def _inputs(shapes, image, rng) -> dict[str, Tensor]:
    draw = functools.partial(torch.randn, generator=rng, device=rng.device)
    named = {"real": draw(image), "fake": draw(image)}
    for name, shape in shapes.items():
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 100
        named[name] = draw(shape) * math.sqrt((2 if len(shape) > 1 else 1) / fan_in)
    return named


def _flops(critic: nn.Module, image: tuple[int, ...]) -> int:
    """Of one pass of one sample."""
    total = 0
    for step in trace(critic, torch.zeros(1, *image)):
        weight = next((source.read() for source in step.sources if source.role == "weight"), None)
        if weight is not None:
            total += 2 * weight.numel() * math.prod(step.shape[1:])
    return total
