"""HierarchicalVAE and PixelVAE: levels drawn and scored in one order, bounds, re-sampled levels."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import genkernels as gk
from genkernels.cli import main
from genkernels.models.vae import grids
from genkernels.training import TrainConfig, fit
from tests.models.gans import small

SIZES = {"shape": (1, 4, 8), "grey_levels": 5, "strides": (4, 1), "latent": (2, 2), "width": 6}


def restless(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """In fp64, with weights that leave nothing at 0: latents, levels and features all matter."""
    rng = torch.Generator().manual_seed(seed)
    for p in model.double().parameters():
        with torch.no_grad():
            p.copy_(
                torch.randn(p.shape, generator=rng, dtype=p.dtype)
                / math.sqrt(max(1, p[0].numel() if p.dim() > 1 else 9))
            )
    return model


def images(count=3, seed=1):
    return torch.randint(5, (count, 1, 4, 8), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@pytest.fixture(params=[gk.models.HierarchicalVAE, gk.models.PixelVAE], ids=["levels", "pixels"])
def model(request):
    sizes = SIZES | ({"pixel_width": 4, "pixel_layers": 1} if request.param is gk.models.PixelVAE else {})
    return restless(request.param(**sizes))


def scored_by_cells(top_down, latents):
    """log p(z_l | z_>l) of each level, cell by cell as a sampler goes: what a cell's prior is must not hang on the
    cells from it on, which are filled with other numbers."""
    d = top_down.start.view(1, -1, 1, 1).expand(len(latents[0]), -1, *top_down.grids[0])
    found = []
    for i, (level, z) in enumerate(zip(top_down.levels, latents, strict=True)):
        d = top_down.between[i - 1](d) if i else d
        total = torch.zeros(len(z), dtype=z.dtype)
        seen = torch.full_like(z, 7.0)
        for row, column in itertools.product(*map(range, z.shape[2:])):
            cell = (..., row, column)
            mean = log_scale = torch.zeros_like(z)
            if level.prior is not None:
                mean, log_scale = level.prior(seen, d)
            normal = torch.distributions.Normal(mean[cell], log_scale[cell].exp())
            total += normal.log_prob(z[cell]).sum(1)
            seen[cell] = z[cell]
        found.append(total)
        d = level.after(d + level.enter(z))
    return found


def test_the_latents_of_a_picture_scored_cell_by_cell_give_the_prior_of_its_bound(model):
    """Also where H and W differ, and so a transposition or another order of levels shows."""
    latents = model.encode(images(), generator=torch.Generator().manual_seed(2))
    assert [tuple(z.shape) for z in latents] == [(3, 2, 1, 2), (3, 2, 4, 8)] and model.names == ("1x2", "4x8")
    with torch.no_grad():
        expected = scored_by_cells(model.posterior, latents)
    for ours, cells in zip(model.log_prior(latents), expected, strict=True):
        torch.testing.assert_close(ours, cells, rtol=1e-12, atol=1e-12)


def test_samples_come_in_the_order_in_which_they_are_scored(model):
    """The noise that a sample was made of, found from the densities that score it."""
    top_down = model.posterior
    noise = model._noises(2, torch.Generator().manual_seed(3))
    with torch.no_grad():
        drawn = top_down(2, noise)
        d = top_down.start.view(1, -1, 1, 1).expand(2, -1, *top_down.grids[0])
        for i, (level, z) in enumerate(zip(top_down.levels, drawn.latents, strict=True)):
            d = top_down.between[i - 1](d) if i else d
            mean, log_scale = level.prior(z, d) if i else (torch.zeros_like(z), torch.zeros_like(z))
            torch.testing.assert_close((z - mean) * torch.exp(-log_scale), noise[i], rtol=1e-10, atol=1e-10)
            d = level.after(d + level.enter(z))


@pytest.mark.parametrize("broken", ["transposed", "backwards", "levels"])
def test_another_order_would_be_seen(model, broken, monkeypatch):
    def draw(self, noise, d):
        conditions, z = self.conditions(d), torch.zeros_like(noise)
        height, width = noise.shape[2:]
        cells = list(itertools.product(range(height), range(width)))
        if broken == "transposed":
            cells = [(row, column) for column in range(width) for row in range(height)]
        for row, column in reversed(cells) if broken == "backwards" else cells:
            mean, log_scale = self.given(z, conditions)
            cell = (..., row, column)
            z[cell] = mean[cell] + log_scale[cell].exp() * noise[cell]
        return z

    if broken == "levels":  # encoder and levels disagree on the order
        forward = grids.BottomUp.forward
        monkeypatch.setattr(grids.BottomUp, "forward", lambda self, x: forward(self, x)[::-1])
        with pytest.raises(RuntimeError):
            model.encode(images())
    else:
        monkeypatch.setattr(grids.GridPrior, "draw", draw)
        with pytest.raises(AssertionError):
            test_samples_come_in_the_order_in_which_they_are_scored(model)


def test_a_bound_is_its_terms_and_many_draws_tighten_it(model):
    x, rng = images(), torch.Generator()
    with torch.no_grad():
        terms = model.losses("model", x, torch.zeros(3), 0)
        torch.testing.assert_close(terms["kl"], sum(terms[f"kl_{name}"] for name in model.names))
        torch.testing.assert_close(terms["bound"], -terms["kl"] - terms["reconstruction"])
        torch.testing.assert_close(terms["loss"], terms["bound"] / (-32 * math.log(2)))
        repeated = [model.log_bound(x, generator=rng.manual_seed(i)) for i in range(150)]
        once = torch.stack(repeated)
        many = torch.stack(
            [model.log_bound(x, importance=50, chunk=7, generator=rng.manual_seed(i)) for i in range(20)]
        )
    error = (once.var(0) / len(once) + many.var(0) / len(many)).sqrt()
    assert (many.mean(0) > once.mean(0) - 3 * error).all()
    assert (many.mean(0) > once.mean(0) + 3 * error).any()  # the weights are far from equal


def test_the_divergence_is_the_mean_of_what_the_draws_say(model):
    """In closed form cell by cell, given the cells before, against log q − log p."""
    target, _ = model._prepared(images(), None, None)
    with torch.no_grad():
        drawn, _ = model._draws(target, None, model._encoded(target), 1000, torch.Generator().manual_seed(4))
    for kl, q, p in zip(drawn.kl, drawn.log_posterior, drawn.log_prior, strict=True):
        gap = (q - p - kl).view(3, -1)
        assert (gap.mean(1).abs() < 4 * gap.std(1) / math.sqrt(1000)).all()


def test_the_gradient_of_two_passes_is_that_of_one_graph():
    def of(chunk):
        model = restless(gk.models.HierarchicalVAE(**SIZES, importance=6, chunk=chunk))
        torch.manual_seed(0)
        model.losses("model", images(), torch.zeros(3), 0)["loss"].backward()
        return [p.grad for p in model.parameters()]

    for ours, expected in zip(of(6), of(None), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    assert all(grad.isfinite().all() and grad.any() for grad in of(4))


def test_re_sampling_holds_the_levels_above(model, monkeypatch):
    """The held levels' share of the features is the same in all samples, what is below differs."""
    seen = []
    forward = grids.TopDown.forward

    def noting(self, *args, **kwargs):
        seen.append(forward(self, *args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(grids.TopDown, "forward", noting)
    pixels = "pixelcnn" in model._all_names()
    sample = model.sample(4, resample="4x8+pixelcnn" if pixels else "4x8", generator=torch.Generator().manual_seed(0))
    top, below = seen[-1].latents
    assert torch.equal(top, top[:1].expand_as(top)) and not torch.equal(below[0], below[1])
    assert sample.shape == (4, 1, 4, 8) and not torch.equal(sample[0], sample[1])
    if pixels:
        features = model.sample(4, resample="pixelcnn", generator=torch.Generator().manual_seed(0))
        assert torch.equal(seen[-1].features, seen[-1].features[:1].expand_as(seen[-1].features))
        assert not torch.equal(features[0], features[1])
    x = images(2)
    drawn = model.resample(x, "4x8+pixelcnn" if pixels else "4x8", generator=torch.Generator().manual_seed(5))
    (top, _) = seen[-1].latents
    assert torch.equal(top, model.encode(x, generator=torch.Generator().manual_seed(5))[0]) and drawn.shape == x.shape


def test_the_pixels_see_what_they_may_and_no_more():
    """The lossy variant: the features alone reach a pixel from beyond its receptive field."""
    model = restless(gk.models.PixelVAE(**SIZES, pixel_width=4, pixel_layers=3, receptive=1))
    network = model.likelihood.network
    x = torch.zeros(1, 1, 4, 8, dtype=torch.float64, requires_grad=True)
    features = torch.randn(1, 6, 4, 8, dtype=torch.float64, requires_grad=True)
    by_x, by_features = torch.autograd.grad(network(x, features)[0, :, 3, 4].square().sum(), (x, features))
    seen = {(int(r), int(c)) for r, c in by_x[0, 0].nonzero()}
    assert seen == {(2, 3), (2, 4), (2, 5), (3, 3)}
    assert by_features[0, :, 3, 4].abs().min() > 0


def test_what_the_pixels_see_of_the_latents_stays_in_scale():
    """Not normalised they grew to 240 within 140 steps, where the gates of the PixelCNN stay shut; now they are below
    5."""
    torch.manual_seed(0)
    model = gk.models.PixelVAE.from_preset("digits", width=8, pixel_width=8)
    x, _ = gk.data.load("digits").take("train", 64)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for step in range(140):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 100)
        loss = model.losses("model", x, None, step)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    drawn = model.posterior(64, model._noises(64, None), None, model._encoded(model.likelihood.target(x)))
    assert model.decoder(drawn.features).abs().max() < 8


def test_samples_of_the_cached_sampler_are_those_of_the_definition():
    model = restless(gk.models.PixelVAE(**SIZES, pixel_width=4, pixel_layers=1)).float()
    ours = model.sample(3, generator=torch.Generator().manual_seed(0))
    with gk.use_backend("reference"):
        assert torch.equal(ours, model.sample(3, generator=torch.Generator().manual_seed(0)))
    assert model.likelihood.network._as_written()


@pytest.mark.parametrize("grid", [(4, 6), (1, 5), (5, 1), (3, 2)])
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_a_prior_drawn_in_waves_is_the_one_drawn_pass_by_pass(grid, layers, monkeypatch):
    prior = restless(grids.GridPrior(3, 6, layers))
    rng = torch.Generator().manual_seed(0)
    noise, d = (torch.randn(2, c, *grid, generator=rng, dtype=torch.float64) for c in (3, 6))
    with gk.use_backend("reference"), torch.no_grad():
        wanted = prior.draw(noise, d)
    monkeypatch.setattr(grids.GridPrior, "given", None)  # no pass over the grid
    with torch.no_grad():
        torch.testing.assert_close(prior.draw(noise, d), wanted, rtol=1e-10, atol=1e-10)
        assert prior.draw(noise[:0], d[:0]).shape == (0, 3, *grid)


def test_a_prior_whose_layers_are_watched_is_drawn_by_their_calls():
    prior = restless(grids.GridPrior(2, 4, 1))
    calls = []
    prior.layers[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        prior.draw(torch.randn(1, 2, 2, 3).double(), torch.randn(1, 4, 2, 3).double())
    assert len(calls) == 6


def test_decoders_of_grey_levels_begin_as_they_are(model):
    before = [p.clone() for p in model.parameters()]
    model.begin(images(), torch.zeros(3))
    assert all(map(torch.equal, before, model.parameters()))


def test_classes_reach_every_level():
    model = restless(gk.models.HierarchicalVAE(**SIZES, num_classes=3))
    x, rng = images(), torch.Generator()
    one, other = (model.log_bound(x, torch.full((3,), y), generator=rng.manual_seed(0)) for y in (0, 1))
    assert not torch.equal(one, other)
    assert model.sample(2, y=1).shape == (2, 1, 4, 8)


@pytest.mark.parametrize(
    "change,words",
    [
        ({"strides": (4, 3)}, "strides must each divide the one before, got (4, 3)"),
        ({"shape": (1, 6, 8)}, "strides must divide the image's height and width, 6 and 8, got 4"),
        ({"shape": (3,)}, "shape must be (C, H, W)"),
        ({"latent": (2,)}, "latent must have one number of channels a level, 2, got (2,)"),
        ({"strides": ()}, "strides must be pixels a side of a cell"),
        ({"importance": 0}, "importance"),
        ({"importance": 4, "chunk": 5}, "chunk"),
        ({"importance": 4, "estimator": "dreg"}, "estimator must be iwae, miwae or ciwae"),
        ({"importance": 4, "free_bits": 1.0}, "kl_warmup and free_bits must be 0 where importance is not 1"),
        ({"free_bits": -1.0}, "free_bits must be at least 0"),
    ],
)
def test_wrong_sizes_are_one_sentence(change, words):
    sizes = SIZES | change
    if "shape" in change and len(change["shape"]) == 1:
        sizes["grey_levels"] = None
    with pytest.raises(ValueError) as error:
        gk.models.HierarchicalVAE(**sizes)
    assert str(error.value).startswith("HierarchicalVAE: ") and words in str(error.value)


def test_unknown_levels_are_one_sentence(model):
    for resample, words in (("2x2", "must name levels of 1x2, 4x8"), ("1x2", "must name the lowest levels")):
        with pytest.raises(ValueError, match=words):
            model.sample(1, resample=resample)
    with pytest.raises(ValueError, match="latents must be"):
        model.log_prior([torch.zeros(2, 2, 1, 2)])


# --- training -----------------------------------------------------------------------------------------------------


def tiny_run(name: str, seed: int = 0, **options) -> torch.nn.Module:
    torch.manual_seed(seed)
    sizes = {"shape": (1, 8, 8), "grey_levels": 17, "latent": (2, 2), "width": 6, **options}
    sizes |= {"pixel_width": 4, "pixel_layers": 1} if name == "pixelvae" else {}
    return gk.models.build(name, **sizes)


@pytest.mark.parametrize(
    "name,options", [("hierarchicalvae", {}), ("pixelvae", {}), ("hierarchicalvae", {"importance": 4, "chunk": 2})]
)
def test_training_on_the_kernels_is_that_on_the_reference(name, options):
    pytest.importorskip("lightning")
    settings = TrainConfig(max_steps=30, batch_size=8, eval_every=0, accelerator="cpu", ema=0.0)
    bundle, found = small("digits", 60, 20), []
    for backend in ("reference", "auto"):
        with gk.use_backend(backend):
            found.append(fit(tiny_run(name, **options), bundle, settings, quiet=True).history["loss"])
    assert found[1] == pytest.approx(found[0], rel=1e-4) and len(set(found[0])) == 30


@pytest.mark.parametrize("name", ["hierarchicalvae", "pixelvae"])
def test_a_run_that_goes_on_reaches_the_same_losses(name, tmp_path):
    pytest.importorskip("lightning")
    bundle, options = small("digits", 60, 20), {"kl_warmup": 8, "free_bits": 0.5}
    settings = TrainConfig(max_steps=10, batch_size=8, ema=0.9, checkpoint_every=3, eval_every=0, accelerator="cpu")
    whole = fit(tiny_run(name, **options), bundle, settings, out=tmp_path / "whole", quiet=True)
    fit(tiny_run(name, **options), bundle, settings.changed(max_steps=6), out=tmp_path / "cut", quiet=True)
    again = fit(tiny_run(name, seed=1, **options), bundle, settings, out=tmp_path / "cut", resume=True, quiet=True)
    assert again.history == whole.history and repr(again.held_out) == repr(whole.held_out)
    assert {"loss", "bound", "kl", "kl_1x1", "kl_4x4", "reconstruction"} <= set(whole.history)


def test_by_command(tmp_path, monkeypatch, capsys):
    pytest.importorskip("lightning")
    pytest.importorskip("PIL")
    monkeypatch.chdir(tmp_path)
    sizes = ["--set", "width=6", "--set", "pixel_width=4", "--set", "latent=2,2"]
    settings = ["--max-steps", "2", "--eval-examples", "30", "--samples", "4", "--accelerator", "cpu"]
    assert main(["train", "pixelvae", "--data", "digits", "--out", "run", *sizes, *settings]) == 0
    out, _ = capsys.readouterr()
    assert ", kl_4x4 " in out
    drawn = sorted(path.name for path in (tmp_path / "run/samples").iterdir())
    assert "step-00000002-resampled-pixelcnn.png" in drawn and "step-00000002-resampled-4x4+pixelcnn.png" in drawn
    argv = ["sample", "run", "--n", "3", "--accelerator", "cpu", "--out", "s.npz", "--set"]
    assert main([*argv, "resample=4x4+pixelcnn"]) == 0
    capsys.readouterr()
    assert main([*argv, "resample=8x8"]) == 2
    assert "PixelVAE: resample must name levels of 1x1, 4x4, pixelcnn" in capsys.readouterr().err
    assert main(["train", "pixelvae", "--data", "digits", "--set", "strides=3", "--max-steps", "1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
