"""A model with two players and a model with three terms, from Python and from the command line."""

import csv
import inspect
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import genkernels
from genkernels._seeds import derive_seed, seed_everything
from genkernels.cli import main
from genkernels.data.batches import fetch
from genkernels.models import Player
from genkernels.training import TrainConfig, TrainingError, UsageError, evaluate, fit, load_model, read_checkpoint
from genkernels.training.checkpoint import step_path
from genkernels.training.order import Order
from tests.processes import Command, end_with_parent
from tests.training import toys
from tests.training.tiny import images, points
from tests.training.toys import ToyGAN, ToyVAE

pytest.importorskip("lightning")

ROOT = Path(genkernels.__file__).parent.parent


def config(**changes) -> TrainConfig:
    small = {"max_steps": 12, "batch_size": 8, "accelerator": "cpu", "eval_every": 0, "warmup": 3, "samples": 4}
    return TrainConfig(**{**small, **changes})


def gan(seed=0, kind=ToyGAN):
    torch.manual_seed(seed)
    return kind()


def table(run) -> list[dict[str, str]]:
    with open(Path(run) / "losses.csv") as file:
        return list(csv.DictReader(file))


def terms(run) -> list[dict[str, str]]:
    """All of ``losses.csv`` but how long the steps took."""
    return [{name: cell for name, cell in row.items() if name != "seconds"} for row in table(run)]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_they_are_as_short_as_they_are_meant_to_be():
    assert all(len(inspect.getsource(kind).splitlines()) <= 40 for kind in (ToyGAN, ToyVAE))


def test_it_is_the_plain_loop_of_two_optimisers():
    """Each player with an optimiser, a step size and a clipping of its own, and no gradient from the other's move."""
    bundle, settings = points(), config(clip=0.05, ema=0.0)
    result = fit(gan(), bundle, settings, quiet=True)

    model, order, losses = gan().train(), Order(50, 8, 0, 0, 12), {"critic": [], "generator": []}
    optimizers = {
        "critic": torch.optim.Adam(model.critic.parameters(), fused=True),
        "generator": torch.optim.Adam(model.generator.parameters(), fused=True),
    }
    for step in range(12):
        seed_everything(derive_seed(0, "step", step, 0))
        x, y = fetch(bundle.train, order.batch(step))
        for name, part in (("critic", model.critic), ("generator", model.generator)):
            if name == "generator" and step % 3:
                losses[name].append(None)
                continue
            loss = model.losses(name, x, y, step)["loss"]
            model.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(part.parameters(), 0.05)
            optimizers[name].param_groups[0]["lr"] = settings.lr_at(step, 12) * (2.0 if name == "critic" else 1.0)
            optimizers[name].step()
            losses[name].append(loss.item())
    assert result.history["critic/loss"] == losses["critic"] == result.losses
    assert result.history["generator/loss"] == losses["generator"] and losses["generator"].count(None) == 8
    assert same(result.model.state_dict(), model.state_dict())


def test_a_parameter_of_two_players_is_moved_and_clipped_by_each_and_averaged_in_both():
    """As the plain loop does it; the averages and the trained weights come apart and together again."""

    class Sharing(ToyGAN):
        def __init__(self):
            super().__init__()
            self.critic[0].bias = self.generator[0].bias

        def players(self):
            return {"critic": Player(self.critic), "generator": Player(self.generator)}

    bundle, settings = points(), config(clip=0.05, ema=0.9, eval_every=5)
    result = fit(gan(kind=Sharing), bundle, settings, quiet=True)
    model, order, losses = gan(kind=Sharing).train(), Order(50, 8, 0, 0, 12), []
    parts = {"critic": model.critic, "generator": model.generator}
    optimizers = {name: torch.optim.Adam(part.parameters(), fused=True) for name, part in parts.items()}
    for step in range(12):
        seed_everything(derive_seed(0, "step", step, 0))
        x, y = fetch(bundle.train, order.batch(step))
        for name, part in parts.items():
            loss = model.losses(name, x, y, step)["loss"]
            model.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(part.parameters(), 0.05)
            optimizers[name].param_groups[0]["lr"] = settings.lr_at(step, 12)
            optimizers[name].step()
            losses.append(loss.item())
    assert [v for pair in zip(*(result.history[f"{n}/loss"] for n in parts), strict=True) for v in pair] == losses
    shared = result.model
    assert shared.critic[0].bias is shared.generator[0].bias


