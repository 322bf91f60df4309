"""Benchmark cases of `genkernels.ops.autoregressive_sampling`: whole images from noise, against the naive definition;
of networks alone, and of a `PixelVAE` with its latents (`genkernels.benchmarks.pixelvaes`).

Bytes: weights, noise and image, each once. Flops: one pass of all stages over their live taps, two a multiplication.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from genkernels import ops
from genkernels.benchmarks.cases import Case
from genkernels.benchmarks.pixelvaes import sampling_case
from genkernels.ops import Stage
from genkernels.ops.autoregressive_sampling import HEADS
from genkernels.reference.autoregressive_sampling import draw_rows, network_output

LEVELS = 16
_NOT_COMPILED = "left out: a loop of hundreds of passes, whose compiled pass the batch 1 row of the full run shows"


def cases(device: str, quick: bool) -> list[Case]:
    if quick:
        return [
            plain((2, 1, 6, 6), width=16, layers=2),
            gated((2, 1, 5, 6), width=8, layers=2),
            mixture((1, 3, 5, 5), width=16, layers=2),
            sampling_case("digits", 2, _NOT_COMPILED, width=8, pixel_width=8),
        ]
    image = (28, 28)
    return [
        plain((1, 1, *image), width=64, layers=8, compiled=True),
        plain((16, 1, *image), width=64, layers=8),
        gated((16, 1, 16, 16), width=32, layers=5),
        mixture((4, 3, 16, 16), width=64, layers=5),
        sampling_case("digits", 16, _NOT_COMPILED),
        sampling_case("photos32", 1, _NOT_COMPILED),
    ]


def plain(shape, width: int, layers: int, compiled: bool = False) -> Case:
    """PixelCNN: 7×7 type A, `layers` 3×3 type B with ReLU, 1×1 to the levels."""
    made = _Drawing()
    made.stage(inputs=((0, (width, shape[1], 7, 7), "before"),), activation="relu")
    for k in range(layers):
        made.stage(inputs=((k + 1, (width, width, 3, 3), "up to"),), activation="relu")
    made.stage(inputs=((layers + 1, (LEVELS, width, 1, 1), "up to"),))
    return made.case("plain", shape, LEVELS, "categorical", compiled)


def gated(shape, width: int, layers: int) -> Case:
    """Gated PixelCNN with a vertical and a horizontal stack (van den Oord et al. 2016b)."""
    made = _Drawing()
    v = h = 0
    for k in range(layers):
        kh, kw = (7, 7) if k == 0 else (3, 3)
        source = width if k else shape[1]
        pre = made.stage(inputs=((v, (2 * width, source, kh, kw), "row" if k else "above"),), vertical=True)
        v = made.stage(added=(pre,), activation="gate", vertical=True)
        left = (h, (2 * width, source, 1, kw), "up to" if k else "before")
        gate = made.stage(inputs=(left, (pre, (2 * width, 2 * width, 1, 1), "up to")), activation="gate")
        h = made.stage(inputs=((gate, (width, width, 1, 1), "up to"),), residual=h or None)
    hidden = made.stage(inputs=((h, (width, width, 1, 1), "up to"),), activation="relu")
    made.stage(inputs=((hidden, (LEVELS, width, 1, 1), "up to"),))
    return made.case("gated", shape, LEVELS, "categorical")


def mixture(shape, width: int, layers: int) -> Case:
    """Residual 3×3 layers to a discretised mixture of 5 logistics over three channels of 256 levels."""
    made = _Drawing()
    last = made.stage(inputs=((0, (width, shape[1], 7, 7), "before"),), activation="relu")
    for _ in range(layers):
        last = made.stage(inputs=((last, (width, width, 3, 3), "up to"),), activation="relu", residual=last)
    made.stage(inputs=((last, (50, width, 1, 1), "up to"),))
    return made.case("mixture", shape, 256, "logistic_mixture")


class _Drawing:
    """A network's shape; its weights are drawn later, as inputs of the case."""

    def __init__(self):
        self.weights: list[tuple[tuple[int, ...], str]] = []
        self.built: list[tuple[dict, list[int]]] = []  # options of a stage, planes that its weights read

    def stage(self, inputs=(), **options) -> int:
        self.built.append((options, [plane for plane, _, _ in inputs]))
        self.weights += [(shape, taps) for _, shape, taps in inputs]
        return len(self.built)

    def stages(self, tensors: list[Tensor]) -> list[Stage]:
        left = iter(tensors)
        return [
            Stage(inputs=inputs, bias=next(left) if inputs else None, **options)
            for options, planes in self.built
            for inputs in [tuple([(plane, next(left)) for plane in planes])]
        ]

    def inputs(self, shape, head, rng) -> dict[str, Tensor]:
        draw = functools.partial(torch.randn, generator=rng, device=rng.device)
        batch, channels, *size = shape
        noise = (batch, channels + (head == "logistic_mixture"), *size)
        drawn = {"noise": torch.rand(noise, generator=rng, device=rng.device)}
        left = iter(self.weights)
        for k, (_, planes) in enumerate(self.built):
            for n, _ in enumerate(planes):
                form, taps = next(left)
                live = _live(form, taps).to(rng.device)
                # the spread of He's initialisation over the live taps: neither vanishing nor saturated
                drawn[f"weight {k}.{n}"] = draw(form) * live * (2 / (form[1] * live.sum())).sqrt()
            if planes:
                drawn[f"bias {k}"] = draw(form[0]) * 0.1
        return drawn

    def case(self, variant, shape, levels, head, compiled=False) -> Case:
        channels, code = shape[1], HEADS.index(head)

        def sample(noise, *tensors):
            return ops.autoregressive_sampling(self.stages(tensors), noise, levels=levels, head=head)

        def naive(noise, *tensors, network=network_output):
            stages, image = self.stages(tensors), noise.new_zeros(shape, dtype=torch.int64)
            draw_rows(lambda x: network(stages, x), image, noise, None, code, levels, 1.0, 0, shape[2])
            return image

        def compiled_inside():
            whole = torch.compile(
                lambda x, *tensors: network_output(self.stages(tensors), x), fullgraph=True, dynamic=False
            )
            return lambda noise, *tensors: naive(noise, *tensors, network=lambda stages, x: whole(x, *tensors))

        macs = sum(form[0] * form[1] * float(_live(form, taps).sum()) for form, taps in self.weights)
        stored = sum(math.prod(form) for form, _ in self.weights)
        return Case(
            name=f"autoregressive_sampling/{variant}",
            shape=shape,
            dtype=torch.float32,
            direction="sample",
            inputs=functools.partial(self.inputs, shape, head),
            op=sample,
            reference=naive,
            outputs=("image",),
            bytes=4 * stored + 12 * math.prod(shape),
            flops=int(2 * macs) * shape[0] * math.prod(shape[2:]),
            settings={"head": head, "levels": levels},
            compiled=compiled_inside if compiled else _NOT_COMPILED,
            yardstick=lambda noise, *tensors: network_output(self.stages(tensors), 2 * noise[:, :channels] - 1),
        )


def _live(form, taps: str) -> Tensor:
    """[kh, kw]: 1 at taps of rows above, of the own row to the left ("before"), with the centre ("up to"), of the whole
    own row ("row")."""
    *_, kh, kw = form
    live = torch.zeros(kh, kw)
    live[: kh // 2] = 1
    live[kh // 2, : {"above": 0, "before": kw // 2, "up to": kw // 2 + 1, "row": kw}[taps]] = 1
    return live
