"""A run that goes on is the run that it was, or says what is not as it was."""

import csv
import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch

from genkernels.cli import main
from genkernels.training import TrainConfig, TrainingError, UsageError, fit, load_model
from genkernels.training import checkpoint as ckpt
from genkernels.training.rundir import RunDirectory
from tests.training.tiny import Tiny, images, model_for, points
from tests.training.toys import ToyGAN

pytest.importorskip("lightning")


def config(**changes) -> TrainConfig:
    small = {"max_steps": 12, "batch_size": 8, "accelerator": "cpu", "eval_every": 4, "warmup": 3, "samples": 4}
    return TrainConfig(**{**small, **changes})


def rows(run) -> list[dict[str, str]]:
    """All of ``losses.csv`` but how long the steps took."""
    with open(Path(run) / "losses.csv") as file:
        return [{name: cell for name, cell in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def forget(run, *steps) -> None:
    """As if the run had been killed after its last checkpoint but these."""
    for step in steps:
        ckpt.step_path(run / "checkpoints", step).unlink(missing_ok=True)


def said(capfd) -> list[str]:
    lines = capfd.readouterr().err.splitlines()
    return [line.removeprefix("genkernels: ") for line in lines if line.startswith("genkernels: ")]


@pytest.mark.parametrize("what", ["nice", "toygan"])
def test_a_run_killed_before_its_first_checkpoint_begins_with_the_same_weights(tmp_path, register, monkeypatch, what):
    register("toygan", ToyGAN)
    monkeypatch.chdir(tmp_path)
    argv = ["train", what, "--data", "moons", "--max-steps", "6", "--seed", "5", "--accelerator", "cpu", "--quiet"]
    argv += ["--eval-every", "0", *(["--set", "hidden=8"] if what == "nice" else [])]
    for out in ("whole", "cut"):
        torch.manual_seed(torch.seed() % 1000)  # what the global generator holds plays no part
        assert main([*argv, "--out", out]) == 0
    forget(Path("cut"), *range(7))
    torch.manual_seed(123)
    assert main(["train", "--out", "cut", "--resume", "--quiet"]) == 0
    assert rows("cut") == rows("whole") and len(rows("cut")) == 6
    kept = [ckpt.read_checkpoint(ckpt.step_path(Path(run, "checkpoints"), 6))["model"] for run in ("whole", "cut")]
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])


def test_other_weights_before_the_first_checkpoint_are_told(tmp_path, registered, capfd):
    bundle, out = images(), tmp_path / "run"
    fit(model_for(bundle), bundle, config(), out=out, quiet=True)
    forget(out, 4, 8, 12)
    fit(model_for(bundle), bundle, config(), out=out, resume=True, quiet=True)
    assert said(capfd) == [f"{out} was stopped before its first checkpoint: starting at step 0"]
    forget(out, 4, 8, 12)
    model = model_for(bundle)
    with torch.no_grad():
        model.net[2].bias.add_(1)
    result = fit(model, bundle, config(), out=out, resume=True, quiet=True)
    sentence = result.notes[-1]
    assert said(capfd)[-1] == sentence and sentence.startswith("the loss of step 0 was ")
    assert sentence.endswith("now: data, weights or machine are not those of then")


def test_other_data_are_told_by_the_first_loss(tmp_path, registered, capfd):
    bundle, out = images(), tmp_path / "run"
    fit(model_for(bundle), bundle, config(), out=out, quiet=True)
    forget(out, 12)
    bundle.train.x.fill_(4)
    fit(model_for(bundle), bundle, config(), out=out, resume=True, quiet=True)
    assert said(capfd)[-1].startswith("the loss of step 8 was ")


DAMAGE = {
    "bytes": (lambda b: b[:100] + b"\xff\xfe\x00" + b[103:], None),
    "other columns": (lambda b: b.replace(b"step,loss", b"time,cost"), 8),
    "another loss": (lambda b: b.replace(b"step,loss", b"step,cost"), 8),
    "a row cut": (lambda b: b"\n".join(line[:7] if i == 3 else line for i, line in enumerate(b.split(b"\n"))), 1),
    "a cell too many": (lambda b: b.replace(b"\n3,", b"\n3,1,"), 1),
    "a word": (lambda b: b.replace(b"\n5,", b"\n5,x"), 1),
    "a quote": (lambda b: b.replace(b"\n2,", b'\n2,"'), 6),
    "empty": (lambda b: b"", 8),
    "lines gone": (lambda b: b"\n".join(b.split(b"\n")[:4]) + b"\n", 5),
}


