import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from genkernels._seeds import derive_seed, fixed_seed, seed_everything
from genkernels.data.batches import fetch
from genkernels.training.order import Order, make_loader


@settings(max_examples=60, deadline=None)
@given(
    examples=st.integers(1, 40),
    batch=st.integers(1, 17),
    world=st.integers(1, 3),
    epochs=st.integers(1, 3),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_each_example_comes_once_an_epoch_and_every_batch_is_full(examples, batch, world, epochs, seed):
    orders = [Order(examples, batch, seed, 0, 10**9, rank, world) for rank in range(world)]
    stream = []
    step = 0
    while len(stream) < epochs * examples:
        for order in orders:
            part = order.batch(step)
            assert len(part) == batch
            stream += part
        step += 1
    for epoch in range(epochs):
        assert Counter(stream[epoch * examples : (epoch + 1) * examples]) == Counter(range(examples))


def test_a_later_start_gives_the_tail_of_the_same_batches():
    whole = list(Order(23, 5, 7, 0, 20))
    assert list(Order(23, 5, 7, 11, 20)) == whole[11:]
    assert [step for step, _ in whole] == list(range(20))


def test_epochs_and_seeds_differ():
    order = Order(1000, 1000, 3, 0, 5)
    assert order.batch(0) != order.batch(1)
    assert order.batch(0) != Order(1000, 1000, 4, 0, 5).batch(0)


def test_processes_share_one_stream():
    alone = Order(50, 6, 1, 0, 4)
    pair = [Order(50, 3, 1, 0, 4, rank, 2) for rank in range(2)]
    for step in range(4):
        assert pair[0].batch(step) + pair[1].batch(step) == alone.batch(step)


def test_an_empty_data_set_is_refused():
    with pytest.raises(ValueError, match="at least 1 example, got 0"):
        Order(0, 4, 0, 0, 1)


def test_seeds_of_neighbours_are_unrelated():
    seeds = [derive_seed(s, "step", i, r) for s in (0, 1) for i in range(50) for r in (0, 1)]
    assert len(set(seeds)) == len(seeds)
    assert derive_seed(1, "step", 11) != derive_seed(1, "step", 1, 1)
    bits = np.array([[s >> b & 1 for b in range(63)] for s in seeds])
    assert 0.3 < bits.mean(0).min() and bits.mean(0).max() < 0.7


def test_every_generator_is_seeded_and_put_back():
    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    seed_everything(5)
    first = draw()
    seed_everything(5)
    assert draw() == first
    seed_everything(9)
    draw()
    with fixed_seed(5):
        assert draw() == first
    after = draw()
    seed_everything(9)
    draw()
    assert draw() == after


class Augmented(Dataset):
    """Draws from all three generators in each item, as augmentation does."""

    def __len__(self):
        return 12

    def __getitem__(self, i):
        return torch.rand(2) + random.random() + float(np.random.rand()), i


@pytest.mark.parametrize("workers", [0, 1])
def test_augmentation_is_a_function_of_the_step(workers):
    expected = [x for x, _ in make_loader(Augmented(), Order(12, 4, 0, 0, 6))]
    torch.rand(3), random.random()  # whatever happens in between
    resumed = [x for x, _ in make_loader(Augmented(), Order(12, 4, 0, 3, 6), workers=workers)]
    assert all(torch.equal(a, b) for a, b in zip(resumed, expected[3:], strict=True))


def test_the_loader_leaves_the_global_generator_alone():
    class Plain(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            return torch.tensor([i]), 0

    class Many(Plain):
        def __getitems__(self, indices):
            return [(torch.tensor([10 * i]), 0) for i in indices]

    assert fetch(Plain(), [2, 0])[0].tolist() == [[2], [0]]
    assert fetch(Many(), [2, 0])[0].tolist() == [[20], [0]]
    loader = make_loader(Plain(), Order(4, 2, 0, 0, 2))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    iter(loader)
    assert torch.equal(before, torch.get_rng_state())
