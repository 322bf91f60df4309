"""What a user's own network is checked by."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import genkernels as gk
from genkernels.testing import check_penalty


def test_both_penalties_are_printed_and_agree(capsys):
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)).double()
    found = gk.testing.check_penalty(net, torch.randn(5, 4, dtype=torch.float64))
    assert found.penalty == pytest.approx(found.by_autograd, rel=1e-12) and found.difference < 1e-12
    assert found.way == "four passes: every step is piecewise linear"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"penalty              {found.penalty:.8g}" and len(lines) == 4 and lines[-1].endswith(found.way)
    assert all(p.grad is None for p in net.parameters())


def test_what_a_critic_keeps_is_put_back():
    net = nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 8)), nn.Tanh(), nn.Linear(8, 1))
    before = {name: t.clone() for name, t in net.state_dict().items()}
    found = check_penalty(net, torch.randn(5, 4))
    assert found.difference < 1e-5 and found.way.startswith("six passes")
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())


def test_a_critic_without_rules_agrees_with_itself(capsys):
    net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1))
    assert check_penalty(net, torch.randn(5, 4), target=0.0).difference == 0
    assert "double backward: layer '1' (LayerNorm)" in capsys.readouterr().out


def test_a_function_is_no_critic_to_check():
    with pytest.raises(TypeError, match="check_penalty: critic must be a torch.nn.Module, got function"):
        check_penalty(lambda x: x.sum(1), torch.zeros(2, 3))