@pytest.mark.parametrize("how", [*DAMAGE, "missing"])
def test_a_damaged_loss_file_does_not_keep_a_sound_checkpoint_from_going_on(tmp_path, registered, capfd, how):
    bundle, out = images(), tmp_path / "run"
    whole = fit(model_for(bundle), bundle, config(ema=0.9), out=out, quiet=True)
    before = rows(out)
    forget(out, 12)
    path, (damage, lost) = out / "losses.csv", DAMAGE.get(how, (None, 8))
    if damage:
        path.write_bytes(damage(path.read_bytes()))
        content = path.read_bytes()
    else:
        path.unlink()
    result = fit(model_for(bundle), bundle, config(ema=0.9), out=out, resume=True, quiet=True)
    (sentence,) = (words for words in said(capfd) if " lacks " in words)
    assert sentence in result.notes
    found = rows(out)
    gone = [row for row in before[:8] if row not in found]
    assert sentence == f"{path} lacks {len(gone)} of the 8 rows before step 8" and len(gone) == (lost or len(gone)) > 0
    assert all(row in before for row in found) and found[-4:] == before[8:]
    assert result.evaluations == whole.evaluations and result.held_out == whole.held_out
    steps = [int(row["step"]) for row in found]
    assert result.history["loss"] == [whole.losses[step] if step in steps else None for step in range(12)]
    kept = out / "losses.csv.damaged"
    assert kept.read_bytes() == content if how not in ("missing", "empty", "lines gone") else not kept.exists()
    assert main(["figure", "losses", "--run", str(out), "--out", str(tmp_path / "f.png")]) == 0
    fit(model_for(bundle), bundle, config(), out=out, overwrite=True, quiet=True)
    assert not kept.exists()


def test_a_figure_of_damaged_losses_is_drawn_of_what_is_left(tmp_path, registered, capsys):
    out = tmp_path / "run"
    fit(model_for(images()), images(), config(), out=out, quiet=True)
    path = out / "losses.csv"
    path.write_bytes(path.read_bytes().replace(b"\n5,", b"\n5,\xff"))
    assert main(["figure", "losses", "--run", str(out), "--out", str(tmp_path / "f.png")]) == 0
    path.write_bytes(b"\xff\n\xff\n")
    assert main(["figure", "losses", "--run", str(out), "--out", str(tmp_path / "f.png")]) == 2
    assert capsys.readouterr().err == f"genkernels: error: {path} holds no step yet\n"


def test_nothing_to_train_is_told_and_the_length_stays(tmp_path, registered, capfd):
    bundle, out = images(), tmp_path / "run"
    whole = fit(model_for(bundle), bundle, config(), out=out, quiet=True)
    weights = (out / "best.ckpt").read_bytes()
    for steps, words in ((12, "has 12 steps"), (5, "has 12 steps, 5 were asked for")):
        again = fit(model_for(bundle), bundle, config(max_steps=steps), out=out, resume=True, quiet=True)
        assert said(capfd) == [f"{out} {words}: nothing was trained"] == again.notes
        assert again.losses == whole.losses and again.held_out == whole.held_out and again.steps == 12
        assert RunDirectory(out).read_config()["train"]["max_steps"] == 12
        assert json.loads((out / "metrics.json").read_text())["config"]["max_steps"] == 12
    assert (out / "best.ckpt").read_bytes() == weights


def test_a_run_that_stopped_early_has_ended(tmp_path, registered, capfd):
    bundle, out = images(n=6), tmp_path / "run"
    settings = config(max_steps=400, lr=0.1, warmup=0, patience=2, ema=0.0, batch_size=6)
    whole = fit(model_for(bundle), bundle, settings, out=out, quiet=True)
    (out / "metrics.json").unlink()  # killed before the results
    again = fit(model_for(bundle), bundle, settings, out=out, resume=True, quiet=True)
    assert again.steps == whole.steps < 400 and again.losses == whole.losses and again.held_out == whole.held_out
    assert again.stopped_early and json.loads((out / "metrics.json").read_text())["stopped_early"]
    reason = f"stopped early at step {whole.steps}, without a new best in 2 evaluations"
    assert said(capfd) == [f"{out} {reason}: nothing was trained; a larger --patience goes on"]
    longer = fit(model_for(bundle), bundle, settings.changed(patience=3), out=out, resume=True, quiet=True)
    assert longer.steps > whole.steps and said(capfd) == []


