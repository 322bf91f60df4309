"""The models on a GPU: the same training on either path, flat memory, no waiting for the device."""

import pytest
import torch

import genkernels as gk
from genkernels import models
from genkernels import nn as gnn
from genkernels.models.flows.nets import ConvNet

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def images(count, shape=(3, 16, 16)):
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.arange(shape[1]).view(-1, 1), torch.arange(shape[2])
    wave = torch.sin(rows * 0.4 + columns * 0.3 + 6.3 * torch.rand(count, shape[0], 1, 1, generator=generator))
    noise = torch.randn(count, *shape, generator=generator)
    return ((0.5 + 0.4 * wave + 0.05 * noise).clamp(0, 1) * 255).round().to(torch.uint8).cuda()


def glow(**options):
    torch.manual_seed(0)
    sizes = {"shape": (3, 16, 16), "scales": 2, "steps": 4, "hidden": 32}
    return models.Glow(**{**sizes, **options}).cuda()


def train(model, batches):
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    generator, losses = torch.Generator("cuda").manual_seed(1), []
    for x in batches:
        optimizer.zero_grad()
        loss = model.loss(x, generator=generator)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("reversible", [False, True])
def test_training_is_the_same_on_the_fused_and_on_the_reference_path(reversible, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    batches = images(32 * 30).split(32)
    fused = train(glow(reversible=reversible), batches)
    with gk.use_backend("reference"):
        reference = train(glow(), batches)
    assert fused[-1] < fused[0]
    assert ((fused - reference).abs() <= 1e-4 * reference.abs()).all()


def test_round_trip_in_fp32_whatever_the_convolutions_round_to():
    model = glow(steps=16)
    train(model, images(32 * 5).split(32))
    x = torch.rand(16, 3, 16, 16, device="cuda")
    with torch.no_grad():
        back, _ = model.inverse(model(x)[0])
    assert (back - x).abs().max() <= 1e-5


def test_samples_repeat_and_come_from_either_kind_of_generator():
    model = glow()
    for device in ("cpu", "cuda"):
        first, second = (model.sample(4, generator=torch.Generator(device).manual_seed(3)) for _ in range(2))
        assert first.is_cuda and torch.equal(first, second)


def test_no_step_waits_for_the_device():
    x = images(16)
    for options in ({}, {"reversible": True}, {"lu": False}, {"num_classes": 5}):
        model = glow(**options)
        y = torch.zeros(16, dtype=torch.int64, device="cuda") if "num_classes" in options else None
        model.loss(x, y).backward()  # libraries may wait when first used
        model.zero_grad()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model.loss(x, y).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_memory_of_a_reversible_step_is_flat_in_depth():
    peaks = {}
    for reversible in (True, False):
        for steps in (4, 32):
            layers = [
                [gnn.ActNorm(16), gnn.InvertibleConv1x1(16), gnn.AffineCoupling(ConvNet(8, 16, 64))]
                for _ in range(steps)
            ]
            flow = gnn.FlowSequential(*sum(layers, []), reversible=reversible).cuda()
            x = torch.randn(16, 16, 32, 32, device="cuda")
            for _ in range(2):
                flow.zero_grad()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                z, ldj = flow(x)
                (z.square().mean() - ldj.mean()).backward()
                del z, ldj
            grads = torch.cuda.memory_allocated() - before
            peaks[reversible, steps] = torch.cuda.max_memory_allocated() - before - grads
            del flow
    assert peaks[True, 32] <= 1.1 * peaks[True, 4]
    assert peaks[False, 32] > 4 * peaks[True, 32]


@pytest.mark.parametrize("head", ["categorical", "logistic_mixture"])
def test_pixel_models_train_and_sample_as_the_reference_does(head, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    model = models.GatedPixelCNN(shape=(3, 7, 5), grey_levels=16, width=12, layers=2, head=head).cuda()
    x = torch.randint(16, (8, 3, 7, 5), dtype=torch.uint8, device="cuda")
    losses, samples = [], []
    for backend in ("auto", "reference"):
        with gk.use_backend(backend):
            loss = model.loss(x)
            losses.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
            samples.append(model.sample(4, generator=torch.Generator("cuda").manual_seed(3)))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
    assert torch.equal(*samples)


@pytest.mark.parametrize("kind", [models.MAF, models.IAF])
def test_autoregressive_flows_invert(kind):
    torch.manual_seed(0)
    model = kind(shape=(20,), transforms=3, hidden=64).cuda()
    x = torch.randn(50, 20, device="cuda")
    with torch.no_grad():
        back, _ = model.inverse(model(x)[0])
    assert (back - x).abs().max() <= 1e-5
