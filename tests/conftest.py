import os
import warnings
from collections import Counter

import pytest
import torch

#: Tests that are left out here, by the reason: told once, at the end, instead of a skip each.
LEFT_OUT: Counter[str] = Counter()
#: Files of tests that take many seconds each. They are begun first: at the end one would keep a worker busy alone.
LONG = {"test_adding_an_operator", "test_build", "test_builds", "test_compile", "test_compiled", "test_kills"}
LONG |= {"test_in_two_processes", "test_peers", "test_runs", "test_training_step"}


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config, items):
    alone = config.rootpath / "tests" / "ops"  # where `make test` looks for them
    if lost := [i.nodeid for i in items if i.get_closest_marker("threads") and not i.path.is_relative_to(alone)]:
        raise pytest.UsageError(f"tests marked threads must lie in {alone}, or no run has them: {', '.join(lost)}")
    if not torch.cuda.is_available():
        leave_out(config, items, lambda item: item.get_closest_marker("gpu"), "no CUDA device is available")
    yield  # to -m and -k, and to the folders' own choices
    items.sort(key=lambda item: item.path.stem not in LONG)
    if shard := os.environ.get("GENKERNELS_TEST_SHARD"):
        share_out(config, items, *map(int, shard.split("/")))


def leave_out(config, items, unwanted, reason):
    """Takes the unwanted items out, to be counted in the summary under `reason`."""
    gone = [item for item in items if unwanted(item)]
    if gone:
        all_gone = set(gone)
        items[:] = [item for item in items if item not in all_gone]
        config.hook.pytest_deselected(items=gone)
        LEFT_OUT[reason] += len(gone)


def share_out(config, items, k, n):
    """``GENKERNELS_TEST_SHARD=k/n``: the k-th of n processes takes every n-th test. What takes long on a GPU is to
    compile, on one core."""
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % n != k - 1])
    items[:] = items[k - 1 :: n]


def pytest_terminal_summary(terminalreporter):
    from tests import implementations

    for line in implementations.summary():
        terminalreporter.write_line(line)
    for reason, count in LEFT_OUT.items():
        terminalreporter.write_line(f"left out: {count} tests, {reason}")


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from one seed, so that a failure repeats."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _whole_fp32(monkeypatch):
    """cuDNN's convolutions round fp32 to TF32 unless told, and for some shapes do not: what is held against fp64 is
    fp32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def one_thread():
    """For thousands of tiny convolutions, which a second thread only slows down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned_memory():
    """Fresh tensors start as NaN, those that C++ asks torch for too: an element that a kernel leaves out shows."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill
