"""`genkernels figure jacobians`: each layer's Jacobian has the structure that its panel is named after."""

import numpy as np
import pytest
import torch

from genkernels._seeds import fixed_seed
from genkernels.cli import main
from genkernels.figures import jacobians

D = 12


@pytest.fixture(scope="module")
def found():
    with fixed_seed(0):
        structures = jacobians.structures(D)
        x = torch.randn(D, dtype=torch.float64)
    matrices = {name[:3]: jacobians.jacobian(s.layer, x) for name, s in structures.items()}
    return {name[:3]: s.layer for name, s in structures.items()}, matrices, x


def test_a_jacobian_is_that_of_differences(found):
    layers, matrices, x = found
    for name, layer in layers.items():
        step = 1e-6 * torch.eye(D, dtype=torch.float64)
        with torch.no_grad():
            columns = (layer(x + step)[0] - layer(x - step)[0]) / 2e-6
        torch.testing.assert_close(matrices[name], columns.T, rtol=1e-6, atol=1e-7)


def test_low_rank(found):
    values = torch.linalg.svdvals(found[1]["(a)"] - torch.eye(D))
    assert values[0] > 0.1 and values[1] < 1e-12


def test_lower_triangular(found):
    matrix = found[1]["(b)"]
    assert not matrix.triu(1).any() and (matrix.diagonal() > 0).all()
    assert (matrix.tril(-1) != 0).sum() == D * (D - 1) / 2


def test_blocks(found):
    matrix, half = found[1]["(c)"], D // 2
    assert torch.equal(matrix[:half, :half], torch.eye(half, dtype=matrix.dtype)) and not matrix[:half, half:].any()
    scaled = matrix[half:, half:]
    assert torch.equal(scaled, scaled.diagonal().diag()) and (scaled.diagonal() > 0).all()
    assert (matrix[half:, :half] != 0).all()


def test_free_form(found):
    matrix = found[1]["(d)"]
    assert (matrix != 0).all() and torch.linalg.matrix_rank(matrix - torch.eye(D)) == D
    assert torch.linalg.matrix_norm(matrix - torch.eye(D), 2) < 1


def test_ways_to_the_determinant_agree_with_the_matrix(found):
    layers, matrices, x = found
    for name in ("(a)", "(b)", "(c)"):
        with torch.no_grad():
            torch.testing.assert_close(layers[name](x[None])[1][0], torch.linalg.slogdet(matrices[name])[1])
    torch.manual_seed(0)
    structure = jacobians.structures(4)["(d) Free-form"]
    x = torch.randn(4, dtype=torch.float64)
    mean, error = jacobians._estimated(structure.layer, x, None).split("draws ")[1].split(" ± ")
    assert abs(float(mean) - torch.linalg.slogdet(jacobians.jacobian(structure.layer, x))[1]) < 4 * float(error) + 1e-3


def test_it_is_drawn_and_refuses_in_one_sentence(tmp_path, capsys, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jacobians, "DRAWS", 3)
    assert main(["figure", "jacobians", "--features", "4", "--seed", "1"]) == 0
    page = np.asarray(image.open("jacobians.png"))
    assert page.shape[1] > 3 * page.shape[0] / 2
    capsys.readouterr()
    for argv, words in (
        (["--features", "5"], "--features must be even, from 2 to 128, got 5"),
        (["--features", "500"], "--features must be even, from 2 to 128, got 500"),
        (["--feature", "4"], "unknown argument '--feature'; did you mean --features?"),
        (["--seed", "9" * 30], "--seed must be an integer of 64 bits"),
    ):
        assert main(["figure", "jacobians", *argv, "--out", "a.png"]) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["jacobians.png"]
