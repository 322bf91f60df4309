"""The Triton kernel of autoregressive_sampling against the definition: identical integers."""

import itertools

import pytest
import torch

from genkernels import reference
from genkernels._plan import state_size
from genkernels.ops.autoregressive_sampling import HEADS
from genkernels.reference._stages import flatten
from genkernels.triton import autoregressive_sampling as kernels
from tests.ops.causal_networks import Maker, any_network, assert_same_draws, cast, plain, two_stacks, uniform

pytestmark = pytest.mark.usefixtures("one_thread")
F32, F64 = torch.float32, torch.float64


def draw(
    sampler, device, stages, noise, *, levels, head="categorical", temperature=1.0, image=None, known=None, rows=None
):
    channels = noise.shape[1] - (head == "logistic_mixture")
    shape = (noise.shape[0], channels, *noise.shape[2:])
    noise = noise.to(device)
    tensors, plan = flatten(cast(stages, noise.dtype, device), channels, noise.shape[3])
    drawn = torch.zeros(shape, dtype=torch.int64)
    if known is not None:
        known = known.expand(shape).contiguous()
        drawn = torch.where(known, image, drawn)
        known = known.to(device)
    drawn = drawn.to(device)
    state = noise.new_zeros(noise.shape[0], state_size(plan))
    for begin in range(0, shape[2], rows or max(shape[2], 1)):
        end = min(begin + (rows or shape[2]), shape[2])
        given = (drawn, state, noise, known, tensors, plan, HEADS.index(head), levels, temperature, begin, end)
        sampler.autoregressive_sampling(*given)
    return drawn.cpu()


def check(device, stages, noise, dtype=F32, **options):
    stages, noise = cast(stages, dtype), noise.to(dtype)
    ours = draw(kernels, device, stages, noise, **options)
    expected = draw(reference, "cpu", stages, noise, **options)
    told = {k: options[k] for k in ("levels", "head", "temperature") if k in options}
    assert_same_draws(ours, expected, stages, noise, **told)
    return ours


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("shape", [(1, 4, 5), (3, 3, 2), (1, 1, 1), (2, 1, 6)], ids=str)
def test_plain(device, poisoned, dtype, shape):
    check(device, plain(seed=1), uniform(shape[0], 1, *shape[1:], seed=2), dtype, levels=5)


@pytest.mark.parametrize("n", [5, 9])
def test_several_samples_a_program(device, poisoned, monkeypatch, n):
    """Two and four, the last program not full."""
    monkeypatch.setattr(kernels, "_rows_of", lambda n, _: 2 if n == 5 else 4)
    check(device, plain(seed=1), uniform(n, 1, 3, 4, seed=2), levels=5)
    check(device, two_stacks(seed=1, layers=1), uniform(n, 1, 3, 3, seed=4), levels=5)


def test_samples_a_program():
    cpu = torch.device("cpu")
    assert [kernels._rows_of(n, cpu) for n in (1, 4, 5, 8, 9, 16, 1000)] == [1, 1, 2, 2, 4, 4, 4]


@pytest.mark.parametrize("width", [1, 33, 70])
def test_widths(device, poisoned, width):
    """Not a multiple of what is loaded at once; more than a tile."""
    check(device, plain(width=width, layers=1, seed=2), uniform(1, 1, 2, 3, seed=2), levels=5)


def test_wide_images(device, poisoned):
    """More columns than a tile of a row's products has, residuals, large kernels."""
    check(device, plain(layers=1, residual=True, first=9, seed=3), uniform(1, 1, 2, 37), levels=5)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_two_stacks(device, poisoned, dtype):
    check(device, two_stacks(seed=1), uniform(2, 1, 4, 3, seed=4), dtype, levels=5)


@pytest.mark.parametrize("maps", [False, True])
def test_conditional(device, poisoned, maps):
    """In blocks of rows too: a block sees its own rows of a map."""
    make = Maker(7)
    stages = two_stacks(seed=2, layers=1, condition=lambda n: make.draw(2, n, *((3, 4) if maps else ())))
    for rows in (None, 2):
        check(device, stages, uniform(2, 1, 3, 4, seed=6), levels=5, rows=rows)


def test_channel_groups(device, poisoned):
    check(device, plain(channels=3, width=9, levels=4, seed=5), uniform(2, 3, 3, 3, seed=7), levels=4)
    check(device, two_stacks(channels=3, width=9, levels=4, seed=6, layers=1), uniform(1, 3, 2, 3, seed=8), levels=4)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_heads_and_temperature(device, poisoned, temperature):
    check(device, plain(seed=9, layers=1), uniform(2, 1, 3, 3, seed=1), levels=5, temperature=temperature)
    for (channels, out), dtype in itertools.product(((1, 9), (3, 40)), (F32, F64)):
        stages = plain(channels=channels, out=out, groups=1, seed=9, layers=1)
        noise = uniform(2, 1 + channels, 3, 3, seed=2)
        check(device, stages, noise, dtype, levels=64, head="logistic_mixture", temperature=temperature)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_many_levels(device, poisoned, temperature):
    """More categories than are read at once."""
    stages = plain(levels=2500, layers=0, width=4, seed=4)
    check(device, stages, uniform(1, 1, 2, 3, seed=1), levels=2500, temperature=temperature)


