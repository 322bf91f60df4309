"""autoregressive_sampling on every implementation that runs here: the very integers of the naive definition, and the
definition itself by hand."""

import itertools
import math

import pytest
import torch

import genkernels as gk
from genkernels import backends, ops
from genkernels.ops import Stage
from genkernels.ops.autoregressive_sampling import HEADS
from genkernels.reference._stages import flatten
from tests.checks import behind, beside_forbidden_memory, pairwise
from tests.ops.causal_networks import Maker, any_network, assert_same_draws, cast, mask, plain, two_stacks, uniform

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned_memory")
compiled = pytest.mark.implementations(reference=False)
quick = pytest.mark.implementations(slow=False)
F32, F64 = torch.float32, torch.float64
sample = ops.autoregressive_sampling


def example(device="cpu", dtype=F64):
    """A 3×3 type-A stage with a gate, then 1×1 to three levels, over images of 2×3 pixels: `(function of tensors,
    tensors)`; the function returns a tuple of tensors."""
    generator = torch.Generator().manual_seed(2)
    first = torch.randn(8, 1, 3, 3, generator=generator, dtype=F64)
    first.flatten(2)[:, :, 4:] = 0
    second = torch.randn(3, 4, 1, 1, generator=generator, dtype=F64)
    noise = torch.rand(2, 1, 2, 3, generator=generator, dtype=F64)

    def function(noise, first, second):
        stages = [Stage(((0, first),), activation="gate"), Stage(((1, second),))]
        return (sample(stages, noise, levels=3),)

    return function, tuple(t.to(device, dtype) for t in (noise, first, second))


SAMPLES = {"autoregressive_sampling": example}


@pytest.fixture
def slow(implementation):
    return implementation.is_slow


@pytest.fixture
def interpreted(implementation):
    return implementation.name == "triton interpreted"


def naive(stages, noise, **options):
    with gk.use_backend("reference"):
        return sample(stages, noise, **options)


def check(device, stages, noise, dtype=F64, **options):
    """Ours on `device` against the definition on the CPU, in `dtype`."""
    stages, noise = cast(stages, dtype), noise.to(dtype)
    if backends.current_backend() == "reference":
        return sample(stages, noise, **options)  # the definition itself: tests look at what it gives
    there = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    ours = sample(cast(stages, dtype, device), noise.to(device), **there).cpu()
    expected = naive(stages, noise, **options)
    plain_options = {k: options[k] for k in ("levels", "head", "temperature") if k in options}
    assert_same_draws(ours, expected, stages, noise, **plain_options)
    return ours


# --- the definition, by hand --------------------------------------------------------------------------------------


def by_hand(weight1, bias1, weight2, bias2, noise, levels):
    """Loops over numbers: 3×3 type A with ReLU, then 1×1 to logits; one sample, one channel."""
    height, width = len(noise), len(noise[0])
    hidden = len(bias1)
    image = [[None] * width for _ in range(height)]
    for i, j in itertools.product(range(height), range(width)):
        features = []
        for o in range(hidden):
            total = bias1[o]
            for dy, dx in ((-1, -1), (-1, 0), (-1, 1), (0, -1)):
                if 0 <= i + dy and 0 <= j + dx < width:
                    total += weight1[o][dy + 1][dx + 1] * (2 * image[i + dy][j + dx] / (levels - 1) - 1)
            features.append(max(total, 0.0))
        weights = [math.exp(bias2[k] + sum(weight2[k][o] * f for o, f in enumerate(features))) for k in range(levels)]
        level, k = noise[i][j] * sum(weights), 0
        below = weights[0]
        while k < levels - 1 and below <= level:
            k += 1
            below += weights[k]
        image[i][j] = k
    return image


@pytest.mark.parametrize("size", [(1, 1), (4, 6), (5, 3)])
def test_against_loops_over_numbers(device, size):
    stages = plain(width=4, layers=0, first=3, levels=3, seed=4)
    (_, w1), (_, w2) = stages[0].inputs[0], stages[1].inputs[0]
    noise = uniform(2, 1, *size, seed=5)
    drawn = sample(cast(stages, F64, device), noise.to(device), levels=3).cpu()
    for n in range(2):
        expected = by_hand(
            w1[:, 0].tolist(),
            stages[0].bias.tolist(),
            w2[:, :, 0, 0].tolist(),
            stages[1].bias.tolist(),
            noise[n, 0].tolist(),
            3,
        )
        assert drawn[n, 0].tolist() == expected


