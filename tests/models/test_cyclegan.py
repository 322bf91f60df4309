"""CycleGAN: its terms, its pool, that a run which goes on has the pool and the step size of the unbroken one, and its
pictures."""

import gc
import os
import signal

import pytest
import torch

from genkernels import data, models
from genkernels.cli import main
from genkernels.models.gan.image_pool import ImagePool
from genkernels.models.gan.translators import patch_critic, translator
from genkernels.training import TrainConfig, evaluate, fit
from tests.models.gans import gradients, near

SIZES = {"shape": (2, 8, 8), "grey_levels": 17, "width": 4, "blocks": 1, "pool": 5}


def tiny(seed=0, kind=models.CycleGAN, **changes):
    torch.manual_seed(seed)
    return kind(**{**SIZES, **changes})


def batch(n=3, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(17, (n, 2, 8, 8), generator=g).to(torch.uint8), torch.zeros(n)


def bundle(n=40):
    x = batch(n)[0]
    x[:, 1] //= 4  # the second domain is darker
    parts = data.TensorPairs(x[8:]), data.TensorPairs(x[:8])
    return data.DataBundle("domains", *parts, data.Form((2, 8, 8), 17), "two domains")


def config(**changes) -> TrainConfig:
    small = {
        "max_steps": 12,
        "batch_size": 2,
        "accelerator": "cpu",
        "eval_every": 4,
        "samples": 4,
        "schedule": "linear",
    }
    return TrainConfig(**{**small, "clip": 0.0, "warmup": 0, "lr": 1e-3, "betas": (0.5, 0.999), **changes})


# --- steps --------------------------------------------------------------------------------------------------------


def test_a_step_makes_gradients_for_its_own_player_alone():
    model, (x, y) = tiny().train(), batch()
    assert list(model.players()) == ["generator", "critic"]
    for player, other in (("generator", "critic"), ("critic", "generator")):
        model.zero_grad()
        model.losses(player, x, y, 0)["loss"].backward()
        assert all(gradients(model.players()[player].module)) and not any(gradients(model.players()[other].module))
        assert all(p.requires_grad for p in model.parameters())


def test_the_terms_are_those_of_the_paper():
    model, (x, y) = tiny(identity=0.5, pool=0).train(), batch()
    a, b = (x / 8 - 1).chunk(2, 1)
    to_a, to_b = model.generators["A"], model.generators["B"]
    fake_a, fake_b = to_a(b), to_b(a)
    fooling = (model.critics["A"](fake_a) - 1).square().mean() + (model.critics["B"](fake_b) - 1).square().mean()
    cycle = (to_a(fake_b) - a).abs().mean() + (to_b(fake_a) - b).abs().mean()
    identity = (to_b(b) - b).abs().mean() + (to_a(a) - a).abs().mean()
    terms = model.losses("generator", x, y, 0)
    for name, value in (("adversarial", fooling), ("cycle", cycle), ("identity", identity)):
        assert near(terms[name], value, 1e-5)
    assert near(terms["loss"], fooling + 10 * cycle + 5 * identity, 1e-5)
    critic = model.losses("critic", x, y, 0)
    for of, real, fake in (("a", a, fake_a), ("b", b, fake_b)):
        d = model.critics[of.upper()]
        halved = ((d(real) - 1).square().mean() + d(fake).square().mean()) / 2
        assert near(critic[f"loss_{of}"], halved, 1e-5)
    assert near(critic["loss"], critic["loss_a"] + critic["loss_b"], 1e-6)


def test_the_identity_term_is_0_where_a_generator_is_the_identity_and_absent_unless_asked_for():
    model, (x, y) = tiny(identity=0.5).train(), batch()
    for generator in model.generators.values():
        generator.forward = lambda images: images
    terms = model.losses("generator", x, y, 0)
    assert terms["identity"] == 0 and terms["cycle"] == 0
    assert "identity" not in tiny().losses("generator", x, y, 0)


# --- the pool -----------------------------------------------------------------------------------------------------


def test_the_pool_fills_then_gives_back_earlier_images_half_of_the_time():
    torch.manual_seed(0)
    pool, given = ImagePool(8, (1, 2, 2)), torch.arange(4000.0).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()
    first = pool(given[:8].requires_grad_())
    assert torch.equal(first, given[:8]) and not first.requires_grad and torch.equal(pool.images, given[:8])
    earlier, seen = 0, [*first.detach()[:, 0, 0, 0].tolist()]
    for image in given[8:].detach():
        (out,) = pool(image[None])
        earlier += not torch.equal(out, image)
        seen.append(out[0, 0, 0].item())
    assert 0.46 < earlier / 3992 < 0.54
    assert not pool.images.requires_grad
    assert sorted(pool.images[:, 0, 0, 0].tolist() + seen[8:]) == sorted(given[:, 0, 0, 0].tolist())
    whole = pool(given[:20].detach())
    assert whole.shape == (20, 1, 2, 2)


def test_a_pool_of_none_gives_back_what_it_is_given():
    images = torch.randn(3, 1, 2, 2)
    pool = ImagePool(0, (1, 2, 2))
    assert torch.equal(pool(images), images) and not pool.images.numel() and pool(images[:0]).shape == (0, 1, 2, 2)


def test_memory_is_flat_over_200_steps():
    model = tiny(shape=(2, 4, 4), width=2, blocks=0).train()
    x, y = torch.randint(17, (1, 2, 4, 4)).to(torch.uint8), torch.zeros(1)
    optimizers = {name: torch.optim.Adam(p.module.parameters()) for name, p in model.players().items()}

    def step(i):
        for name, optimizer in optimizers.items():
            optimizer.zero_grad()
            model.losses(name, x, y, i)["loss"].backward()
            optimizer.step()

    def tensors():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    for i in range(10):
        step(i)
    before = tensors()
    for i in range(10, 210):
        step(i)
    assert tensors() <= before
    assert all(buffer.grad_fn is None for buffer in model.buffers())


# --- runs ---------------------------------------------------------------------------------------------------------


class Cut(models.CycleGAN):
    """Sends its own process a signal in the midst of a step."""

    at = None

    def losses(self, player, x, y, step):
        if (player, step) == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().losses(player, x, y, step)


def test_a_run_that_goes_on_has_the_pool_and_the_step_size_of_the_unbroken_one(tmp_path, monkeypatch):
    """Stopped in the midst of the decay, with a pool that is full."""
    monkeypatch.setitem(models.MODELS, "cyclegan", Cut)
    images, settings = bundle(), config(ema=0.9)
    whole = fit(tiny(kind=Cut), images, settings, out=tmp_path / "whole", quiet=True)
    monkeypatch.setattr(Cut, "at", ("critic", 8))
    first = fit(tiny(kind=Cut), images, settings, out=tmp_path / "cut", quiet=True)
    assert first.steps == 9
    monkeypatch.setattr(Cut, "at", None)
    second = fit(tiny(1, kind=Cut), images, settings, out=tmp_path / "cut", resume=True, quiet=True)
    assert second.history == whole.history and repr(second.held_out) == repr(whole.held_out)
    state = whole.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in second.model.state_dict().items())
    assert state["pools.A.held"] == 5