def test_a_step_size_that_follows_another_length_is_told(tmp_path, registered, capfd):
    bundle, out = images(), tmp_path / "run"
    settings = config(schedule="cosine", warmup=0)
    fit(model_for(bundle), bundle, settings, out=out, quiet=True)
    fit(model_for(bundle), bundle, settings.changed(max_steps=24), out=out, resume=True, quiet=True)
    assert said(capfd) == ["a run of 24 steps has step size 0.0005 in step 12, one of 12 0"]
    settings = config(warmup=None, max_steps=20)
    fit(model_for(bundle), bundle, settings, out=tmp_path / "w", quiet=True)
    fit(model_for(bundle), bundle, settings.changed(max_steps=40), out=tmp_path / "w", resume=True, quiet=True)
    assert said(capfd) == ["a run of 40 steps has step size 0.00025 in step 0, one of 20 0.0005"]
    fit(model_for(bundle), bundle, config(), out=tmp_path / "b", quiet=True)
    fit(model_for(bundle), bundle, config(max_steps=24), out=tmp_path / "b", resume=True, quiet=True)
    assert said(capfd) == []


def test_a_best_value_on_other_examples_is_told(tmp_path, registered, capfd):
    bundle, out = images(), tmp_path / "run"
    fit(model_for(bundle), bundle, config(max_steps=8), out=out, quiet=True)
    result = fit(model_for(bundle), bundle, config(eval_examples=5), out=out, resume=True, quiet=True)
    sentence = (
        f"eval_examples was the default now 5: the best so far, {result.evaluations[1][1]:.4f}, does not quite compare"
    )
    assert said(capfd) == [sentence]


def test_a_checkpoint_of_weights_alone_is_told(tmp_path, registered, capfd):
    bundle, out = images(), tmp_path / "run"
    fit(model_for(bundle), bundle, config(), out=out, quiet=True)
    forget(out, 8, 12)
    state = ckpt.read_checkpoint(out / "best.ckpt")
    ckpt.write_checkpoint(ckpt.step_path(out / "checkpoints", state["step"]), state)
    fit(model_for(bundle), bundle, config(max_steps=16), out=out, resume=True, quiet=True)
    step = state["step"]
    assert said(capfd) == [f"the checkpoint of step {step} holds weights alone: the optimisers begin anew"]


def test_a_checkpoint_under_another_step_s_name_is_passed_over(tmp_path, registered, capfd):
    bundle, out = images(), tmp_path / "run"
    whole = fit(model_for(bundle), bundle, config(), out=out, quiet=True)
    folder = out / "checkpoints"
    forget(out, 12)
    ckpt.step_path(folder, 99).write_bytes(ckpt.step_path(folder, 8).read_bytes())
    result = fit(model_for(bundle), bundle, config(), out=out, resume=True, quiet=True)
    assert result.losses == whole.losses
    words = f"{ckpt.step_path(folder, 99)} must be of the step in its name, it is of step 8; going on from"
    assert words in said(capfd)[0]


def test_other_parameters_frozen_are_refused(tmp_path, registered):
    bundle, out = images(), tmp_path / "run"
    model = model_for(bundle)
    model.net[0].bias.requires_grad_(False)
    fit(model, bundle, config(max_steps=4), out=out, quiet=True)
    for name, count in ((None, "5"), ("net.2.weight", "4")):
        model = model_for(bundle)
        if name:
            model.get_parameter(name).requires_grad_(False)
        with pytest.raises(
            UsageError, match=rf"must train the 4 tensors of model that the run has trained, got {count}"
        ):
            fit(model, bundle, config(), out=out, resume=True, quiet=True)
    model = model_for(bundle)
    model.net[0].bias.requires_grad_(False)
    assert fit(model, bundle, config(), out=out, resume=True, quiet=True).steps == 12


