"""ActNorm's data-dependent start and the flag that remembers it."""

import copy
import io
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

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


def test_non_finite_data_leave_a_channel_as_it_was():
    layer = gnn.ActNorm(2)
    layer(torch.tensor([[3.0, float("nan")], [5.0, 0.0]]))
    assert torch.equal(layer.bias, torch.tensor([-4.0, 0.0])) and torch.equal(layer.log_scale, torch.zeros(2))


@pytest.mark.parametrize("x", [torch.zeros(8, 2), torch.tensor([[3.0, 4.0]]), torch.full((8, 2), float("nan"))])
def test_a_batch_in_which_nothing_varies_is_no_start(x):
    layer = gnn.ActNorm(2)
    with pytest.warns(UserWarning, match="does not count as the data-dependent start"):
        z, _ = layer(x)
    assert torch.equal(z, x) or x.isnan().all()
    assert not layer.ready and layer.bias.count_nonzero() == 0
    data = torch.randn(64, 2) * 3 + 7
    torch.testing.assert_close(layer(data)[0].std(0, unbiased=False), torch.ones(2))


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


def average(layer):
    average = torch.optim.swa_utils.AveragedModel(layer)  # before the start
    return average, average.module, lambda: average.update_parameters(layer)


def copied_in_place(layer):
    other = gnn.ActNorm(3)

    def copy_all():
        for name, value in other.state_dict().items():
            value.copy_(layer.state_dict()[name])

    return other, other, copy_all


@pytest.mark.parametrize("kind", [average, copied_in_place])
def test_a_flag_copied_in_place_is_the_flag(kind):
    layer = gnn.ActNorm(3)
    module, other, update = kind(layer)
    module(torch.randn(1, 3).expand(4, 3)) if kind is not average else None  # a look at the flag before
    layer(torch.randn(64, 3) * 5 + 3)
    update()
    assert other.ready
    module(torch.randn(8, 3) - 100)
    assert torch.equal(other.bias, layer.bias) and torch.equal(other.log_scale, layer.log_scale)


def test_a_flag_cleared_in_place_starts_anew():
    layer = gnn.ActNorm(3)
    layer(torch.randn(8, 3))
    layer.initialized.fill_(False)
    assert not layer.ready
    z, _ = layer(torch.randn(64, 3) + 50)
    torch.testing.assert_close(z.mean(0), torch.zeros(3), rtol=0, atol=1e-4)


def test_a_skeleton_starts_nothing_and_writes_nothing():
    """``functional_call`` hands in tensors whose flag is set, of one model and of several stacked ones."""
    started, skeleton = [gnn.ActNorm(3) for _ in range(3)], gnn.ActNorm(3)
    for i, layer in enumerate(started):
        layer(torch.randn(64, 3) * (i + 1) + i)
    before = [copy.deepcopy(layer.state_dict()) for layer in started]
    x = torch.randn(16, 3) - 50
    for layer, state in zip(started, before, strict=True):
        z, _ = torch.func.functional_call(skeleton, layer.state_dict(), (x,))
        assert torch.equal(z, layer(x)[0])
        assert all(torch.equal(layer.state_dict()[name], value) for name, value in state.items())
    stacked = torch.func.stack_module_state(started)
    z, _ = torch.func.vmap(lambda p, b: torch.func.functional_call(skeleton, (p, b), (x,)))(*stacked)
    torch.testing.assert_close(z, torch.stack([layer(x)[0] for layer in started]))
    assert not skeleton.ready and skeleton.bias.count_nonzero() == 0

    fresh = torch.func.stack_module_state([gnn.ActNorm(3) for _ in range(2)])
    with pytest.raises(RuntimeError, match="cannot happen inside a transform of torch.func: run one batch"):
        torch.func.vmap(lambda p, b: torch.func.functional_call(skeleton, (p, b), (x,)))(*fresh)
    stacked[1]["initialized"][0] = False
    with pytest.raises(RuntimeError, match="either all or none must have started"):
        torch.func.vmap(lambda p, b: torch.func.functional_call(skeleton, (p, b), (x,)))(*stacked)


def test_a_pass_without_data_starts_nothing():
    layer = gnn.ActNorm(4)
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer(torch.zeros(2, 4))
    gnn.ActNorm(4).to("meta")(torch.zeros(2, 4, device="meta"))
    assert not layer.ready and not layer.initialized
    z, _ = layer(torch.randn(64, 4) * 100 + 1e4)
    torch.testing.assert_close(z.std(0, unbiased=False), torch.ones(4), rtol=1e-3, atol=0)


def test_a_replica_does_not_start():
    """What `DataParallel` makes in each pass: the start would be that of its share alone, and lost."""
    layer = gnn.ActNorm(3)

    def replica():
        made = layer._replicate_for_data_parallel()
        for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
            setattr(made, name, tensor.detach())
        return made

    with pytest.raises(RuntimeError, match="cannot happen in a replica of nn.DataParallel"):
        replica()(torch.randn(64, 3) + 3)
    layer(torch.randn(64, 3) + 3)
    bias = layer.bias.clone()
    replica()(torch.randn(64, 3) + 50)
    assert torch.equal(layer.bias, bias)


def test_a_parametrised_scale_is_not_started_in_vain():
    layer = gnn.ActNorm(3)
    torch.nn.utils.parametrize.register_parametrization(layer, "log_scale", torch.nn.Tanh())
    with pytest.raises(RuntimeError, match="cannot happen while its bias or log_scale is parametrised"):
        layer(torch.randn(64, 3) * 9)


