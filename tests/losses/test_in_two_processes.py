"""Data-parallel training of a critic, and by an importance-weighted bound (gloo)."""

from tests.processes import two_ranks


def test_gradients_are_those_of_one_process_hooks_included():
    found = two_ranks("tests.losses.ddp_rank")
    assert len(found) == 27 and not any(found.values()), found