def test_loading_processes_do_not_change_a_run_that_goes_on(tmp_path):
    whole = fit(gan(kind=ToyVAE), images(), config(), quiet=True)
    fit(gan(kind=ToyVAE), images(), config(max_steps=5), out=tmp_path / "run", quiet=True)
    rest = fit(gan(1, kind=ToyVAE), images(), config(workers=2), out=tmp_path / "run", resume=True, quiet=True)
    assert rest.history == whole.history


def test_a_player_that_does_not_move_gathers_no_gradient():
    seen = []

    class Watched(ToyGAN):
        def losses(self, player, x, y, step):
            asked = [name for name, p in self.named_parameters() if p.requires_grad]
            gradients = {n: None if p.grad is None else p.grad.clone() for n, p in self.named_parameters()}
            seen.append((player, asked, gradients))
            return super().losses(player, x, y, step)

    model = gan(kind=Watched)
    fit(model, points(), config(max_steps=5), quiet=True)
    players = [player for player, _, _ in seen]
    assert players == ["critic", "generator", "critic", "critic", "critic", "generator", "critic"]
    for player, asked, _ in seen:
        assert asked and all(name.startswith(player) for name in asked), "only the player that moves asks for gradients"
    for (player, _, before), (_, _, after) in zip(seen, seen[1:], strict=False):
        for name in before:
            if name.startswith(player):
                assert after[name] is not None
            elif before[name] is None:
                assert after[name] is None
            else:
                assert torch.equal(after[name], before[name])
    assert all(p.requires_grad for p in model.parameters()), "put back"


def test_the_critic_is_not_averaged_and_the_generator_is(tmp_path, toys_registered):
    result = fit(gan(), points(), config(ema=0.9, lr=0.05), out=tmp_path / "run", quiet=True)
    state = read_checkpoint(step_path(tmp_path / "run" / "checkpoints", 12))
    assert (
        state["format"] == 2
        and list(state["average"]) == ["generator"]
        and state["average"]["generator"]["updates"] == 4
    )
    assert list(state["optimizers"]) == ["critic", "generator"]
    for model in (result.model, load_model(tmp_path / "run")[0]):
        now = model.state_dict()
        assert same(
            now,
            {**state["model"], **{f"generator.{k}": v for k, v in state["average"]["generator"]["weights"].items()}},
        )
        assert torch.equal(now["critic.0.weight"], state["model"]["critic.0.weight"])
        assert not torch.equal(now["generator.0.weight"], state["model"]["generator.0.weight"])
    judged = evaluate(result.model, points().test, batch_size=8)
    assert repr(judged) == repr(result.held_out), "the averaged generator was judged"  # NaN is unequal to itself


def test_a_norm_that_nobody_took_is_no_zero(tmp_path, toys_registered):
    """Without clipping no gradient's norm is known: the cells are empty, and a run that goes on reads them."""
    fit(gan(), points(), config(clip=0.0, max_steps=3), out=tmp_path / "gan", quiet=True)
    fit(gan(), points(), config(clip=0.0, max_steps=6), out=tmp_path / "gan", quiet=True, resume=True)
    rows = table(tmp_path / "gan")
    assert [(row["critic/grad_norm"], row["generator/grad_norm"]) for row in rows] == [("", "")] * 6
    assert all(row["critic/loss"] for row in rows)


