"""The builds of the CPU library that this processor would not choose by itself, held to the same tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from genkernels import backends, ops

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(backends.cpu_variant() != "avx512", reason="the AVX2 build is the one in use already, or none is")
@pytest.mark.parametrize("operator", sorted(ops.OPERATORS))
def test_the_avx2_build_agrees_too(operator):
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    chosen = "from genkernels import backends; print(backends.cpu_variant(), backends.why_missing('cpu'))"
    shown = subprocess.run([sys.executable, "-c", chosen], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert shown.stdout.strip() == "avx2 None", shown.stdout + shown.stderr
    tests = [f"tests/ops/test_{operator}.py", "-m", "every_build", "-k", "[cpu", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *tests, "-p", "no:xdist"],
        env={name: value for name, value in environment.items() if not name.startswith("PYTEST_")},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]