def test_the_cycle_loss_falls_and_the_pictures_are_in_the_folder(tmp_path, capfd):
    images = bundle()
    model = tiny(width=8)
    before = evaluate(model, images.test)["cycle"].value
    result = fit(model, images, config(max_steps=60, eval_every=30, ema=0.5), out=tmp_path / "run", quiet=True)
    assert result.held_out["cycle"].value < 0.7 * before
    names = sorted(path.name for path in (tmp_path / "run" / "samples").glob("*.png"))
    sheets = [f"step-{step:08d}-translations_{of}.png" for step in (30, 60) for of in "ab"]
    assert names == sheets
    assert main(["sample", str(tmp_path / "run")]) == 2
    assert "cyclegan translates images and has nothing to sample from" in capfd.readouterr().err


@pytest.mark.parametrize("backend", ["auto"])
def test_a_run_on_the_kernels_is_one_on_the_reference(backend):
    found = [
        fit(tiny(), bundle(), config(max_steps=30, eval_every=0, backend=b), quiet=True).history
        for b in ("reference", backend)
    ]
    for name, truth in found[0].items():
        assert all(abs(a - b) <= 1e-3 * abs(a) for a, b in zip(truth, found[1][name], strict=True)), name


def test_the_step_size_is_constant_for_half_of_the_run_and_then_falls_to_0():
    settings = config(max_steps=100, lr=1.0)
    rates = [settings.lr_at(step, 100) for step in range(100)]
    assert rates[:51] == [1.0] * 51 and rates[75] == pytest.approx(0.5) and rates[99] == pytest.approx(0.02)


