"""``genkernels swap`` and ``genkernels bench swap``."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from genkernels.benchmarks import swap
from genkernels.cli import main


def critic():
    model = nn.Sequential(spectral_norm(nn.Linear(4, 8)), nn.Tanh(), spectral_norm(nn.Linear(8, 1)))
    x = torch.randn(6, 4)
    return model, lambda m: m(x).square().mean(), lambda m: m(x)


def bare():
    return nn.Linear(2, 2)


def nothing_to_swap():
    return nn.Linear(2, 2), lambda m: m(torch.ones(3, 2)).sum()


def scripted():
    return torch.jit.trace(nn.Linear(2, 2), torch.ones(3, 2)), lambda m: m(torch.ones(3, 2)).sum()


def compiled():
    return torch.compile(nn.Linear(2, 2)), lambda m: m(torch.ones(3, 2)).sum()


def loss_raises():
    return nn.Linear(2, 2), lambda m: m(torch.ones(3, 5)).sum()


def loss_is_a_batch():
    return nn.Linear(2, 2), lambda m: m(torch.ones(3, 2))


def loss_has_no_graph():
    return nn.Linear(2, 2), lambda m: m(torch.ones(3, 2)).sum().detach()


def loss_is_a_float():
    return nn.Linear(2, 2), lambda m: 3.0


def sample_raises():
    return nn.Linear(2, 2), lambda m: m(torch.ones(3, 2)).sum(), lambda m: m.sample(3)


def test_a_model_of_ones_own(capsys):
    assert main(["swap", "tests.swap.test_command:critic", "--quick"]) == 0
    out = capsys.readouterr().out
    assert "2 of 2 modules swapped" in out and "→ genkernels.swap.torch.SpectralNorm" in out
    assert "training step" in out and "sampling" in out and out.rstrip().endswith("×")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("critic", "FACTORY must be MODULE:FUNCTION, got 'critic'"),
        ("no_such_module:f", "no_such_module:f: no module named 'no_such_module' can be imported from here"),
        ("tests.swap.test_command:f", "module tests.swap.test_command must have a function f, it has none"),
        (
            "tests.swap.test_command:bare",
            "must give (model, loss) or (model, loss, sample), functions of the model, got",
        ),
        ("tests.swap.test_command:scripted", ":scripted: model must be eager, got a scripted one: swap the model that"),
        ("tests.swap.test_command:compiled", ":compiled: model must be eager, got a compiled one: swap first"),
        ("tests.swap.test_command:loss_raises", ":loss_raises's loss raised RuntimeError: mat1 and mat2 shapes"),
        ("tests.swap.test_command:loss_is_a_batch", "'s loss must give one number that backward() can be called on"),
        ("tests.swap.test_command:loss_has_no_graph", "backward() can be called on, got a tensor [] without a graph"),
        ("tests.swap.test_command:loss_is_a_float", "backward() can be called on, got float"),
        ("tests.swap.test_command:sample_raises", ":sample_raises's sample raised AttributeError"),
    ],
)
def test_what_is_no_factory(capsys, name, sentence):
    assert main(["swap", name]) == 2
    told = capsys.readouterr().err
    assert sentence in " ".join(told.split()) and "Traceback" not in told


def test_nothing_to_swap_is_told(capsys):
    assert main(["swap", "tests.swap.test_command:nothing_to_swap", "--quick"]) == 0
    assert capsys.readouterr().out.startswith("0 of 0 modules swapped\nthere is none of torch, nflows")


def test_the_bench_writes_its_rows_and_tells_no_speed_of_other_values(tmp_path, monkeypatch, capsys):
    def missing():
        import no_such_library  # noqa: F401

    def other():
        model, loss, _ = critic()
        calls = iter(range(100))
        return model, lambda m: loss(m) + next(calls), None

    monkeypatch.setattr(swap, "CASES", {"one": critic, "two": missing, "three": other})
    file = tmp_path / "rows.json"
    assert main(["bench", "swap", "--quick", "--json", str(file)]) == 1
    rows = json.loads(file.read_text())["rows"]
    assert [(row["case"], row["call"], row["gate"]) for row in rows] == [
        ("one", "training step", "pass"),
        ("one", "evaluation", "pass"),
        ("one", "sampling", "pass"),
        ("three", "training step", "fail"),
        ("three", "evaluation", "fail"),
    ]
    out = capsys.readouterr().out
    assert "two: left out, no_such_library is not installed" in out and "no speed is told" in out


def test_the_bench_takes_parts_of_names_and_a_limit(monkeypatch, capsys, tmp_path):
    def ended():
        raise KeyboardInterrupt

    cases = {"torch Critic": critic, "torch other critic": critic, "zuko MAF": ended}
    monkeypatch.setattr(swap, "CASES", cases)
    assert list(swap.find(["CRITIC"])) == ["torch Critic", "torch other critic"] and swap.find([]) == cases
    assert main(["bench", "swap", "torch", "--quick", "--limit", "0.001"]) == 0
    out = capsys.readouterr().out
    assert "torch Critic  training step" in out and "torch other critic: left out, the 0.001 s being over" in out
    file = tmp_path / "rows.json"
    assert main(["bench", "swap", "Critic", "zuko", "--quick", "--json", str(file)]) == 130
    assert [row["case"] for row in json.loads(file.read_text())["rows"]] == ["torch Critic"] * 3 + [
        "torch other critic"
    ] * 3


def test_every_case_has_a_loss():
    for name, make in swap.CASES.items():
        torch.manual_seed(0)
        try:
            model, loss, _ = make()
        except ModuleNotFoundError:  # test_the_bench_writes_its_rows… says what is told of it
            continue
        assert loss(model).isfinite(), name
