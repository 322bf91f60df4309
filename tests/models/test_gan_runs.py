"""Whole runs of adversarial models: on the kernels and on the reference, in two precisions, cut in two, to an end."""

import functools

import pytest
import torch

from genkernels import training
from genkernels.training import TrainConfig, fit
from tests.models.gans import EVERY, NAMES, small, tiny

pytest.importorskip("lightning")


def config(**changes) -> TrainConfig:
    small = {"max_steps": 30, "batch_size": 16, "accelerator": "cpu", "eval_every": 0, "samples": 4}
    return TrainConfig(**{**small, "clip": 0.0, "warmup": 0, "lr": 2e-4, "betas": (0.0, 0.9), **changes})


def moved(history: dict) -> dict[str, list[float]]:
    return {name: [v for v in values if v is not None] for name, values in history.items() if name.endswith("/loss")}


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_a_run_on_the_kernels_is_one_on_the_reference(name, kind):
    """In fp64 to the sixth digit, in fp32 within a thousandth, or within a few units of the last place of the scores
    whose difference a loss is. Of images a bias whose gradient cancels in one order of a convolution's sums and not in
    another moves by Adam's whole step, which shifts the level of the scores: the generator's loss shows it."""
    bundle = small("digits" if kind == "images" else "eight_gaussians")
    last_places = 1e-8 if kind == "points" else 3e-4
    for dtype, relative, absolute in ((torch.float64, 1e-6, 0.0), (torch.float32, 1e-3, last_places)):
        models = [tiny(name, kind).to(dtype) for _ in range(2)]
        reference, auto = (
            moved(fit(model, bundle, config(backend=b), quiet=True).history)
            for model, b in zip(models, ("reference", "auto"), strict=True)
        )
        for player, truth in reference.items():
            assert len(truth) == (30 if player == "critic/loss" or name in ("gan", "r3gan", "bigan") else 6)
            for a, b in zip(truth, auto[player], strict=True):
                assert abs(a - b) <= relative * abs(a) + absolute, (dtype, player)


@pytest.mark.parametrize("name", ["wgangp", "sngan", "r3gan", "bigan"])
def test_a_run_of_mixed_precision_is_near_one_of_fp32(name):
    bundle = small("digits")
    found = [
        moved(fit(tiny(name, "images"), bundle, config(max_steps=6, precision=p), quiet=True).history)
        for p in ("32", "bf16-mixed")
    ]
    for player, truth in found[0].items():
        assert found[1][player] == pytest.approx(truth, rel=0.05, abs=0.05)


def adaptive(seed=0):
    model = tiny("gan", "images", seed, augment=0.3, adaptive=True)
    model.augment.images = 5000  # a probability that is on its way, neither 0 nor 1
    return model


GOING_ON = {name: (functools.partial(tiny, name), "eight_gaussians") for name in NAMES}
GOING_ON |= {"augmented": (adaptive, "digits")}


@pytest.mark.parametrize("name", GOING_ON)
def test_a_run_that_goes_on_reaches_the_same_losses(name, tmp_path):
    make, data = GOING_ON[name]
    bundle, settings = small(data), config(max_steps=12, ema=0.9, checkpoint_every=5)
    whole = fit(make(), bundle, settings, out=tmp_path / "whole", quiet=True)
    cut = fit(make(), bundle, settings.changed(max_steps=7), out=tmp_path / "cut", quiet=True)
    if name == "augmented":
        assert 0 < whole.model.augment.p != cut.model.augment.p < 0.3
    again = fit(make(seed=1), bundle, settings, out=tmp_path / "cut", resume=True, quiet=True)
    assert again.history == whole.history and repr(again.held_out) == repr(whole.held_out)
    state = whole.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in again.model.state_dict().items())


def test_the_ring_is_found_in_a_few_hundred_steps():
    model, bundle = tiny("r3gan", gamma=0.1, width=64, depth=3, latent=8), small("eight_gaussians", 20_000, 1000)
    before = training.evaluate(model, bundle.test)["sliced_wasserstein"].value
    result = fit(model, bundle, config(max_steps=400, batch_size=64, lr=1e-3, ema=0.98), quiet=True)
    after = result.held_out["sliced_wasserstein"].value
    assert before > 0.6 and after < before / 2