@quick
def test_draws_follow_the_network(device):
    """Every row of 20,000 samples of one pixel: frequencies within 4 standard errors of the softmax."""
    bias = torch.tensor([0.3, -1.0, 1.2, 0.0])
    stages = [Stage(((0, torch.zeros(4, 1, 1, 1, device=device)),), bias=bias.to(device))]
    n = 20_000
    drawn = sample(stages, uniform(n, 1, 1, 1, dtype=F32).to(device), levels=4)
    share = drawn.flatten().bincount(minlength=4).cpu() / n
    expected = bias.softmax(0)
    assert ((share - expected).abs() <= 4 * (expected * (1 - expected) / n).sqrt()).all()


# --- cached against naive -----------------------------------------------------------------------------------------


@pytest.mark.implementations(when=lambda i, shape, dtype: not i.is_interpreted or dtype == (F32, F64)[shape % 2])
@pytest.mark.implementations(when=lambda i, shape, **_: not i.is_slow or shape < 4)
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("shape", range(7))
def test_plain(device, slow, dtype, shape):
    """Odd sizes, W ≠ H, images smaller than the 7×7 kernel, batches of 1, 16 and odd."""
    shapes = [(1, 9, 7), (16, 5, 6), (3, 4, 11), (2, 2, 3), (1, 1, 1), (5, 1, 8), (2, 8, 1)]
    few = [(1, 4, 5), (3, 3, 2), (1, 1, 1), (2, 1, 6)]
    batch, height, width = (few if slow else shapes)[shape]
    check(device, plain(seed=1), uniform(batch, 1, height, width, seed=2), dtype, levels=5)


WIDTHS = {"triton interpreted": (1, 33, 70), "cuda emulated": (1, 33, 64, 600)}


@pytest.mark.implementations(when=lambda i, width: width in WIDTHS.get(i.name, (1, 7, 16, 17, 33, 64, 72)))
@pytest.mark.parametrize("width", [1, 7, 16, 17, 33, 64, 70, 72, 600])
def test_widths(device, slow, width):
    """Of vectors that a processor has, and beside them; not a multiple of what is loaded at once, more than a tile; 600
    channels take two turns of the 512 threads of a block."""
    if slow:
        check(device, plain(width=width, layers=1, seed=2), uniform(1, 1, 2, 3, seed=2), F32, levels=5)
        return
    for dtype in (F32, F64):
        check(device, plain(width=width, levels=3, seed=2), uniform(3, 1, 4, 5, seed=width), dtype, levels=3)


def test_residual_and_large_kernels(device, interpreted):
    if interpreted:  # more columns than a tile of a row's products has
        check(device, plain(layers=1, residual=True, first=9, seed=3), uniform(1, 1, 2, 37), F32, levels=5)
        return
    check(device, plain(first=9, residual=True, seed=3), uniform(2, 1, 5, 4, seed=3), F32, levels=5)


@pytest.mark.every_build
@pytest.mark.implementations(when=lambda i, dtype, **_: not i.is_interpreted or dtype == F32)  # F64: of channel groups
@pytest.mark.implementations(when=lambda i, batch, **_: not i.is_slow or batch == 1)
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("batch", [1, 7])
def test_two_stacks(device, slow, dtype, batch):
    size = (2, 1, 3, 3) if slow else (batch, 1, 6, 5)
    check(device, two_stacks(seed=1, layers=2 if slow else 3), uniform(*size, seed=4), dtype, levels=5)


@pytest.mark.implementations(only=("triton", "triton interpreted"))
@pytest.mark.parametrize("n", [5, 9])
def test_several_samples_a_program(device, interpreted, n):
    """Two and four by the interpreter, the last program not full."""
    if not interpreted or n == 9:
        check(device, plain(seed=1), uniform(n, 1, 2, 3, seed=2), F32, levels=5)
    if not interpreted or n == 5:
        check(device, two_stacks(seed=1, layers=1), uniform(n, 1, 2, 2, seed=4), F32, levels=5)


@pytest.mark.parametrize("maps", [False, True])
def test_conditional(device, slow, interpreted, maps):
    """In blocks of rows too: a block sees its own rows of a map."""
    make = Maker(7)
    batch, size = (2, (3, 2)) if slow else (3, (5, 4))
    stages = two_stacks(
        seed=2, layers=1 if slow else 2, condition=lambda n: make.draw(batch, n, *(size if maps else ()))
    )
    noise = uniform(batch, 1, *size, seed=6)
    for dtype in (F32, F64) if not interpreted else (F64,) if maps else (F32,):
        ours = check(device, stages, noise, dtype, levels=5)
    check(device, stages, noise, F32, levels=5, rows_per_call=2)
    without = [Stage(s.inputs, s.added, s.bias, None, s.activation, s.residual, s.vertical) for s in stages]
    assert not torch.equal(ours, naive(without, noise, levels=5))


@pytest.mark.every_build
@pytest.mark.parametrize("dtype", [F32, F64])
def test_channel_groups(device, slow, dtype):
    if slow:
        check(device, plain(channels=3, width=9, levels=4, seed=5), uniform(2, 3, 3, 3, seed=7), dtype, levels=4)
        stacks = two_stacks(channels=3, width=9, levels=4, seed=6, layers=1)
        check(device, stacks, uniform(1, 3, 2, 3, seed=8), dtype, levels=4)
        return
    check(device, plain(channels=3, width=9, levels=4, seed=5), uniform(2, 3, 4, 5, seed=7), dtype, levels=4)
    check(
        device,
        plain(channels=3, width=54, levels=4, seed=5, residual=True),
        uniform(3, 3, 3, 4, seed=7),
        dtype,
        levels=4,
    )
    check(device, two_stacks(channels=3, width=9, levels=4, seed=6), uniform(3, 3, 5, 3, seed=8), dtype, levels=4)
    check(device, plain(channels=2, width=8, levels=2, seed=8), uniform(1, 2, 6, 6, seed=9), dtype, levels=2)


TEMPERATURES = [0.0, 0.7, 1.0]
MET = pairwise([F32, F64], [1, 3], TEMPERATURES)


@pytest.mark.every_build
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("channels,out", [(1, 9), (3, 40)])
def test_logistic_mixture(device, slow, interpreted, dtype, channels, out):
    if slow:
        stages = plain(channels=channels, out=out, groups=1, seed=9, layers=1)
        noise = uniform(2, 1 + channels, 3, 3, seed=2)
        for temperature in behind(MET, dtype, channels) if interpreted else TEMPERATURES:
            options = {"levels": 64, "head": "logistic_mixture", "temperature": temperature}
            check(device, stages, noise, dtype, **options)
        return
    stages = two_stacks(channels=channels, seed=channels, out=out, groups=1)
    noise = uniform(3, 1 + channels, 5, 4, seed=channels)
    drawn = check(device, stages, noise, dtype, levels=256, head="logistic_mixture")
    assert len(drawn.unique()) > 20


@pytest.mark.implementations(when=lambda i, temperature: not i.is_interpreted or temperature in (0.0, 1.7))
@pytest.mark.parametrize("temperature", [0.0, 0.5, 0.7, 1.7])
def test_temperature(device, slow, temperature):
    size = (2, 1, 3, 3) if slow else (2, 1, 5, 5)
    check(device, plain(seed=9), uniform(*size, seed=1), F32, levels=5, temperature=temperature)
    if slow:
        return
    mixture = plain(channels=3, out=20, groups=1, seed=9)
    options = {"levels": 64, "head": "logistic_mixture", "temperature": temperature}
    check(device, mixture, uniform(2, 4, 4, 5, seed=2), F32, **options)


def test_temperature_0_takes_the_first_of_the_largest(device):
    bias = torch.tensor([0.0, 2.0, 2.0, 1.0], device=device)
    stages = [Stage(((0, torch.zeros(4, 1, 1, 1, device=device)),), bias=bias)]
    assert (sample(stages, uniform(2, 1, 2, 2, dtype=F32).to(device), levels=4, temperature=0) == 1).all()


SEEDS = {"triton interpreted": (4, 8, 10), "cuda emulated": (0, 3, 5)}


@pytest.mark.implementations(when=lambda i, seed, **_: seed in SEEDS.get(i.name, range(12)))
@pytest.mark.implementations(when=lambda i, seed, groups: not i.is_interpreted or seed == SEEDS[i.name][groups - 1])
@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("seed", range(12))
def test_any_network(device, implementation, seed, groups):
    stages, (batch, *size) = any_network(seed, groups, channels=groups, out=3 * groups)
    if not implementation.is_slow:
        check(device, stages, uniform(batch, groups, *size, seed=seed), F64, levels=3)
    check(device, stages, uniform(batch, groups, *size, seed=seed), F32, levels=3)


@quick
@pytest.mark.parametrize("seed", range(4))
def test_any_network_to_a_mixture(device, seed):
    stages, (batch, *size) = any_network(100 + seed, 1, channels=3, out=20)
    check(device, stages, uniform(batch, 4, *size, seed=seed), F32, levels=32, head="logistic_mixture")


