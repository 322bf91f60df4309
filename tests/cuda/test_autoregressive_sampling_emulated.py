"""The CUDA C++ kernel of autoregressive_sampling, compiled by g++ and run on the CPU, against the definition: identical
integers."""

from __future__ import annotations

import shutil

import emulation
import pytest
import torch

import genkernels as gk
from genkernels import ops
from genkernels._plan import state_size
from genkernels.ops.autoregressive_sampling import HEADS
from genkernels.reference._stages import flatten
from tests.ops.causal_networks import Maker, any_network, assert_same_draws, cast, plain, two_stacks, uniform

pytestmark = [pytest.mark.skipif(not shutil.which("g++"), reason="needs g++"), pytest.mark.usefixtures("one_thread")]
F32, F64 = torch.float32, torch.float64


@pytest.fixture(scope="module")
def kernel():
    return emulation.load("autoregressive_sampling").autoregressive_sampling


def draw(kernel, stages, noise, *, levels, head="categorical", temperature=1.0, image=None, known=None, rows=None):
    channels = noise.shape[1] - (head == "logistic_mixture")
    shape = (noise.shape[0], channels, *noise.shape[2:])
    tensors, plan = flatten(stages, channels, noise.shape[3])
    drawn = torch.zeros(shape, dtype=torch.int64)
    if known is not None:
        known = known.expand(shape).contiguous()
        drawn = torch.where(known, image, drawn)
    state = noise.new_zeros(noise.shape[0], state_size(plan))
    rows = rows or max(shape[2], 1)
    for begin in range(0, shape[2], rows):
        end = min(begin + rows, shape[2])
        kernel(drawn, state, noise, known, tensors, plan, HEADS.index(head), levels, temperature, begin, end)
    return drawn


def check(kernel, stages, noise, dtype=F32, **options):
    stages, noise = cast(stages, dtype), noise.to(dtype)
    ours = draw(kernel, stages, noise, **options)
    rows = options.pop("rows", None)
    with gk.use_backend("reference"):
        expected = ops.autoregressive_sampling(stages, noise, rows_per_call=rows, **options)
    told = {k: options[k] for k in ("levels", "head", "temperature") if k in options}
    assert_same_draws(ours, expected, stages, noise, **told)
    return ours


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("shape", [(1, 4, 5), (3, 3, 2), (1, 1, 1), (2, 1, 6)], ids=str)
def test_plain(kernel, poisoned_memory, dtype, shape):
    check(kernel, plain(seed=1), uniform(shape[0], 1, *shape[1:], seed=2), dtype, levels=5)


@pytest.mark.parametrize("width", [1, 33, 64, 600])
def test_widths(kernel, poisoned_memory, width):
    """600 channels take two turns of the 512 threads of a block."""
    check(kernel, plain(width=width, layers=1, seed=2), uniform(1, 1, 2, 3, seed=2), levels=5)


def test_residual(kernel, poisoned_memory):
    check(kernel, plain(residual=True, first=9, seed=3), uniform(1, 1, 3, 4), levels=5)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_two_stacks(kernel, poisoned_memory, dtype):
    check(kernel, two_stacks(seed=1), uniform(2, 1, 4, 5, seed=4), dtype, levels=5)


@pytest.mark.parametrize("maps", [False, True])
def test_conditional(kernel, poisoned_memory, maps):
    make = Maker(7)
    stages = two_stacks(seed=2, condition=lambda n: make.draw(2, n, *((3, 4) if maps else ())))
    check(kernel, stages, uniform(2, 1, 3, 4, seed=6), levels=5)


def test_channel_groups(kernel, poisoned_memory):
    check(kernel, plain(channels=3, width=9, levels=4, seed=5), uniform(2, 3, 3, 3, seed=7), levels=4)
    check(kernel, two_stacks(channels=3, width=9, levels=4, seed=6), uniform(1, 3, 3, 3, seed=8), levels=4)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_heads_and_temperature(kernel, poisoned_memory, temperature):
    check(kernel, plain(seed=9), uniform(2, 1, 3, 4, seed=1), levels=5, temperature=temperature)
    for channels, out in ((1, 9), (3, 40)):
        stages = plain(channels=channels, out=out, groups=1, seed=9)
        noise = uniform(2, 1 + channels, 3, 4, seed=2)
        check(kernel, stages, noise, levels=64, head="logistic_mixture", temperature=temperature)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_not_a_number(kernel, poisoned_memory, temperature):
    for bad in (float("nan"), float("inf")):
        stages = plain(seed=9)
        stages[-1].bias[3] = bad
        check(kernel, stages, uniform(2, 1, 2, 3, seed=1), levels=5, temperature=temperature)


def test_many_levels(kernel, poisoned_memory):
    check(kernel, plain(levels=300, layers=1, seed=4), uniform(1, 1, 2, 3, seed=1), levels=300)


@pytest.mark.parametrize("head", HEADS)
def test_in_painting(kernel, poisoned_memory, head):
    mixture = head == "logistic_mixture"
    stages = plain(3, 4, width=9, seed=3, out=10 if mixture else None, groups=1 if mixture else 3)
    image = torch.randint(0, 4, (2, 3, 3, 4), generator=torch.Generator().manual_seed(1))
    known = torch.rand(2, 3, 3, 4, generator=torch.Generator().manual_seed(2)) < 0.5
    noise = uniform(2, 4 if mixture else 3, 3, 4, seed=2)
    drawn = check(kernel, stages, noise, levels=4, head=head, image=image, known=known)
    assert torch.equal(drawn[known], image[known])


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 3, 5])
def test_any_network(kernel, poisoned_memory, seed, groups):
    stages, (batch, *size) = any_network(seed, groups, channels=groups, out=3 * groups)
    check(kernel, stages, uniform(batch, groups, *size, seed=seed), levels=3)


def test_blocks_of_rows(kernel, poisoned_memory):
    for stages in (plain(seed=2), two_stacks(seed=2)):
        check(kernel, stages, uniform(1, 1, 5, 3, seed=3), levels=5, rows=2)


def test_no_access_outside_the_inputs(kernel):
    """An access outside ends the process."""
    for after in (False, True):
        stages, noise = cast(two_stacks(seed=1, layers=1), F32), uniform(1, 1, 3, 3, dtype=F32)

        def place(t, after=after):
            return None if t is None else emulation.beside_forbidden_memory(t, after)

        moved = [
            ops.Stage(
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
        assert torch.equal(draw(kernel, moved, place(noise), levels=5), draw(kernel, stages, noise, levels=5))


def test_a_wrong_state_is_refused(kernel):
    stages, noise = cast(plain(), F32), uniform(1, 1, 2, 2, dtype=F32)
    tensors, plan = flatten(stages, 1, 2)
    image = torch.zeros(1, 1, 2, 2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="autoregressive_sampling: state must be"):
        kernel(image, noise.new_zeros(1, 3), noise, None, tensors, plan, 0, 5, 1.0, 0, 2)
    with pytest.raises(RuntimeError, match="autoregressive_sampling: the plan ends early"):
        kernel(image, noise.new_zeros(1, 3), noise, None, tensors, plan[:-2], 0, 5, 1.0, 0, 2)
