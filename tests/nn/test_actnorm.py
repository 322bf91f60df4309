"""ActNorm's data-dependent start and the flag that remembers it."""

import copy
import io
import subprocess
import sys

import pytest
import torch

from genkernels import nn as gnn
from tests.nn.flow_checks import Watch


@pytest.mark.parametrize("shape", [(64, 3), (16, 3, 5), (8, 3, 4, 6)])
def test_first_training_batch_comes_out_normalised(shape):
    layer = gnn.ActNorm(3)
    x = torch.randn(shape) * 5 + 7
    z, _ = layer(x)
    axes = [0, *range(2, len(shape))]
    torch.testing.assert_close(z.mean(axes), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(z.var(axes, unbiased=False), torch.ones(3), rtol=1e-4, atol=0)
    assert layer.ready and bool(layer.initialized)


def test_second_batch_changes_nothing():
    layer = gnn.ActNorm(3)
    layer(torch.randn(8, 3))
    before = copy.deepcopy(layer.state_dict())
    layer(torch.randn(8, 3) * 100)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_identity_until_initialised():
    layer = gnn.ActNorm(3).eval()
    x = torch.randn(8, 3, 2, 2)
    assert torch.equal(layer(x)[0], x) and torch.equal(layer.inverse(x)[0], x)
    assert torch.equal(layer.train().inverse(x)[0], x)
    assert not layer.ready and not layer.initialized


@pytest.mark.parametrize("level", [0.0, 1.0, -3e4])
def test_channel_without_variance_keeps_its_scale(level):
    x = torch.randn(64, 2)
    x[:, 1] = level
    layer = gnn.ActNorm(2)
    z, ldj = layer(x)
    assert torch.isfinite(z).all() and torch.isfinite(ldj).all()
    assert layer.log_scale[1] == 0
    torch.testing.assert_close(z[:, 1], torch.zeros(64), rtol=0, atol=abs(level) * 1e-6)
    torch.testing.assert_close(z[:, 0].std(unbiased=False), torch.tensor(1.0))


def test_one_sample_and_non_finite_data_leave_usable_parameters():
    layer = gnn.ActNorm(2)
    layer(torch.tensor([[3.0, float("nan")]]))
    assert torch.equal(layer.bias, torch.tensor([-3.0, 0.0])) and torch.equal(layer.log_scale, torch.zeros(2))


def test_tiny_variance_is_still_normalised():
    layer = gnn.ActNorm(1)
    z, _ = layer(torch.randn(256, 1, dtype=torch.float64) * 1e-3)
    torch.testing.assert_close(z.std(unbiased=False), torch.ones((), dtype=torch.float64), rtol=1e-3, atol=0)


def test_half_precision_start_is_computed_in_fp32():
    x = torch.randn(4096, 1) + 100
    layer = gnn.ActNorm(1)
    layer(x.bfloat16())
    torch.testing.assert_close(-layer.bias, x.bfloat16().float().mean(0), rtol=1e-6, atol=0)


def test_flag_travels_with_the_state_dict_and_the_copy():
    layer = gnn.ActNorm(3)
    layer(torch.randn(8, 3) + 5)
    stored = io.BytesIO()
    torch.save(layer.state_dict(), stored)
    stored.seek(0)
    for assign in (False, True):
        fresh = gnn.ActNorm(3)
        fresh.load_state_dict(torch.load(stored), assign=assign)
        stored.seek(0)
        assert fresh.ready and bool(fresh.initialized)
        bias = fresh.bias.clone()
        fresh(torch.randn(8, 3) - 50)
        assert torch.equal(fresh.bias, bias) and torch.equal(bias, layer.bias)
    assert copy.deepcopy(layer).ready
    back = gnn.ActNorm(3)
    layer.load_state_dict(back.state_dict())
    assert not layer.ready, "an uninitialised state starts anew"


def test_no_pass_reads_the_device():
    """The flag's mirror is what forward looks at: no pass waits for a device, not even the first."""
    flow = gnn.FlowSequential(gnn.ActNorm(4), gnn.InvertibleConv1x1(4), gnn.ActNorm(4))
    x = torch.randn(8, 4, 2, 2)
    with Watch() as watch:
        for _ in range(2):
            z, ldj = flow(x)
            (z.square().sum() - ldj.sum()).backward()
            flow.inverse(z.detach())
    assert watch.calls and not watch.reads()


RANK = """
import sys, torch, torch.distributed as dist
from genkernels import nn as gnn
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
everything = torch.arange(24.0).view(8, 3).square()
layer = gnn.ActNorm(3)
layer(everything[:2] if rank == 0 else everything[2:])
alone = gnn.ActNorm(3)
dist.destroy_process_group()
alone(everything)
torch.testing.assert_close(layer.bias, alone.bias)
torch.testing.assert_close(layer.log_scale, alone.log_scale)
"""


def test_ranks_start_from_the_batch_of_all_of_them(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this build of torch has no torch.distributed")
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
