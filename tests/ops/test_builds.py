"""The builds of the CPU library that this processor would not choose by itself, held to the same tests."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from genkernels import backends, ops

ROOT = Path(__file__).resolve().parents[2]
RUN = """
import sys
import pytest
from genkernels import backends

assert (backends.cpu_variant(), backends.why_missing("cpu")) == ("avx2", None)
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.skipif(backends.cpu_variant() != "avx512", reason="the AVX2 build is the one in use already, or none is")
def test_the_avx2_build_agrees_too(tmp_path):
    """All operators in one process: to start it takes longer than most of them."""
    files, report = [f"tests/ops/test_{operator}.py" for operator in ops.OPERATORS], tmp_path / "report.xml"
    options = ["-m", "every_build", "-k", "[cpu", "-p", "no:cacheprovider", "-p", "no:xdist", f"--junitxml={report}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-c", RUN, *files, *options],
        env=environment | {"ATEN_CPU_CAPABILITY": "avx2"},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    passed = [case.get("classname") for case in ElementTree.parse(report).iter("testcase") if not len(case)]
    assert set(passed) == {f"tests.ops.test_{operator}" for operator in ops.OPERATORS}