def test_all_terms_are_shown_everywhere(tmp_path, toys_registered, capfd):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(gan(), points(), config(eval_every=6), out=tmp_path / "gan")
    lines = capfd.readouterr().err.splitlines()
    assert re.search(r" points/s  critic/loss \d.*  critic/gap -?\d.*  generator/loss \d.*  held out \d", lines[-2])
    assert re.search(r"^step 12: held out distance \d\.\d{4}  \((best|best .*)\), critic_wins [01]\.0000$", lines[-1])
    rows = table(tmp_path / "gan")
    head = "step,critic/loss,critic/grad_norm,generator/loss,generator/grad_norm,lr,seconds,critic/gap"
    assert (tmp_path / "gan" / "losses.csv").read_text().splitlines()[0] == head
    assert [bool(row["generator/loss"]) for row in rows] == [step % 3 == 0 for step in range(12)]
    assert all(row["critic/loss"] and row["critic/gap"] for row in rows)
    metrics = json.loads((tmp_path / "gan" / "metrics.json").read_text())
    assert metrics["metric"] == "distance" and list(metrics["held_out"]) == ["distance", "critic_wins"]
    assert metrics["held_out"]["distance"]["standard_error"] is None
    assert metrics["evaluations"][-1].keys() == {"step", "distance", "critic_wins"}
    assert metrics["train"].keys() == {"critic/loss", "critic/gap", "generator/loss"}
    scalars = EventAccumulator(str(tmp_path / "gan" / "tensorboard")).Reload().Tags()["scalars"]
    assert {"train/critic/loss", "train/critic/gap", "train/generator/loss", "held_out/distance"} <= set(scalars)

    fit(gan(kind=ToyVAE), images(), config(eval_every=6), out=tmp_path / "vae")
    line = capfd.readouterr().err.splitlines()[-2]
    assert re.search(r" images/s  reconstruction \d.*  kl \d.*  loss \d.*  kl_weight \d.*  held out -\d", line)
    assert (
        (tmp_path / "vae" / "losses.csv")
        .read_text()
        .startswith("step,loss,grad_norm,lr,seconds,reconstruction,kl,kl_weight\n")
    )
    rows = table(tmp_path / "vae")
    assert [float(row["kl_weight"]) for row in rows] == [min(1.0, step / 10) for step in range(12)]
    for row in rows:
        total = float(row["reconstruction"]) + float(row["kl_weight"]) * float(row["kl"])
        assert float(row["loss"]) == pytest.approx(total, rel=1e-5)
    metrics = json.loads((tmp_path / "vae" / "metrics.json").read_text())
    assert metrics["train"].keys() == {"loss", "reconstruction", "kl", "kl_weight"}
    events = EventAccumulator(str(tmp_path / "vae" / "tensorboard")).Reload().Tags()
    assert {"train/loss", "train/kl", "train/reconstruction", "held_out/elbo"} <= set(events["scalars"])
    assert events["images"] == ["samples", "reconstructions"]
    assert sorted(p.name for p in (tmp_path / "vae" / "samples").iterdir()) == [
        f"step-{step:08d}{name}.png" for step in (6, 12) for name in ("-reconstructions", "")
    ]


def test_the_first_estimate_decides_and_higher_may_be_better(tmp_path, toys_registered):
    values = iter([1.0, 3.0, 2.0, 2.5, 9.0])

    class Told(ToyVAE):
        def evaluate(self, batches):
            from genkernels.models import Estimate

            return {"elbo": Estimate("elbo", "nats", next(values), 0.1, sum(len(x) for x, _ in batches), False)}

    settings = config(max_steps=40, eval_every=2, patience=2)
    result = fit(gan(kind=Told), images(), settings, out=tmp_path / "run", quiet=True)
    assert result.best == [4, 3.0] and result.stopped_early and result.steps == 8
    assert read_checkpoint(tmp_path / "run" / "best.ckpt")["step"] == 4


class Cut(ToyGAN):
    """Sends its own process a signal in the midst of a step."""

    at = None

    def losses(self, player, x, y, step):
        if (player, step) == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().losses(player, x, y, step)