def test_other_players_or_averages_are_refused(tmp_path):
    from genkernels.models import Player

    class Changing(ToyGAN):
        names, averaged = ("critic", "generator"), False

        def players(self):
            critic, generator = self.names
            return {critic: Player(self.critic, averaged=self.averaged), generator: Player(self.generator)}

        def losses(self, player, x, y, step):
            return super().losses("critic" if player == self.names[0] else "generator", x, y, step)

    bundle, out = points(), tmp_path / "run"
    fit(Changing(), bundle, config(max_steps=4), out=out, quiet=True)
    model = Changing()
    model.names = ("judge", "generator")
    sentence = "has the players critic, generator, which a resume cannot change, got judge, generator"
    with pytest.raises(UsageError, match=sentence):
        fit(model, bundle, config(), out=out, resume=True, quiet=True)
    model = Changing()
    model.averaged = True
    with pytest.raises(UsageError, match="has the averages generator, which a resume cannot change, got critic, gen"):
        fit(model, bundle, config(), out=out, resume=True, quiet=True)


def test_a_player_with_nothing_to_train_is_refused(tmp_path):
    model = ToyGAN().requires_grad_(False)
    model.critic.requires_grad_(True)
    sentence = "ToyGAN: player 'generator' must have a parameter to train, it has none"
    with pytest.raises(UsageError, match=sentence):
        fit(model, images(), config(), out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_another_class_of_one_s_own_is_refused_before_the_first_checkpoint_too(tmp_path):
    class Other(Tiny):
        pass

    bundle, out = images(), tmp_path / "run"
    fit(model_for(bundle), bundle, config(max_steps=4), out=out, quiet=True)
    forget(out, 4)
    with pytest.raises(UsageError, match="begun with model 'Tiny', which a resume cannot change, got 'Other'"):
        fit(Other(shape=(1, 4, 4), grey_levels=5), bundle, config(), out=out, resume=True, quiet=True)
    with pytest.raises(UsageError, match="begun with parameters 440"):
        fit(model_for(bundle, width=4), bundle, config(), out=out, resume=True, quiet=True)


class Judged(Tiny):
    """Its held-out value is what the list says, by evaluation."""

    values: list = []

    def evaluate(self, batches):
        from genkernels.models import Estimate

        return {"nats": Estimate("nats", "nats", self.values.pop(0), 0.1, sum(len(x) for x, _ in batches))}


def judged(values):
    torch.manual_seed(0)
    model = Judged(shape=(1, 4, 4), grey_levels=5)
    model.values = list(values)
    return model


@pytest.fixture
def gone_back(tmp_path, register):
    """A run of which best.ckpt is of step 8, and the newest checkpoint of step 6, when step 4 was the best."""
    register("judged", Judged)
    out, settings = tmp_path / "run", config(eval_every=4, checkpoint_every=6)
    fit(judged([2.0, 1.0, 3.0]), images(), settings, out=out, quiet=True)
    forget(out, 12)
    return out, settings


def test_best_weights_from_before_the_run_went_back_are_told_and_kept(gone_back, capfd):
    out, settings = gone_back
    result = fit(judged([2.5, 2.2]), images(), settings, out=out, resume=True, quiet=True)
    assert said(capfd) == [
        f"{out / 'best.ckpt'} is of step 8, from before the run went back: it stays until one beats step 4"
    ]
    assert result.best == [4, 2.0] and load_model(out)[2]["step"] == 8
    forget(out, 12)
    result = fit(judged([1.0, 2.2]), images(), settings, out=out, resume=True, quiet=True)
    assert result.best == [8, 1.0] and load_model(out)[2]["best"] == [8, 1.0]


def test_best_weights_that_are_lost_are_written_again_or_told(gone_back, capfd):
    out, settings = gone_back
    (out / "best.ckpt").write_bytes(b"")
    result = fit(judged([2.5, 3.0]), images(), settings, out=out, resume=True, quiet=True)
    path = out / "best.ckpt"
    reason = f"checkpoint {path} is cut short: 0 bytes are left"
    assert said(capfd) == [f"{reason}: the next evaluation counts as the best, not 2.0000 at step 4"]
    assert result.best == [8, 2.5] and load_model(out)[2]["step"] == 8
    fit(judged([1.0]), images(), settings.changed(max_steps=16), out=out, resume=True, quiet=True)
    capfd.readouterr()
    path.unlink()
    fit(judged([9.0, 9.0, 9.0]), images(), settings.changed(max_steps=20), out=out, resume=True, quiet=True)
    assert said(capfd) == [] and load_model(out)[2]["best"] == [16, 1.0]


def test_no_checkpoint_is_called_good_that_ends_the_same_way(tmp_path, registered):
    bundle = images()
    out = tmp_path / "a"
    with pytest.raises(TrainingError) as error:
        fit(model_for(bundle), bundle, config(lr=1e30, warmup=0, checkpoint_every=1), out=out, quiet=True)
    first = str(error.value)
    assert first.startswith("the loss became ") and " in step 1" in first
    assert first.endswith("step-00000001.ckpt ends the same way: start again with a smaller --lr or --clip")
    with pytest.raises(TrainingError) as error:
        fit(model_for(bundle), bundle, config(lr=1e-9), out=out, resume=True, quiet=True)
    assert str(error.value) == first

    out = tmp_path / "b"
    with pytest.raises(TrainingError) as error:
        fit(model_for(bundle, poison_at=8), bundle, config(checkpoint_every=1), out=out, quiet=True)
    good = out / "checkpoints" / "step-00000006.ckpt"
    advice = f"{good}: remove step-00000007.ckpt, which ends the same way, and go on from it with --resume"
    assert f"the loss became nan in step 7; the last good checkpoint is {advice}" in str(error.value)
    assert good.exists()


def test_a_full_disk_after_a_resume_names_the_checkpoint_that_is_there(tmp_path, registered, monkeypatch):
    bundle, out = images(), tmp_path / "run"
    fit(model_for(bundle), bundle, config(max_steps=6, checkpoint_every=6, eval_every=0), out=out, quiet=True)
    save = torch.save

    def full(value, file):
        if "optimizers" in value:
            raise OSError(28, "No space left on device")
        save(value, file)

    monkeypatch.setattr(torch, "save", full)
    kept = out / "checkpoints" / "step-00000006.ckpt"
    with pytest.raises(TrainingError, match=f"No space left on device; the last good checkpoint is {kept}$"):
        fit(model_for(bundle), bundle, config(), out=out, resume=True, quiet=True)


def test_who_comes_second_to_a_folder_is_refused_also_after_the_first_has_gone(tmp_path, monkeypatch):
    """The second looks, the first trains and ends, the second takes the lock: it must look again."""
    out = tmp_path / "run"
    second, mkdir = RunDirectory(out), Path.mkdir

    def meanwhile(path, *a, **k):
        monkeypatch.setattr(Path, "mkdir", mkdir)
        fit(model_for(images()), images(), config(max_steps=2), out=out, quiet=True)
        mkdir(path, *a, **k)

    monkeypatch.setattr(Path, "mkdir", meanwhile)
    with pytest.raises(UsageError, match="already holds a run"):
        second.prepare()
    assert len(rows(out)) == 2 and (out / "metrics.json").exists()
    RunDirectory(out).prepare(resume=True)  # the lock was given back


def test_the_results_are_written_under_the_lock(tmp_path, monkeypatch, registered):
    out, refused = tmp_path / "run", []
    from genkernels.training import loop

    def write(path, value):
        with pytest.raises(UsageError, match="is being trained by another process"):
            RunDirectory(out).prepare(resume=True)
        refused.append(path)

    monkeypatch.setattr(loop, "write_json", write)
    fit(model_for(images()), images(), config(max_steps=2), out=out, quiet=True)
    assert refused == [out / "metrics.json"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_two_players_move_leaves_all_asking_for_gradients(number):
    class Stopped(ToyGAN):
        def losses(self, player, x, y, step):
            if step == 2:
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), signal.SIGINT)
            return super().losses(player, x, y, step)

    model = Stopped()
    with pytest.raises(KeyboardInterrupt):
        fit(model, points(), config(eval_every=0), quiet=True)
    assert all(p.requires_grad for p in model.parameters())
    assert math.isfinite(model.losses("critic", torch.randn(4, 2), None, 0)["loss"].item())


def test_a_run_killed_before_its_first_checkpoint_goes_on_from_the_weights_that_it_began_with(tmp_path, capfd):
    """Whatever model is given to go on with: its weights are replaced."""
    settings = TrainConfig(max_steps=6, batch_size=8, checkpoint_every=0, eval_every=0, seed=3)
    whole = fit(model_for(images(), seed=1), images(), settings, out=tmp_path / "run", quiet=True)
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000000.ckpt", "step-00000006.ckpt"]
    (tmp_path / "run" / "checkpoints" / kept[1]).unlink()
    (tmp_path / "run" / "best.ckpt").unlink()
    capfd.readouterr()
    again = fit(model_for(images(), seed=2), images(), settings, out=tmp_path / "run", resume=True, quiet=True)
    assert again.losses == whole.losses and again.held_out == whole.held_out
    assert capfd.readouterr().err == ""
