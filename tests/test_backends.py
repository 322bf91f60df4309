"""The choice of backend: forcing, refusing, describing."""

import os
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


@pytest.mark.parametrize(
    "value,error,sentence",
    [
        ("reference", "", "reference"),
        ("", "", "auto"),
        ("referense", "UsageError", "did you mean reference?"),
        ("cuda", "BackendUnavailable", "affine_coupling: backend 'cuda' cannot run"),
    ],
)
def test_the_environment_variable(value, error, sentence):
    if value == "cuda" and torch.cuda.is_available():
        pytest.skip("here it can")
    code = (
        "import torch, genkernels as gk; x = torch.zeros(1, 2);"
        "gk.ops.affine_coupling(x, x); print(gk.current_backend())"
    )
    environment = os.environ | {"GENKERNELS_BACKEND": value}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert sentence in (done.stderr if error else done.stdout)
    assert (done.returncode != 0) == bool(error) and error in done.stderr


def test_import_is_light():
    code = (
        "import sys, genkernels; genkernels.ops, genkernels.reference, genkernels.use_backend;"
        "heavy = {'lightning', 'triton', 'sklearn', 'matplotlib', 'torch._dynamo', 'scipy', 'datasets', 'rich'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    bare = "import sys, torch; print(sorted({'torch._dynamo', 'triton'} & set(sys.modules)))"
    ours, torchs = (
        subprocess.run([sys.executable, "-c", c], capture_output=True, text=True, check=True).stdout
        for c in (code, bare)
    )
    assert ours == torchs


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