@pytest.mark.parametrize("at", [("critic", 6), ("generator", 6), ("critic", 7)])
def test_an_interrupted_run_goes_on_to_the_same_losses(tmp_path, register, monkeypatch, at):
    register("toygan", Cut)
    bundle, settings = points(), config(ema=0.9, eval_every=4)
    whole = fit(gan(kind=Cut), bundle, settings, out=tmp_path / "whole", quiet=True)
    monkeypatch.setattr(Cut, "at", at)
    first = fit(gan(kind=Cut), bundle, settings, out=tmp_path / "cut", quiet=True)
    assert first.signal == signal.SIGTERM and first.steps == at[1] + 1
    monkeypatch.setattr(Cut, "at", None)
    second = fit(gan(1, kind=Cut), bundle, settings, out=tmp_path / "cut", resume=True, quiet=True)
    assert second.history == whole.history and terms(tmp_path / "cut") == terms(tmp_path / "whole")
    assert same(second.model.state_dict(), whole.model.state_dict()) and repr(second.held_out) == repr(whole.held_out)
    assert second.evaluations == whole.evaluations and second.best == whole.best


def test_a_loss_that_is_nan_names_its_player():
    class Broken(ToyGAN):
        def losses(self, player, x, y, step):
            found = super().losses(player, x, y, step)
            return {**found, "loss": found["loss"] * (math.nan if (player, step) == ("generator", 3) else 1)}

    with pytest.raises(TrainingError, match="the loss of generator became nan in step 3; no checkpoint"):
        fit(gan(kind=Broken), points(), config(log_every=5), quiet=True)


def test_losses_that_cannot_be_minimised_are_refused():
    class Wordless(ToyGAN):
        def losses(self, player, x, y, step):
            return {"los": super().losses(player, x, y, step)["loss"]}

    with pytest.raises(
        UsageError, match=r"Wordless.losses\('critic'\) must give a dict with the tensor 'loss', got los"
    ):
        fit(gan(kind=Wordless), points(), config(), quiet=True)
    with pytest.raises(UsageError, match="must be a genkernels.models.Model: Linear has no players and no losses"):
        fit(torch.nn.Linear(2, 2), points(), config(), quiet=True)


