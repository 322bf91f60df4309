"""The benchmark cases under pytest-benchmark: ``pytest benchmarks --benchmark-only``.

The same cases, providers and gate as ``genkernels bench``; the table and the clock are pytest-benchmark's. Providers
are timed one after the other here, and other libraries are left out (they need processes of their own): the numbers
that the project publishes come from ``genkernels bench``. ``GENKERNELS_BENCH_QUICK=1`` takes the small set.
"""

import os

import pytest
import torch

from genkernels.benchmarks import cases, runner
from genkernels.benchmarks.providers import Unavailable, local

pytest.importorskip("pytest_benchmark")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = cases.find([], device=DEVICE, quick=os.environ.get("GENKERNELS_BENCH_QUICK", "") not in ("", "0"))


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case.title.replace("×", "x").split()))
def problem(request):
    problem = runner.draw(request.param, torch.device(DEVICE))
    yield problem
    problem.close()


@pytest.mark.parametrize("provider", local(DEVICE), ids=lambda provider: provider.name)
def test_speed(problem, provider, benchmark):
    try:
        session = provider.open(problem)
    except Unavailable as reason:
        pytest.skip(f"{provider.name} {reason}")
    if fault := session.check():
        (pytest.fail if provider.ours else pytest.skip)(f"{provider.name} fails the gate: {fault}")
    session.warm_up()
    case = problem.case
    benchmark.group = case.title
    benchmark.extra_info.update(bytes=case.bytes, flops=case.flops, peak_bytes=session.peak_bytes())

    def once():
        held = session.work.once()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return held

    with session.context():
        benchmark(once)
