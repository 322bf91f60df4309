"""Small causal networks for the tests of autoregressive_sampling: smooth random weights of a trained network's size."""

from __future__ import annotations

import random

import torch

from genkernels.ops import Stage
from genkernels.reference import _draw
from genkernels.reference._stages import level_values, network_output


def mask(out, size, kind, groups=1, gate=False, source=None, region="raster"):
    """[out, source or out, kh, kw]: 1 where a weight may be other than 0. Written apart from the library's own
    masks."""
    kh, kw = size
    source = source or out
    m = torch.zeros(out, source, kh, kw, dtype=torch.float64)
    m[:, :, : kh // 2] = 1
    if region == "vertical":
        m[:, :, kh // 2] = 1 if kind == "B" else 0
        return m
    if region == "horizontal":
        m[:, :, : kh // 2] = 0
    m[:, :, kh // 2, : kw // 2] = 1
    width = out // 2 if gate else out
    for o in range(out):
        for i in range(source):
            mine, its = (o % width) * groups // width, i * groups // source
            m[o, i, kh // 2, kw // 2] = its < mine or (kind == "B" and its == mine)
    return m


class Maker:
    """Draws weights, one generator a network."""

    def __init__(self, seed=0, dtype=torch.float64, scale=1.6):
        self.rng, self.dtype, self.scale = torch.Generator().manual_seed(seed), dtype, scale

    def draw(self, *shape):
        return torch.randn(shape, generator=self.rng, dtype=torch.float64)

    def weight(self, m):
        fan = max(1.0, float(m.sum()) / m.shape[0])
        return (self.draw(*m.shape) * m * self.scale / fan**0.5).to(self.dtype)

    def bias(self, n, scale=0.3):
        return (self.draw(n) * scale).to(self.dtype)


def plain(
    channels=1,
    levels=5,
    width=12,
    layers=2,
    first=7,
    seed=0,
    dtype=torch.float64,
    out=None,
    groups=None,
    residual=False,
):
    """PixelCNN: first×first type A, `layers` 3×3 type B with ReLU, 1×1 to the head."""
    make = Maker(seed, dtype)
    groups = channels if groups is None else groups
    out = channels * levels if out is None else out
    stages = [
        Stage(
            ((0, make.weight(mask(width, (first, first), "A", groups, source=channels))),),
            bias=make.bias(width),
            activation="relu",
        )
    ]
    for k in range(layers):
        w = make.weight(mask(width, (3, 3), "B", groups))
        stages.append(
            Stage(((k + 1, w),), bias=make.bias(width), activation="relu", residual=k + 1 if residual else None)
        )
    stages.append(
        Stage(((layers + 1, make.weight(mask(out, (1, 1), "B", groups, source=width))),), bias=make.bias(out))
    )
    return stages


def two_stacks(
    channels=1,
    levels=5,
    width=6,
    layers=2,
    seed=0,
    dtype=torch.float64,
    out=None,
    groups=None,
    condition=None,
    kernel=(3, 5),
):
    """Gated PixelCNN (van den Oord et al. 2016b): a vertical stack that sees rows above, a horizontal one that sees it
    and what is to the left.

    condition: None, or a function of the number of channels that gives [N, out] or [N, out, H, W].
    """
    make = Maker(seed, dtype)
    groups = channels if groups is None else groups
    out = channels * levels if out is None else out
    stages, v, h = [], 0, 0
    asked = (lambda n: None) if condition is None else lambda n: condition(n).to(dtype)

    def add(**stage):
        stages.append(Stage(**stage))
        return len(stages)

    for k in range(layers):
        kind, size = ("A", (7, 5)) if k == 0 else ("B", kernel)
        source = channels if k == 0 else width
        pre = add(
            inputs=((v, make.weight(mask(2 * width, size, kind, source=source, region="vertical"))),),
            bias=make.bias(2 * width),
            vertical=True,
        )
        v = add(added=(pre,), activation="gate", vertical=True, condition=asked(2 * width))
        left = make.weight(mask(2 * width, (1, size[1]), kind, groups, gate=True, source=source, region="horizontal"))
        across = make.weight(torch.ones(2 * width, 2 * width, 1, 1))
        gated = add(
            inputs=((h, left), (pre, across)), bias=make.bias(2 * width), activation="gate", condition=asked(2 * width)
        )
        last = h if k else None
        h = add(inputs=((gated, make.weight(mask(width, (1, 1), "B", groups))),), bias=make.bias(width), residual=last)
    hidden = add(inputs=((h, make.weight(mask(2 * width, (1, 1), "B", groups, source=width))),), activation="relu")
    add(inputs=((hidden, make.weight(mask(out, (1, 1), "B", groups, source=2 * width))),), bias=make.bias(out))
    return stages


def cast(stages, dtype, device="cpu"):
    def to(t):
        return None if t is None else t.to(device, dtype)

    return [
        Stage(
            tuple((p, to(w)) for p, w in s.inputs),
            s.added,
            to(s.bias),
            to(s.condition),
            s.activation,
            s.residual,
            s.vertical,
        )
        for s in stages
    ]


def uniform(*shape, seed=0, dtype=torch.float64):
    """Noise that fp32 holds exactly, so that every dtype draws from the same."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(dtype)


def assert_same_draws(ours, expected, stages, noise, levels, head="categorical", temperature=1.0):
    """Identical integers. Where a sample differs, its first differing draw must be a tie: noise within 1e-5 of a
    boundary, in fp64."""
    assert ours.shape == expected.shape and ours.dtype == expected.dtype == torch.int64
    if torch.equal(ours, expected):
        return
    stages, noise, channels = cast(stages, torch.float64), noise.double(), ours.shape[1]
    for n in (ours != expected).flatten(1).any(1).nonzero().flatten().tolist():
        differs = (ours[n] != expected[n]).permute(1, 2, 0).flatten()  # raster order, channels within a pixel
        at = int(differs.nonzero()[0])
        i, j, c = at // channels // ours.shape[3], at // channels % ours.shape[3], at % channels
        one = cast([_of_sample(s, n) for s in stages], torch.float64)
        params = network_output(one, level_values(expected[n : n + 1], levels, torch.float64))[0, :, i, j]
        u = noise[n, :, i, j]
        if head == "categorical":
            near = _near_category(params[c * levels : (c + 1) * levels], u[c], temperature)
        else:
            shift = torch.tensor([-1e-5, 1e-5], dtype=torch.float64)
            moved = [_draw.logistic_mixture(params, (u + s).clamp(0, 1 - 1e-12), levels, temperature) for s in shift]
            near = not torch.equal(moved[0], moved[1])
        assert near, (
            f"sample {n}, pixel ({i}, {j}), channel {c}: {ours[n, c, i, j]} drawn, {expected[n, c, i, j]} expected"
        )


def _of_sample(s, n):
    condition = None if s.condition is None else s.condition[n : n + 1]
    return Stage(s.inputs, s.added, s.bias, condition, s.activation, s.residual, s.vertical)


def _near_category(logits, u, temperature):
    if temperature == 0:
        top = logits.topk(2).values
        return float(top[0] - top[1]) < 1e-5
    return float(((logits / temperature).softmax(0).cumsum(0) - u).abs().min()) < 1e-5


def any_network(seed, groups, channels, out):
    """A random graph of stages that keeps the rules: both directions, several inputs, odd kernels, planes added,
    residuals, gates, conditions."""
    chosen = random.Random(seed)
    make = Maker(seed)
    planes, stages = [(channels, False)], []
    batch, size = chosen.randint(1, 4), (chosen.randint(1, 5), chosen.randint(1, 6))

    def tap_mask(width, gate, plane, vertical):
        source, from_vertical = planes[plane]
        kh, kw = chosen.choice([1, 3, 5]), chosen.choice([1, 3, 5])
        if vertical:
            return mask(width, (kh, kw), "B" if from_vertical else "A", source=source, region="vertical")
        if from_vertical:  # it belongs to no group: its centre is free
            return mask(width, (kh, kw), "B", source=source)
        return mask(width, (kh, kw), "B" if plane else "A", groups, gate, source)

    count = chosen.randint(2, 6)
    for k in range(count + 1):
        last = k == count
        vertical = not last and chosen.random() < 0.4
        activation = "none" if last else chosen.choice(["none", "relu", "gate"])
        gate = activation == "gate"
        width = out if last else groups * chosen.choice([1, 2, 5, 6]) * (2 if gate else 1)
        read = [p for p, (_, v) in enumerate(planes)]
        inputs = [chosen.choice(read[-2:]), *chosen.sample(read, chosen.randint(0, min(2, len(read))))]
        made = width // 2 if gate else width
        beside = [p for p in read[1:] if planes[p][1] or not vertical]
        added = [p for p in beside if planes[p][0] == width and not (gate and groups > 1 and not planes[p][1])]
        residual = [p for p in beside if planes[p][0] == made]
        shape = chosen.choice([None, (batch, width), (batch, width, *size)])
        stages.append(
            Stage(
                inputs=tuple((p, make.weight(tap_mask(width, gate, p, vertical))) for p in inputs),
                added=tuple(chosen.sample(added, min(len(added), chosen.randint(0, 2)))),
                bias=make.bias(width) if chosen.random() < 0.7 else None,
                condition=make.draw(*shape) * 0.3 if shape else None,
                activation=activation,
                residual=chosen.choice([None, *residual]),
                vertical=vertical,
            )
        )
        planes.append((made, vertical))
    return stages, (batch, *size)
