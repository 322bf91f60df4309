"""Training of variational models: on the kernels and on the reference, in two precisions, cut in two, to an end."""

import json

import numpy as np
import pytest
import torch

import genkernels as gk
from genkernels.cli import main
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


# --- the command line ---------------------------------------------------------------------------------------------


def test_train_evaluate_and_sample_by_command(tmp_path, capsys, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)
    sizes = ["--set", "latent=2", "--set", "width=8", "--set", "posterior=iaf", "--set", "importance=3"]
    settings = ["--max-steps", "4", "--eval-examples", "50", "--samples", "9", "--accelerator", "cpu"]
    assert main(["train", "iwae", "--data", "digits", "--out", "run", *sizes, *settings]) == 0
    out, err = capsys.readouterr()
    assert "held out: bits_per_dim" in out and "effective_draws" in out
    assert all(word in err for word in ("bound", "kl", "reconstruction", "largest_weight"))
    columns = (tmp_path / "run" / "losses.csv").read_text().splitlines()[0].split(",")
    assert {"loss", "bound", "kl", "reconstruction"} <= set(columns)
    sheet = np.asarray(image.open("run/samples/step-00000004-reconstructions.png"))
    samples = np.asarray(image.open("run/samples/step-00000004.png"))
    assert sheet.shape != samples.shape and samples.std() > 0

    found = {}
    for k in (1, 40):
        argv = ["eval", "run", "--set", f"importance={k}", "--json", "e.json", "--accelerator", "cpu"]
        assert main(argv) == 0
        found[k] = json.loads((tmp_path / "e.json").read_text())["estimates"]
    assert "latents are active" in capsys.readouterr().out
    assert "effective_draws" not in found[1] and found[40]["effective_draws"]["unit"] == "of 40"
    assert found[40]["bits_per_dim"]["value"] < found[1]["bits_per_dim"]["value"]
    argv = ["sample", "run", "--n", "3", "--accelerator", "cpu"]
    assert main([*argv, "--out", "a.npz"]) == 0 and main([*argv, "--set", "mean=false", "--out", "b.npz"]) == 0
    mean, drawn = (np.load(tmp_path / name)["x"] for name in ("a.npz", "b.npz"))
    assert mean.shape == drawn.shape == (3, 1, 8, 8) and (mean != drawn).any()
    capsys.readouterr()
    for setting, words in (
        ("importance=0", "IWAE: importance, the number of draws, must be an integer of at least 1, got 0"),
        ("chunk=7", "IWAE: chunk must be an integer from 1 to importance, 3, got 7"),
        ("importence=4", "iwae's evaluate has no option 'importence'; did you mean importance?"),
    ):
        assert main(["eval", "run", "--set", setting, "--accelerator", "cpu"]) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("data", "setting", "words"),
    [
        ("moons", "importance=0", "must be an integer of at least 1, got 0"),
        ("moons", "chunk=51", "chunk must be an integer from 1 to importance, 50, got 51"),
        ("moons", "posterior=planer", "got 'planer'; did you mean planar?"),
        ("moons", "likelihood=bernoulli", "likelihood bernoulli needs images"),
        ("digits", "likelihood=poisson", "likelihood must be one of bernoulli, gaussian, logistic, got 'poisson'"),
        ("moons", "estimator=dergg", "got 'dergg'; did you mean dreg?"),
        ("moons", "estimator=vimco", "estimator must be one of continuous latents"),
        ("moons", "estimator=miwae:7", "k must be a multiple of the 7 groups of miwae:7, got 50"),
    ],
)
def test_what_the_command_refuses(data, setting, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "iwae", "--data", data, "--set", setting, "--max-steps", "1", "--quiet"]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and not (tmp_path / "runs").exists()