def test_no_pass_after_the_start_reads_the_device():
    """The flag is read where its tensor has changed: no later pass waits for a device."""
    flow = gnn.FlowSequential(gnn.ActNorm(4), gnn.InvertibleConv1x1(4), gnn.ActNorm(4))
    x = torch.randn(8, 4, 2, 2)
    flow(x)
    with Watch() as watch:
        for _ in range(2):
            z, ldj = flow(x)
            (z.square().sum() - ldj.sum()).backward()
            flow.inverse(z.detach())
    assert watch.calls and not watch.reads()


def test_the_first_batch_under_activation_checkpointing():
    flow = gnn.FlowSequential(gnn.ActNorm(4), gnn.InvertibleConv1x1(4), gnn.AffineCoupling(torch.nn.Linear(2, 4)))
    other, x = copy.deepcopy(flow), torch.randn(8, 4)
    for z, ldj in (torch.utils.checkpoint.checkpoint(flow, x, use_reentrant=False), other(x)):
        (z.square().sum() - ldj.sum()).backward()
    for mine, theirs in zip(flow.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs) and torch.equal(mine.grad, theirs.grad)


def test_parameters_without_a_flag_are_a_start():
    """A state dict of another library, loaded with ``strict=False``; one of zeros is none."""
    layer = gnn.ActNorm(3)
    layer(torch.randn(64, 3) * 5 + 3)
    for state, started in ((layer.state_dict(), True), (gnn.ActNorm(3).state_dict(), False)):
        del state["initialized"]
        fresh = gnn.ActNorm(3)
        fresh.load_state_dict(state, strict=False)
        assert fresh.ready == bool(fresh.initialized) == started
    with pytest.raises(RuntimeError, match="Missing key.*initialized"):
        fresh.load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
@pytest.mark.parametrize("kind", [gnn.ActNorm, gnn.InvertibleConv1x1])
def test_integers_are_refused(kind, dtype):
    """The weights follow the dtype of x: as integers they would be cut to whole numbers."""
    layer, x = kind(4), torch.ones(8, 4, dtype=dtype)
    for flow in (layer, gnn.FlowSequential(layer, layer), gnn.FlowSequential(gnn.ActNorm(4), layer).eval()):
        for run in (flow, flow.inverse):
            with pytest.raises(TypeError, match=f"x must be floating point, got {dtype}"):
                run(x)


RANKS = """
import sys, warnings, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP
from genkernels import nn as gnn
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
everything = torch.arange(24.0).view(8, 3).square()
mine = everything[:2] if rank == 0 else everything[2:]

def assert_started_from(layer, batch):
    std, mean = torch.std_mean(batch, 0, unbiased=False)
    torch.testing.assert_close(layer.bias, -mean)
    torch.testing.assert_close(layer.log_scale, -std.log())

named, wrapped = gnn.ActNorm(3), gnn.ActNorm(3)
named.initialize(mine, group=dist.group.WORLD)
assert_started_from(named, everything)
DDP(wrapped)(mine)
assert_started_from(wrapped, everything)

# weights that rank 0 alone has loaded: DDP hands them on, flag and all
loaded = gnn.ActNorm(3)
loaded(torch.randn(1, 3).expand(4, 3)) if rank else loaded.load_state_dict(named.state_dict())
model = DDP(loaded)
for _ in range(2):
    z, ldj = model(mine + 1000)
    (z.sum() + ldj.sum()).backward()
    assert_started_from(loaded, everything)

# one rank by itself waits for nobody, whatever the other reduces meanwhile
if rank == 0:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        alone = gnn.ActNorm(3)
        alone(mine)
    assert_started_from(alone, mine)
    assert "from this process's batch alone" in str(told[0].message), told
total = torch.tensor([1000.0, 1000.0, 3.0])
dist.all_reduce(total)
assert total.tolist() == [2000.0, 2000.0, 6.0]
of_one = [dist.new_group([0]), dist.new_group([1])]
if rank == 0:
    single = gnn.ActNorm(3)
    DDP(single, process_group=of_one[0])(mine)
    assert_started_from(single, mine)

# what is written in place between two passes counts there too
model = DDP(wrapped)
model(mine)
for _ in range(2):
    wrapped.reset()
    model(mine)
    assert_started_from(wrapped, everything)
torch.manual_seed(0)
source, target = (gnn.MADE(6, 16, order="random") for _ in range(2))
x, model = torch.randn(5, 6), DDP(target)
for made in (source, gnn.MADE(6, 16), source):
    model(x)
    with torch.no_grad():
        for name, value in made.state_dict().items():
            target.state_dict()[name].copy_(value)
    torch.testing.assert_close(model(x), made(x))

# FSDP would lose what the start sets: it is refused there
sharded = gnn.FlowSequential(gnn.ActNorm(3), gnn.ActNorm(3))
fully_shard(sharded)
for run in (lambda: sharded(mine), lambda: sharded[0].initialize(mine)):
    try:
        run()
        raise SystemExit("not refused")
    except RuntimeError as error:
        assert "cannot happen under FSDP: run one batch in training mode, or initialize(x), before" in str(error), error
assert not sharded[0].initialized
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.filterwarnings("ignore")
def test_ranks_start_together_where_they_run_together_and_alone_where_not(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this build of torch has no torch.distributed")
    command = [sys.executable, "-c", RANKS]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
