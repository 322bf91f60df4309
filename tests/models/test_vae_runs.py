"""Training of variational models: on the kernels and on the reference, in two precisions, cut in two, to an end."""

import pytest
import torch

import genkernels as gk
from genkernels.training import TrainConfig, evaluate, fit
from tests.models.gans import small
from tests.models.vaes import EVERY, NAMES, tiny

pytest.importorskip("lightning")


def train(model, bundle, steps=30, batch=16, lr=1e-3, precision=torch.float32) -> list[float]:
    """The losses of a plain loop, whose batches and noise are functions of the step."""
    optimizer = torch.optim.Adam(model.train().parameters(), lr)
    x, y = bundle.take("train", len(bundle.train))
    found = []
    for step in range(steps):
        torch.manual_seed(step)
        rows = torch.randint(len(x), (batch,))
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            loss = model.losses("model", x[rows], y[rows], step)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize(("name", "posterior"), EVERY)
def test_training_on_the_kernels_is_that_on_the_reference(name, posterior):
    kind = "mlp" if posterior in ("planar", "iaf") else "points"
    bundle = small("digits" if kind == "mlp" else "eight_gaussians", 200, 40)
    options = {"chunk": 2} if name == "iwae" else {}
    found = []
    for backend in ("reference", "auto"):
        with gk.use_backend(backend):
            found.append(train(tiny(name, kind, posterior=posterior, **options), bundle))
    assert all(abs(fused - plain) <= 1e-4 * abs(plain) for plain, fused in zip(*found, strict=True))
    assert len(set(found[0])) == 30


@pytest.mark.parametrize(
    ("name", "likelihood", "posterior"),
    [("vae", "gaussian", "gaussian"), ("vae", "logistic", "iaf"), ("iwae", "bernoulli", "planar")],
)
def test_mixed_precision_is_near_fp32(name, likelihood, posterior):
    bundle = small("digits", 100, 20)
    found = [
        train(tiny(name, "images", likelihood=likelihood, posterior=posterior), bundle, steps=6, precision=p)
        for p in (torch.float32, torch.bfloat16)
    ]
    assert found[1] == pytest.approx(found[0], rel=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_goes_on_reaches_the_same_losses(name, tmp_path):
    bundle = small("eight_gaussians", 200, 40)
    settings = TrainConfig(max_steps=12, batch_size=16, ema=0.9, checkpoint_every=5, eval_every=0, accelerator="cpu")
    options = {"kl_warmup": 10, "free_bits": 0.1} if name == "vae" else {"chunk": 3}
    make = lambda seed=0: tiny(name, posterior="planar", seed=seed, **options)  # noqa: E731
    whole = fit(make(), bundle, settings, out=tmp_path / "whole", quiet=True)
    fit(make(), bundle, settings.changed(max_steps=7), out=tmp_path / "cut", quiet=True)
    again = fit(make(seed=1), bundle, settings, out=tmp_path / "cut", resume=True, quiet=True)
    assert again.history == whole.history and repr(again.held_out) == repr(whole.held_out)
    assert {"loss", "bound", "kl", "reconstruction"} <= set(whole.history)
    state = whole.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in again.model.state_dict().items())


def test_digits_are_learnt_and_more_draws_tighten_the_bound():
    bundle = small("digits", 1400, 100)
    model = tiny("vae", "mlp", latent=8, width=64)
    before = evaluate(model, bundle.test)["bits_per_dim"].value
    train(model, bundle, steps=300, batch=64, lr=3e-3)
    bounds = [evaluate(model, bundle.test, options={"importance": k})["bits_per_dim"].value for k in (1, 2, 5, 50)]
    assert bounds[0] < 2.4 < 3 < before
    # within what a mean over 100 examples of the same data is off
    assert all(tighter < looser + 0.003 for looser, tighter in zip(bounds, bounds[1:], strict=False))
    assert bounds[-1] < bounds[0] - 0.01