@pytest.mark.parametrize("head", HEADS)
def test_in_painting(device, poisoned, head):
    mixture = head == "logistic_mixture"
    stages = plain(3, 4, width=9, seed=3, layers=1, out=10 if mixture else None, groups=1 if mixture else 3)
    image = torch.randint(0, 4, (2, 3, 3, 4), generator=torch.Generator().manual_seed(1))
    known = torch.rand(2, 3, 3, 4, generator=torch.Generator().manual_seed(2)) < 0.5
    noise = uniform(2, 4 if mixture else 3, 3, 4, seed=2)
    drawn = check(device, stages, noise, levels=4, head=head, image=image, known=known)
    assert torch.equal(drawn[known], image[known])


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("seed", [4, 8, 10])
def test_any_network(device, poisoned, seed, groups):
    stages, (batch, *size) = any_network(seed, groups, channels=groups, out=3 * groups)
    check(device, stages, uniform(batch, groups, *size, seed=seed), levels=3)


def test_blocks_of_rows(device, poisoned):
    for stages in (plain(seed=2, layers=1), two_stacks(seed=2, layers=1)):
        check(device, stages, uniform(1, 1, 5, 2, seed=3), levels=5, rows=2)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_not_a_number(device, head, temperature):
    """NaN and infinite parameters give level 0, as the definition has it."""
    stages = plain(
        channels=3,
        levels=4,
        layers=0,
        out=10 if head == "logistic_mixture" else 12,
        groups=1 if head == "logistic_mixture" else 3,
    )
    noise = uniform(2, 4 if head == "logistic_mixture" else 3, 2, 2)
    for bad in (float("nan"), float("inf")):
        stages[-1].bias[1] = bad
        cold = {"levels": 4, "head": head, "temperature": temperature}
        image = torch.randint(0, 4, (2, 3, 2, 2))
        for known in (None, torch.zeros(1, 3, 1, 1, dtype=torch.bool), torch.rand(2, 3, 2, 2) < 0.5):
            given = cold if known is None else cold | {"image": image, "known": known}
            ours = draw(kernels, device, stages, noise.float(), **given)
            assert torch.equal(ours, draw(reference, "cpu", cast(stages, F32), noise.float(), **given))


def test_a_mean_that_is_not_a_number_passes_on_to_later_channels(device):
    """Unless the channel is known: then its value does."""
    stages = plain(channels=3, levels=256, layers=0, out=10, groups=1)
    stages[-1].bias[1] = float("nan")  # of channel 0, the only component
    noise, image = uniform(1, 4, 2, 2).float(), torch.full((1, 3, 2, 2), 100)
    for first in (False, True):
        known = torch.zeros(1, 3, 2, 2, dtype=torch.bool)
        known[:, 0] = first
        given = {"levels": 256, "head": "logistic_mixture", "image": image, "known": known}
        ours = draw(kernels, device, stages, noise, **given)
        assert torch.equal(ours, draw(reference, "cpu", cast(stages, F32), noise, **given))
        assert bool(ours[:, 1:].any()) == first


def test_empty_batch_and_no_rows(device):
    stages = cast(plain(layers=0), F32)
    assert draw(kernels, device, stages, uniform(0, 1, 3, 3).float(), levels=5).shape == (0, 1, 3, 3)
    assert draw(kernels, device, stages, uniform(2, 1, 0, 3).float(), levels=5).shape == (2, 1, 0, 3)


def test_a_wrong_state_is_refused(device):
    noise = uniform(1, 1, 2, 2).float().to(device)
    tensors, plan = flatten(cast(plain(), F32, device), 1, 2)
    image = torch.zeros(1, 1, 2, 2, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=r"^autoregressive_sampling: state must be \[1, \d+\], got \[1, 3\]"):
        kernels.autoregressive_sampling(image, noise.new_zeros(1, 3), noise, None, tensors, plan, 0, 5, 1.0, 0, 2)


def test_repeats_give_the_same_bits(device):
    stages, noise = cast(two_stacks(seed=1, layers=1), F32), uniform(2, 1, 3, 3, dtype=F32)
    assert torch.equal(*(draw(kernels, device, stages, noise, levels=5) for _ in range(2)))