def test_many_levels(device, slow, interpreted):
    if slow:  # more categories than are read at once
        levels = 2500 if interpreted else 300
        for temperature in (0.0, 1.0):
            stages = plain(levels=levels, layers=0 if interpreted else 1, width=4, seed=4)
            check(device, stages, uniform(1, 1, 2, 3, seed=1), F32, levels=levels, temperature=temperature)
        return
    drawn = check(device, plain(levels=256, seed=4), uniform(2, 1, 5, 6, seed=4), F32, levels=256)
    assert len(drawn.unique()) > 20


# --- in-painting --------------------------------------------------------------------------------------------------


@pytest.mark.implementations(when=lambda i, which, **_: not i.is_slow or which == "some channels")
@pytest.mark.parametrize("which", ["pixels", "columns", "some channels", "all", "none"])
@pytest.mark.parametrize("head", ["categorical", "logistic_mixture"])
def test_in_painting(device, slow, which, head):
    channels, levels = 3, 4
    categorical = head == "categorical"
    stages = plain(channels, levels, width=9, seed=3, out=None if categorical else 10, groups=3 if categorical else 1)
    size = (2, 4) if slow else (5, 4)
    noise = uniform(2, 3 if categorical else 4, *size, seed=2)
    rng = torch.Generator().manual_seed(1)
    image = torch.randint(0, levels, (2, 3, *size), generator=rng)
    known = {
        "pixels": torch.rand(2, 1, *size, generator=rng) < 0.5,
        "columns": torch.tensor([True, False, False, True]),
        "some channels": torch.rand(2, 3, *size, generator=rng) < 0.5,
        "all": torch.tensor(True),
        "none": torch.zeros(1, 1, 1, 1, dtype=torch.bool),
    }[which]
    before = image.clone()
    drawn = check(device, stages, noise, F32, levels=levels, head=head, image=image, known=known)
    kept = known.expand(image.shape)
    assert torch.equal(drawn[kept], image[kept]) and torch.equal(image, before)
    garbage = torch.where(kept, image, -9)
    again = sample(
        cast(stages, F32, device),
        noise.float().to(device),
        levels=levels,
        head=head,
        image=garbage.to(device),
        known=known.to(device),
    )
    assert torch.equal(again.cpu(), drawn)
    if which == "none":
        assert torch.equal(drawn, naive(cast(stages, F32), noise.float(), levels=levels, head=head))


@quick
def test_known_pixels_shape_what_follows(device):
    stages = cast(plain(seed=1), F32, device)
    noise = uniform(1, 1, 6, 6, seed=1, dtype=F32).to(device)
    free = sample(stages, noise, levels=5)
    image = 4 - free
    known = torch.zeros(1, 1, 6, 6, dtype=torch.bool, device=device)
    known[..., 2, 3] = True
    drawn = sample(stages, noise, levels=5, image=image, known=known)
    assert torch.equal(drawn[..., :2, :], free[..., :2, :]) and torch.equal(drawn[..., 2, :3], free[..., 2, :3])
    assert not torch.equal(drawn[..., 2:, :][~known[..., 2:, :]], free[..., 2:, :][~known[..., 2:, :]])


# --- blocks of rows, progress, repeats ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "network",
    [plain(seed=2), two_stacks(seed=2), plain(channels=3, width=9, seed=2)],
    ids=["plain", "stacks", "groups"],
)
def test_blocks_of_rows_give_the_same(device, slow, network, request):
    stages = cast(network, F32, device)
    channels = stages[0].inputs[0][1].shape[1]
    height = 9 if not slow else 5 if "plain" in request.node.name else 3
    size = (1, channels, height, 2) if slow else (3, channels, height, 4)
    noise = uniform(*size, seed=3, dtype=F32).to(device)
    whole = sample(stages, noise, levels=5)
    assert_same_draws(whole.cpu(), naive(cast(stages, F32), noise.cpu(), levels=5), stages, noise.cpu(), levels=5)
    for rows in (2,) if slow else (1, 2, 5, 9, 40):
        calls = []
        assert torch.equal(
            sample(stages, noise, levels=5, rows_per_call=rows, progress=lambda *a, c=calls: c.append(a)), whole
        )
        assert calls == [(min(end, height), height) for end in range(rows, height + rows, rows)]


@quick
def test_an_error_in_progress_ends_the_call(device):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(
            cast(plain(), F32, device), torch.rand(1, 1, 4, 4, device=device), levels=5, progress=stop, rows_per_call=1
        )