def as_format_1(run: Path) -> None:
    """Turns a run's files into those that the versions before players wrote."""
    from genkernels.training import checkpoint

    for path in [run / "best.ckpt", *checkpoint.list_checkpoints(run / "checkpoints")]:
        state = read_checkpoint(path)
        average = state.pop("average")
        model = average.get("model")
        state["ema"] = {"updates": model["updates"], "average": model["weights"]} if model else None
        if "optimizers" in state:
            state["optimizer"] = state.pop("optimizers")["model"]
        checkpoint.write_checkpoint(path, {**state, "format": 1})
        assert torch.load(path, weights_only=True)["format"] == 1
    settings = json.loads((run / "config.json").read_text())
    settings["data"]["levels"] = settings["data"].pop("grey_levels")
    for key in ("classes", "examples", "digest"):
        del settings["data"][key]
    settings["train"]["class_conditional"] = False
    (run / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("ema", [0.9, 0.0])
def test_a_run_of_format_1_is_read_evaluated_sampled_and_resumed(tmp_path, toys_registered, monkeypatch, capsys, ema):
    monkeypatch.chdir(tmp_path)
    argv = ["train", "toyvae", "--data", "digits", "--accelerator", "cpu", "--quiet", "--samples", "4"]
    argv += ["--eval-every", "3", "--ema", str(ema)]
    assert main([*argv, "--max-steps", "9", "--out", "whole"]) == 0
    assert main([*argv, "--max-steps", "6", "--warmup", "1", "--out", "old"]) == 0
    assert main([*argv, "--max-steps", "9", "--warmup", "1", "--out", "whole", "--overwrite"]) == 0
    assert main(["eval", "old", "--accelerator", "cpu", "--json", "now.json"]) == 0
    assert main(["sample", "old", "--accelerator", "cpu", "--out", "now.npz", "--n", "3"]) == 0
    as_format_1(Path("old"))
    assert main(["eval", "old", "--accelerator", "cpu", "--json", "then.json"]) == 0
    assert main(["sample", "old", "--accelerator", "cpu", "--out", "then.npz", "--n", "3"]) == 0
    assert Path("then.json").read_bytes() == Path("now.json").read_bytes()
    assert (np.load("then.npz")["x"] == np.load("now.npz")["x"]).all()
    assert main(["train", "--out", "old", "--resume", "--max-steps", "9", "--quiet"]) == 0
    assert terms("old") == terms("whole") and len(terms("old")) == 9
    old, whole = (json.loads(Path(run, "metrics.json").read_text()) for run in ("old", "whole"))
    assert old["held_out"] == whole["held_out"] and old["evaluations"] == whole["evaluations"]


def test_from_the_command_line(tmp_path, toys_registered, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = ["--max-steps", "4", "--accelerator", "cpu", "--quiet", "--samples", "9"]
    assert main(["train", "toygan", "--data", "moons", *few, "--set", "width=4", "--out", "gan"]) == 0
    out = capsys.readouterr().out
    assert "held out: distance " in out and ", critic_wins " in out
    assert main(["train", "toyvae", "--data", "digits", *few, "--out", "vae"]) == 0
    assert re.search(r"held out: -\d+\.\d{4} ± \d+\.\d{4} nats over 360 images; best ", capsys.readouterr().out)

    assert main(["eval", "gan", "--accelerator", "cpu", "--set", "draws=7", "--json", "few.json"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 2 and out[0].startswith("toygan on moons: distance ") and "critic_wins" in out[1]
    assert main(["eval", "gan", "--accelerator", "cpu", "--json", "all.json"]) == 0
    few_draws, all_draws = (json.loads(Path(name).read_text()) for name in ("few.json", "all.json"))
    assert few_draws["options"] == {"draws": 7} and all_draws["options"] == {}
    assert few_draws["estimates"]["distance"]["value"] != all_draws["estimates"]["distance"]["value"]
    held = json.loads(Path("gan/metrics.json").read_text())["held_out"]["distance"]["value"]
    assert main(["eval", "gan", "--accelerator", "cpu", "--checkpoint", "last", "--json", "last.json"]) == 0
    assert json.loads(Path("last.json").read_text())["estimates"]["distance"]["value"] == held, "to the last digit"

    for name, more in (("a", []), ("b", ["--set", "shift=100"])):
        assert main(["sample", "gan", "--accelerator", "cpu", "--n", "5", "--out", f"{name}.npz", *more]) == 0
    np.testing.assert_allclose(np.load("b.npz")["x"], np.load("a.npz")["x"] + 100, rtol=1e-5)
    assert main(["sample", "gan", "--accelerator", "cpu", "--n", "5", "--set", "shift=2"]) == 0
    assert Path("gan/samples/n5-t1-seed0-shift2.png").exists()
    capsys.readouterr()
    assert (
        main(["sample", "gan", "--accelerator", "cpu", "--n", "5", "--set", "shift=-2.5", "--checkpoint", "last"]) == 0
    )
    out = "gan/samples/n5-t1-seed0-shift-2.5-last.png"
    assert capsys.readouterr().out == f"{out}: 5 samples at temperature 1, shift -2.5, weights of step 4\n"
    assert pytest.importorskip("PIL.Image").open(out).text["shift"] == "-2.5"
    for line, words in (
        ("eval gan --set draw=7", "toygan's evaluate has no option 'draw'; did you mean draws?"),
        ("eval gan --set draws", "--set takes KEY=VALUE, got 'draws'"),
        ("eval gan --set batches=3", "--set batches: it cannot be set"),
        ("eval vae --set importance=5000", "toyvae's evaluate has no option 'importance'; it takes none"),
        ("sample gan --set shft=1", "toygan's sample has no option 'shft'; did you mean shift?"),
        *((f"sample gan --set {name}=1", f"--set {name}: it cannot be set") for name in ("n", "temperature", "y", "x")),
        ("sample gan --set generator=1", "--set generator: it cannot be set"),
        ("sample vae --inpaint top-half --set shift=1", "--set cannot be given with --inpaint"),
    ):
        assert main([*line.split(), "--accelerator", "cpu"]) == 2
        assert words in capsys.readouterr().err, line


DRIVER = """
import sys

sys.path[:0] = [{tests!r}, {root!r}]
from tests.training import toys
from genkernels.cli import main

toys.register()

sys.exit(main())
"""


def test_kill_minus_nine_loses_nothing(tmp_path, toys_registered, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = ["train", "toygan", "--data", "moons", "--accelerator", "cpu", "--eval-every", "0", "--warmup", "5"]
    base += ["--checkpoint-every", "5", "--samples", "9", "--quiet"]
    process = Command(*base, "--max-steps", "100000", "--out", "cut", before=toys.register)
    while process.poll() is None and not (Path("cut/losses.csv").exists() and len(table("cut")) > 12):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and process.stderr == ""
    total = len(table("cut")) + 8
    assert main(["train", "--out", "cut", "--resume", "--max-steps", str(total), "--quiet"]) == 0
    assert main([*base, "--max-steps", str(total), "--out", "whole"]) == 0
    assert terms("cut") == terms("whole") and len(terms("cut")) == total, "bit for bit"
    held = [json.loads(Path(run, "metrics.json").read_text())["held_out"] for run in ("cut", "whole")]
    assert held[0] == held[1]


TWO = """import functools, os, torch

made = []
begin = toys.ToyGAN.__init__
toys.ToyGAN.__init__ = functools.wraps(begin)(lambda self, **given: (begin(self, **given), made.append(self))[0])
code = main()

torch.save({n: p.detach() for n, p in made[-1].named_parameters()}, "rank" + os.environ["LOCAL_RANK"] + ".pt")
sys.exit(code)
"""


def test_two_processes_move_both_players_alike(tmp_path, monkeypatch):
    """Each player's gradients are averaged over the processes, and the weights stay the same in both."""
    monkeypatch.chdir(tmp_path)
    Path("driver.py").write_text(
        DRIVER.format(tests=str(Path(__file__).parent), root=str(ROOT)).replace("sys.exit(main())\n", TWO)
    )
    argv = ["train", "toygan", "--data", "moons", "--accelerator", "cpu", "--max-steps", "7", "--batch-size", "8"]
    argv += ["--devices", "2", "--ema", "0", "--eval-every", "3", "--samples", "9", "--out", "pair"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "driver.py", *argv],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        preexec_fn=end_with_parent,
    )
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(f"rank{rank}.pt") for rank in range(2))
    assert same(first, second), "the weights of the two processes differ"
    begun = {name: p.detach() for name, p in gan().named_parameters()}
    assert not any(torch.equal(begun[name], value) for name, value in first.items()), "both players moved"
    assert [bool(row["generator/loss"]) for row in table("pair")] == [step % 3 == 0 for step in range(7)]
    held = json.loads(Path("pair/metrics.json").read_text())["held_out"]["distance"]
    assert held["examples"] == 5000, "each process judges its share"


def test_the_examples_of_the_page_run(monkeypatch, tmp_path):
    """A model of the package by `fit`, in a plain loop and in a Lightning module of one's own."""
    blocks = re.findall(r"::\n\n((?:    .*\n|\n)+)", inspect.cleandoc(genkernels.training.__doc__) + "\n")
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)
    space = {}
    exec(inspect.cleandoc("\n" + blocks[0].replace("max_steps=1000", "max_steps=2")), space)
    assert space["state"]["step"] == space["result"].steps == 2
    for block in blocks[1:]:
        torch.manual_seed(0)
        space: dict = {}
        exec(inspect.cleandoc("\n" + block), space)
        model = space.get("model") or space["trainer"].lightning_module.model
        start = type(model)(**model.hparams)
        assert not same(start.state_dict(), model.state_dict())
        assert math.isfinite(model.losses("model", torch.randn(8, 2), torch.zeros(8), 0)["loss"].item())