# --- translations -------------------------------------------------------------------------------------------------


def test_translations_and_their_sheets():
    model, (x, y) = tiny().train(), batch()
    a = x[:, :1]
    b = model.translate(a, "B")
    assert b.shape == a.shape and 0 <= b.min() and b.max() <= 1 and model.training and not b.requires_grad
    assert torch.equal(b, model.translate(a / 16, "B")) and not torch.equal(b, model.translate(a, "A"))
    sheets = model.pictures(x, y)
    assert sheets["translations_a"].shape == (3, 1, 8, 24)
    there, back = sheets["translations_a"][..., 8:16], sheets["translations_a"][..., 16:]
    assert torch.equal(sheets["translations_a"][..., :8], a / 16) and torch.equal(there, b)
    torch.testing.assert_close(back, (model.eval().generators["A"](2 * there - 1) + 1) / 2)


@pytest.mark.parametrize("shape", [(1, 4, 4), (1, 8, 8), (3, 32, 32), (2, 7, 5), (3, 64, 64)])
def test_networks_of_any_size(shape):
    x = torch.randn(1, *shape)
    assert translator(shape, 4, 1)(x).shape == x.shape
    assert patch_critic(shape, 4)(x).shape[:2] == (1, 1)


def test_the_sizes_of_the_paper():
    with torch.device("meta"):
        model = models.CycleGAN.from_preset("cyclegan256")
    assert sum(p.numel() for p in model.generators["A"].parameters()) == 11_378_179
    assert sum(p.numel() for p in model.critics["A"].parameters()) == 2_764_737
    assert model.critics["A"](torch.empty(1, 3, 256, 256, device="meta")).shape == (1, 1, 30, 30)
    training = models.CycleGAN.presets["cyclegan256"].training
    assert training["batch_size"] == 1 and training["schedule"] == "linear" and model.pools["A"].size == 50


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"shape": (3, 8, 8)}, r"CycleGAN: shape must be \(2C, H, W\), .* --data folder:A,B gives it, got 3 channels"),
        ({"shape": (2, 3, 8)}, "CycleGAN: height and width must be at least 4, got 3x8"),
        ({"num_classes": 2}, "CycleGAN: num_classes must be None"),
        ({"width": 0}, "CycleGAN: width must be at least 1, got 0"),
        ({"cycle": 0.0}, "CycleGAN: cycle must be above 0, got 0.0"),
        ({"identity": -1.0}, "CycleGAN: identity must be at least 0, got -1.0"),
    ],
)
def test_refused_in_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny(**options)


def test_what_it_cannot_do_is_said():
    model, (x, _) = tiny(), batch()
    with pytest.raises(ValueError, match="there is no prior to sample from"):
        model.sample(3)
    with pytest.raises(ValueError, match="to must be 'A' or 'B', got 'C'"):
        model.translate(x[:, :1], "C")
    with pytest.raises(ValueError, match=r"x must be \[N, 1, 8, 8\], got \[3, 2, 8, 8\]"):
        model.translate(x, "A")