@compiled
@pytest.mark.implementations(slow=False)  # where the others run, one thread goes through a launch in its order
@pytest.mark.threads
def test_repeats_are_bitwise_the_same_for_any_number_of_threads(device, implementation):
    stages = cast(plain(width=40, seed=6), F32, device)
    noise = uniform(11, 1, 6, 7, seed=6, dtype=F32).to(device)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 2, 3) if implementation.name == "cpu" else (threads,) * 2:
            torch.set_num_threads(count)
            found.append(sample(stages, noise, levels=5))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], f) for f in found[1:])


def test_a_sample_does_not_depend_on_its_batch(device, slow):
    stages = cast(plain(width=8 if slow else 40, layers=1 if slow else 2, seed=6), F64, device)
    noise = uniform(9, 1, *((2, 2) if slow else (5, 5)), seed=7).to(device)
    together = sample(stages, noise, levels=5)
    for n in (0, 4, 8):
        assert torch.equal(sample(stages, noise[n : n + 1], levels=5), together[n : n + 1])


# --- inputs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 1, 4, 4), (2, 1, 0, 4), (2, 1, 4, 0)])
def test_empty(device, shape):
    drawn = sample(cast(plain(), F32, device), torch.rand(shape, device=device), levels=5)
    assert drawn.shape == shape and drawn.dtype == torch.int64


@quick
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_computed_in_fp32(device, dtype):
    stages, noise = cast(plain(seed=1), dtype, device), uniform(2, 1, 4, 5, dtype=F32).to(device)
    assert torch.equal(sample(stages, noise, levels=5), sample(cast(stages, F32, device), noise, levels=5))


@quick
def test_any_strides(device):
    stages, noise = cast(plain(seed=1), F32, device), uniform(2, 1, 6, 5, dtype=F32).to(device)
    twisted = [
        Stage(
            tuple((p, w.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)) for p, w in s.inputs),
            bias=s.bias.repeat(2)[::2].copy_(s.bias),
            activation=s.activation,
        )
        for s in stages
    ]
    expected = sample(stages, noise, levels=5)
    assert torch.equal(sample(twisted, noise.transpose(2, 3).contiguous().transpose(2, 3), levels=5), expected)
    wide = torch.empty(4, 2, 12, 5, device=device).fill_(math.nan)
    wide[::2, 1:, ::2] = noise
    assert torch.equal(sample(twisted, wide[::2, 1:, ::2], levels=5), expected)


def test_inputs_are_not_written(device, slow):
    side = 2 if slow else 4
    stages, noise = cast(two_stacks(seed=1), F32, device), uniform(2, 1, side, side, dtype=F32).to(device)
    before = [t.clone() for s in stages for t in s.tensors()] + [noise.clone()]
    sample(stages, noise, levels=5)
    assert all(
        torch.equal(a, b) for a, b in zip([t for s in stages for t in s.tensors()] + [noise], before, strict=True)
    )


@pytest.mark.implementations(only=("cpu", "triton interpreted", "cuda emulated"))
@pytest.mark.parametrize("after", [False, True])
def test_no_access_outside_the_inputs(device, slow, after):
    """An access outside ends the process."""

    def place(t):
        return None if t is None else beside_forbidden_memory(t, after)

    stages, noise = cast(two_stacks(seed=1, layers=1), F32), uniform(1, 1, *((2, 2) if slow else (3, 3)), dtype=F32)
    moved = [
        Stage(
            tuple((p, place(w)) for p, w in s.inputs),
            s.added,
            place(s.bias),
            None,
            s.activation,
            s.residual,
            s.vertical,
        )
        for s in stages
    ]
    assert torch.equal(sample(moved, place(noise), levels=5), sample(stages, noise, levels=5))


@compiled
def test_a_wrong_state_or_plan_is_refused(functions, implementation, device):
    stages, noise = cast(plain(), F32, device), uniform(1, 1, 2, 2, dtype=F32).to(device)
    tensors, plan = flatten(stages, 1, 2)
    image = torch.zeros(1, 1, 2, 2, dtype=torch.int64, device=device)
    rest = (noise, None, tensors, plan, 0, 5, 1.0, 0, 2)
    with pytest.raises((RuntimeError, ValueError), match="autoregressive_sampling: state must be"):
        functions.autoregressive_sampling(image, noise.new_zeros(1, 3), *rest)
    if "triton" not in implementation.name:  # whose launcher reads it in Python
        with pytest.raises(RuntimeError, match="autoregressive_sampling: the plan ends early"):
            functions.autoregressive_sampling(image, noise.new_zeros(1, 3), noise, None, tensors, plan[:-2], *rest[4:])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_weights_draw_as_the_definition(device, slow, temperature):
    for last in (False, True):
        stages = plain(seed=1)
        stages[-1 if last else 0].bias[3] = math.nan
        size = (2, 2) if slow else (3, 3)
        drawn = check(device, stages, uniform(2, 1, *size), F32, levels=5, temperature=temperature)
        assert (drawn == 0).all()


