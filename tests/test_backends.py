"""The choice of backend: forcing, refusing, describing."""

import re
import subprocess
import sys

import pytest
import torch

import genkernels as gk
from genkernels import backends, ops


def test_use_backend_nests_and_restores_even_after_an_error():
    assert gk.current_backend() == "auto"
    with gk.use_backend("reference"):
        with pytest.raises(RuntimeError, match="stop"), gk.use_backend("auto"):
            assert gk.current_backend() == "auto"
            raise RuntimeError("stop")
        assert gk.current_backend() == "reference"
    assert gk.current_backend() == "auto"


def test_an_unknown_backend_names_the_nearest():
    with pytest.raises(ValueError, match=r"backend must be one of auto, .*got 'trition'; did you mean triton\?"):
        with gk.use_backend("trition"):
            pass


def test_a_backend_that_cannot_run_says_why():
    if torch.cuda.is_available():
        pytest.skip("here it can")
    for name in ("triton", "cuda"):
        with (
            pytest.raises(gk.BackendUnavailable, match=f"backend '{name}' cannot run here: .*CUDA"),
            gk.use_backend(name),
        ):
            pass


#: Imports torch, once, and then genkernels in a process for each of the values.
EACH_VALUE = """
import os, sys, torch

for value in sys.argv[1:]:
    if os.fork():
        os.wait()
        continue
    os.environ["GENKERNELS_BACKEND"] = value
    try:
        import genkernels as gk
        x = torch.zeros(1, 2)
        gk.ops.affine_coupling(x, x)
        print(gk.current_backend(), flush=True)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    os._exit(0)
"""


def test_the_environment_variable():
    answers = {
        "reference": "reference",
        "": "auto",
        "referense": r"UsageError: .*did you mean reference\?",
        "cuda": "BackendUnavailable: affine_coupling: backend 'cuda' cannot run.*",
    }
    if torch.cuda.is_available():
        del answers["cuda"]  # here it can
    command = [sys.executable, "-c", EACH_VALUE, *answers]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    for line, answer in zip(lines, answers.values(), strict=True):
        assert re.fullmatch(answer, line), line


def test_import_is_light():
    """Of what takes long to import, nothing is that torch has not imported itself."""
    code = (
        "import sys, torch; begun = set(sys.modules);"
        "import genkernels; genkernels.ops, genkernels.reference, genkernels.use_backend;"
        "heavy = {'lightning', 'triton', 'sklearn', 'matplotlib', 'torch._dynamo', 'scipy', 'datasets', 'rich'};"
        "print(sorted(heavy & set(sys.modules) - begun))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_describe_has_a_row_and_a_reason_for_each_backend():
    rows = backends.describe()
    assert [r["backend"] for r in rows] == ["reference", "cpu", "triton", "cuda"]
    assert all(r["why"] or r["runs"] == "yes" for r in rows)


def test_the_choice_holds_for_a_backward_pass_after_its_block():
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    params = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    with gk.use_backend("reference"):
        z, ldj = ops.affine_coupling(x, params)
    inside = torch.autograd.grad(z.sum() + ldj.sum(), (x, params))
    z, ldj = ops.affine_coupling(x, params)
    torch.testing.assert_close(inside, torch.autograd.grad(z.sum() + ldj.sum(), (x, params)))
