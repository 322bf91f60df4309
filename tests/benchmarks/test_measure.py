"""Quantiles, rotation, turns and peak memory."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genkernels.benchmarks.measure import Inputs, Work, quantiles, rotation
from genkernels.benchmarks.runner import Effort, take_turns

MIB = 1 << 20


def test_quantiles_by_hand():
    assert quantiles([5.0]) == (5.0, 5.0, 5.0)
    assert quantiles([4.0, 1.0]) == pytest.approx((2.5, 1.6, 3.4))
    assert quantiles([9.0, 1.0, 5.0, 3.0, 7.0, 11.0]) == (6.0, 3.0, 9.0)


@given(st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=40))
def test_quantiles_are_torchs(samples):
    want = torch.quantile(
        torch.tensor(samples, dtype=torch.float64), torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    )
    assert quantiles(samples) == pytest.approx(want.tolist())


@pytest.mark.parametrize(
    ("set_bytes", "cache", "most", "sets"),
    [
        (40 * MIB, 480 * MIB, 1024 * MIB, 24),  # twice the cache
        (100 * MIB, 480 * MIB, 512 * MIB, 5),  # no more memory than allowed
        (4096 * MIB, 480 * MIB, 1024 * MIB, 1),  # one set is larger than that already
        (1000, 32 * MIB, 1024 * MIB, 64),  # so small that it would be cached in real use
        (0, 32 * MIB, 1024 * MIB, 64),
    ],
)
def test_rotation(set_bytes, cache, most, sets):
    assert rotation(set_bytes, cache, most) == sets


def test_work_rotates_among_its_sets_and_never_writes_to_them():
    sets = [Inputs((torch.full((3,), float(i)),)) for i in range(3)]
    seen = []
    work = Work(lambda x: seen.append(float(x[0])) or x + 1, sets, "forward")
    work.calls = 4
    assert len(work.turn()) == 4 and seen == [0.0, 1.0, 2.0, 0.0, 1.0]  # one untimed call, then four
    assert [float(s.args[0][0]) for s in sets] == [0.0, 1.0, 2.0]


def test_every_set_owns_its_memory_and_leaves_require_gradients_only_where_needed():
    inputs = Inputs((torch.randn(4), torch.arange(4)), (torch.randn(4),))
    first, second = inputs.fresh("forward+backward"), inputs.fresh("forward+backward")
    pointers = [t.data_ptr() for s in (inputs, first, second) for t in (*s.args, *s.cotangents)]
    assert len(set(pointers)) == len(pointers)
    assert [a.requires_grad for a in first.args] == [True, False]
    assert not inputs.fresh("inverse").args[0].requires_grad
    held = Inputs((torch.randn(4), torch.randn(2)), constants=(1,)).fresh("forward+backward")
    assert [a.requires_grad for a in held.args] == [True, False] and held.leaves() == held.args[:1]
    assert inputs.nbytes == 4 * 4 + 4 * 8 + 4 * 4


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_peak_memory_counts_outputs_and_temporaries_held_at_once(direction):
    def op(x):  # two temporaries of x's size at once, the first freed before the output exists
        a = x.detach() + 1
        b = a * 2
        del a
        return (b.sum() + x.sum()).reshape(1)

    inputs = Inputs((torch.randn(MIB),), (torch.ones(1),)).fresh(direction)
    work = Work(op, [inputs], direction)
    work.once()
    peak = work.peak_bytes()
    # forward+backward also holds the gradient of x, but never beside both temporaries
    assert 8 * MIB <= peak < 8 * MIB + 65536


def test_slow_providers_leave_early_and_the_others_take_equal_turns():
    class Session:
        def __init__(self, samples):
            self.samples, self.turns = samples, 0

        def warm_up(self):
            return 0.0

        def turn(self):
            self.turns += 1
            return [1.0] * self.samples

    sessions = {"a": Session(2), "b": Session(5)}
    samples, lost = take_turns(sessions, Effort(seconds=0.0, samples=6))
    assert sessions["b"].turns <= sessions["a"].turns <= 3 and len(samples["a"]) >= 3 and not lost
    assert take_turns({}, Effort(1.0, 6)) == ({}, {})