NOT_FINITE, KNOWN = [math.nan, math.inf], ["nothing said", "none", "some"]
MET_NOT_FINITE = pairwise(HEADS, [0.0, 1.0], NOT_FINITE, KNOWN)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_parameters_that_are_not_finite_give_level_0(device, interpreted, head, temperature):
    """NaN and infinite ones, as the definition has it, whatever is known."""
    mixture = head == "logistic_mixture"
    stages = plain(channels=3, levels=4, layers=0, out=10 if mixture else 12, groups=1 if mixture else 3)
    noise = uniform(2, 4 if mixture else 3, 2, 2, dtype=F32)
    every = itertools.product(NOT_FINITE, KNOWN)
    if interpreted:
        every = [row[2:] for row in MET_NOT_FINITE if row[:2] == (head, temperature)]
    for bad, which in every:
        stages[-1].bias[1] = bad
        given = {"levels": 4, "head": head, "temperature": temperature}
        if which != "nothing said":
            known = torch.zeros(1, 3, 1, 1, dtype=torch.bool) if which == "none" else torch.rand(2, 3, 2, 2) < 0.5
            given |= {"image": torch.randint(0, 4, (2, 3, 2, 2)), "known": known}
        there = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        ours = sample(cast(stages, F32, device), noise.to(device), **there).cpu()
        assert torch.equal(ours, naive(cast(stages, F32), noise, **given))


def test_a_mean_that_is_not_a_number_passes_on_to_later_channels(device):
    """Unless the channel is known: then its value does."""
    stages = plain(channels=3, levels=256, layers=0, out=10, groups=1)
    stages[-1].bias[1] = math.nan  # of channel 0, the only component
    noise, image = uniform(1, 4, 2, 2, dtype=F32), torch.full((1, 3, 2, 2), 100)
    for first in (False, True):
        known = torch.zeros(1, 3, 2, 2, dtype=torch.bool)
        known[:, 0] = first
        given = {"levels": 256, "head": "logistic_mixture"}
        there = {"image": image.to(device), "known": known.to(device)}
        ours = sample(cast(stages, F32, device), noise.to(device), **given, **there).cpu()
        assert torch.equal(ours, naive(cast(stages, F32), noise, **given, image=image, known=known))
        assert bool(ours[:, 1:].any()) == first


def test_noise_that_fp32_rounds_to_1_stays_below(device):
    """A level without probability is not drawn."""
    bias = torch.tensor([0.0, 0.0, 0.0, -math.inf], device=device)
    stages = [Stage(((0, torch.zeros(4, 1, 1, 1, device=device)),), bias=bias)]
    assert sample(stages, torch.full((1, 1, 1, 1), 1 - 2.0**-40, dtype=F64, device=device), levels=4).item() == 2


@quick
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("temperature", [1e-300, 1e-39, 1e39, 1e300])
def test_temperatures_beyond_fp32(device, temperature, dtype):
    """As 0, and as one so high that every level is as likely as the next."""
    stages, noise = plain(seed=9), uniform(2, 1, 5, 5, seed=1)
    drawn = check(device, stages, noise, dtype, levels=5, temperature=temperature)
    expected = (5 * noise).long() if temperature > 1 else naive(cast(stages, dtype), noise, levels=5, temperature=0)
    assert torch.equal(drawn, expected)
    mixture = plain(channels=3, out=20, groups=1, seed=9)
    options = {"levels": 64, "head": "logistic_mixture", "temperature": temperature}
    check(device, mixture, uniform(2, 4, 4, 5, seed=2), dtype, **options)


# --- bad input ----------------------------------------------------------------------------------------------------


def one(weight=None, **changes):
    """A single stage over [2, 1, 4, 4] with 3 levels."""
    return [Stage(((0, torch.zeros(3, 1, 3, 3) if weight is None else weight),), **changes)]


def tap(y, x, size=3, out=3, source=1, o=0, i=0):
    w = torch.zeros(out, source, size, size)
    w[o, i, y, x] = 1.0
    return w


def second(**changes):
    return [Stage(((0, torch.zeros(4, 1, 3, 3)),)), Stage(**{"inputs": ((1, torch.zeros(3, 4, 1, 1)),), **changes})]


NOISE = torch.rand(2, 1, 4, 4)
IMAGE, KNOWN = torch.zeros(2, 1, 4, 4, dtype=torch.int64), torch.ones(2, 1, 4, 4, dtype=torch.bool)
BAD = {
    "after the centre": (one(tap(1, 2)), {}, "stage 0: weight of plane 0 must be 0 at taps after the centre"),
    "below the centre": (one(tap(2, 0)), {}, "stage 0: weight of plane 0 must be 0 at taps after the centre"),
    "at the centre": (
        one(tap(1, 1)),
        {},
        "stage 0: weight of plane 0 must be 0 at the centre, a pixel would see itself",
    ),
    "second stage": (
        second(inputs=((1, tap(1, 2, out=3, source=4)),)),
        {},
        "stage 1: weight of plane 1 must be 0 at taps after the centre",
    ),
    "vertical": (
        one(tap(1, 0), vertical=True),
        {},
        "stage 0: weight of plane 0 must be 0 at rows from its own on, plane 0 not being vertical",
    ),
    "vertical below": (
        [Stage(((0, torch.zeros(4, 1, 3, 3)),), vertical=True), Stage(((1, tap(2, 0, source=4)),), vertical=True)],
        {},
        "stage 1: weight of plane 1 must be 0 at rows below its own, for a vertical stage",
    ),
    "even kernel": (
        one(torch.zeros(3, 1, 2, 3)),
        {},
        r"stage 0: weight of plane 0 must have odd kh and kw, got \[3, 1, 2, 3\]",
    ),
    "unknown plane": (
        second(inputs=((2, torch.zeros(3, 4, 1, 1)),)),
        {},
        "stage 1: planes that it reads must be 0 to 1, got 2",
    ),
    "unknown residual": (second(residual=7), {}, "stage 1: planes that it reads must be 0 to 1, got 7"),
    "added image": (
        second(added=(0,)),
        {},
        "stage 1: plane 0 must not be added or a residual, a pixel would see itself",
    ),
    "vertical adds": (
        second(added=(1,), vertical=True),
        {},
        "stage 1: a vertical stage must add vertical planes only, plane 1 is not vertical",
    ),
    "channels": (
        second(inputs=((1, torch.zeros(3, 5, 1, 1)),)),
        {},
        r"stage 1: weight of plane 1 must be .* = \[3, 4, kh, kw\], got \[3, 5, 1, 1\]",
    ),
    "added channels": (second(added=(1,)), {}, "stage 1: added plane 1 must have 3 channels, got 4"),
    "residual channels": (second(residual=1), {}, "stage 1: residual plane 1 must have 3 channels, got 4"),
    "bias": (one(bias=torch.zeros(4)), {}, r"stage 0: bias must be \[out\] = \[3\], got \[4\]"),
    "condition": (one(condition=torch.zeros(2, 4)), {}, r"stage 0: condition must be .* got \[2, 4\]"),
    "odd gate": (one(activation="gate"), {}, "stage 0: gate must have an even number of channels, got 3"),
    "activation": (one(activation="gelu"), {}, "stage 0: activation must be one of none, relu, gate, got 'gelu'"),
    "nothing read": (
        [Stage(bias=torch.zeros(3))],
        {},
        "stage 0: must read a plane, by inputs or by added, got neither",
    ),
    "no stages": ([], {}, "stages must hold at least one Stage, got none"),
    "levels": (one(), {"levels": 4}, r"last plane must have C \* levels = 1 \* 4 = 4 channels, got 3"),
    "one level": (one(), {"levels": 1}, "levels must be an integer of at least 2, got 1"),
    "levels of a mixture": (
        one(),
        {"levels": 65537, "head": "logistic_mixture"},
        "levels must be an integer from 2 to 65536, got 65537",
    ),
    "head": (one(), {"head": "normal"}, "head must be one of categorical, logistic_mixture, got 'normal'"),
    "mixture noise": (
        one(),
        {"head": "logistic_mixture"},
        r"noise must be \[N, 1 \+ C, H, W\] with C = 1 or 3 .* got \[2, 1, 4, 4\]",
    ),
    "temperature": (one(), {"temperature": -0.5}, "temperature must be a finite number, 0 or more, got -0.5"),
    "rows": (one(), {"rows_per_call": 0}, "rows_per_call must be an integer of at least 1, got 0"),
    "image alone": (one(), {"image": IMAGE}, "image and known must be given together, got image without known"),
    "known alone": (one(), {"known": KNOWN}, "image and known must be given together, got known without image"),
    "image shape": (
        one(),
        {"image": IMAGE[:1], "known": KNOWN},
        r"image must be \[N, C, H, W\] = \[2, 1, 4, 4\], got \[1, 1, 4, 4\]",
    ),
    "known shape": (
        one(),
        {"image": IMAGE, "known": KNOWN[..., :3]},
        r"known must be broadcastable .* got \[2, 1, 4, 3\]",
    ),
    "known values": (
        one(),
        {"image": IMAGE + 3, "known": KNOWN},
        "known pixels must lie in 0 to levels - 1 = 2, got 3",
    ),
    "negative": (one(), {"image": IMAGE - 1, "known": KNOWN}, "known pixels must lie in 0 to levels - 1 = 2, got -1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    stages, options, sentence = BAD[name]
    with pytest.raises(ValueError, match=f"^autoregressive_sampling: .*{sentence}"):
        sample(stages, NOISE, **{"levels": 3, **options})


def test_bad_types_are_named():
    for stages, options, sentence in [
        (one(), {"image": IMAGE, "known": KNOWN.long()}, "known must be bool"),
        (one(), {"image": IMAGE.float(), "known": KNOWN}, "image must be integers, the level indices"),
        (one(bias=torch.zeros(3, dtype=F64)), {}, "stage 0: all tensors of the stages must have one dtype"),
        (one(torch.zeros(3, 1, 3, 3, dtype=torch.int32)), {}, "stage 0: weight of plane 0 must be float64"),
        ([torch.nn.Identity()], {}, "stages must be a sequence of Stage, got Identity"),
    ]:
        with pytest.raises(TypeError, match=f"^autoregressive_sampling: .*{sentence}"):
            sample(stages, NOISE, **{"levels": 3, **options})
    with pytest.raises(TypeError, match="noise must be float64"):
        sample(one(), IMAGE, levels=3)


def test_noise_must_have_four_dimensions():
    with pytest.raises(ValueError, match=r"noise must be \[N, C, H, W\] or, for logistic_mixture"):
        sample(one(), torch.rand(1, 4, 4), levels=3)


@pytest.mark.parametrize("plane", [0, 1])
def test_channel_groups_at_the_centre(plane):
    """With 3 data channels: an output of group 1 may see channels before its own in the image, and up to its own in
    other planes."""
    noise = torch.rand(1, 3, 2, 2)
    for mine, its in itertools.product(range(3), range(3)):
        w = tap(0, 0, size=1, out=6, source=3 if plane == 0 else 6, o=2 * mine, i=its if plane == 0 else 2 * its)
        first = Stage(((0, torch.zeros(6, 3, 3, 3)),))
        stages = [Stage(((0, w),))] if plane == 0 else [first, Stage(((1, w),))]
        if its < mine or (plane and its == mine):
            sample(stages, noise, levels=2)
            continue
        with pytest.raises(ValueError, match=f"weight of plane {plane} must be 0 at the centre but for channel groups"):
            sample(stages, noise, levels=2)


def test_what_is_checked_does_not_follow_the_default_device():
    noise, stages = torch.rand(1, 3, 2, 2), [Stage(((0, torch.zeros(6, 3, 1, 1)),), bias=torch.zeros(6))]
    expected = sample(stages, noise, levels=2)
    with torch.device("meta"):
        assert torch.equal(sample(stages, noise, levels=2), expected)


def test_groups_must_divide_every_plane():
    stages = [Stage(((0, torch.zeros(4, 3, 3, 3)),)), Stage(((1, torch.zeros(6, 4, 1, 1)),))]
    with pytest.raises(ValueError, match="stage 0: its 4 channels must divide into 3 groups, one a data channel"):
        sample(stages, torch.rand(1, 3, 2, 2), levels=2)


def test_mixture_channels():
    with pytest.raises(ValueError, match=r"last plane must have 10 \* K channels for 3 data channel\(s\), got 12"):
        sample([Stage(((0, torch.zeros(12, 3, 3, 3)),))], torch.rand(1, 4, 2, 2), levels=256, head="logistic_mixture")


def test_a_gradient_is_refused():
    weight = torch.zeros(3, 1, 3, 3, requires_grad=True)
    for noise in (NOISE, NOISE.clone().requires_grad_()):
        with pytest.raises(RuntimeError, match="^autoregressive_sampling: drawn integers cannot be differentiated"):
            sample(one(weight), noise, levels=3)
    with torch.no_grad():
        assert sample(one(weight), NOISE, levels=3).shape == NOISE.shape


def test_masks_of_these_tests():
    m = mask(6, (3, 3), "A", groups=3, source=3)
    assert m[:, :, 0].all() and m[:, :, 1, 0].all() and not m[:, :, 2].any() and not m[:, :, 1, 2].any()
    assert m[:, :, 1, 1].tolist() == [[0, 0, 0], [0, 0, 0], [1, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 0]]
