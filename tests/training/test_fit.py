import csv
import importlib.util
import json
import logging
import math
import os
import random
import signal
import sys
import warnings

import numpy as np
import pytest
import torch

from genkernels import current_backend
from genkernels._seeds import derive_seed, seed_everything
from genkernels.data.batches import fetch
from genkernels.models import Glow
from genkernels.training import RunDirectory, TrainConfig, TrainingError, UsageError, evaluate, fit, load_model
from genkernels.training import checkpoint as ckpt
from genkernels.training.order import Order
from tests.training.tiny import Pairs, Tiny, images, model_for, points

pytest.importorskip("lightning")


def config(**changes) -> TrainConfig:
    small = {"max_steps": 12, "batch_size": 8, "accelerator": "cpu", "eval_every": 0, "warmup": 3, "samples": 4}
    return TrainConfig(**{**small, **changes})


def losses_of(run) -> list[float]:
    with open(run / "losses.csv") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def weights(model) -> dict:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_is_the_plain_training_loop():
    bundle, settings = images(), config(clip=0.5, ema=0.0, weight_decay=0.01, schedule="cosine")
    result = fit(model_for(bundle), bundle, settings, quiet=True)

    model, order, losses = model_for(bundle).train(), Order(50, 8, 0, 0, 12), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    for step in range(12):
        seed_everything(derive_seed(0, "step", step, 0))
        optimizer.param_groups[0]["lr"] = settings.lr_at(step, 12)
        loss = model.loss(fetch(bundle.train, order.batch(step))[0])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    assert result.losses == losses
    assert same(weights(result.model), weights(model))
    assert losses[-1] < losses[0] and result.steps == 12 and not result.interrupted


def test_a_run_leaves_its_files_and_its_results(tmp_path, registered):
    bundle, out = images(), tmp_path / "run"
    result = fit(model_for(bundle), bundle, config(eval_every=4, ema=0.9), out=out, quiet=True)
    names = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file() and "tensorboard" not in p.parts}
    steps = [f"{step:08d}" for step in (4, 8, 12)]
    assert names == {
        "config.json",
        "best.ckpt",
        "losses.csv",
        "metrics.json",
        *(f"checkpoints/step-{s}.ckpt" for s in steps[1:]),
        *(f"samples/step-{s}.png" for s in steps),
    }
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["steps"] == 12 and metrics["metric"] == "bits_per_dim" and metrics["backend"] == current_backend()
    held, value = metrics["held_out"]["bits_per_dim"], result.held_out["bits_per_dim"].value
    assert held["examples"] == 13 and held["value"] == value and held["unit"] == "bits/dim"
    assert metrics["best"] == {"step": 12, "bits_per_dim": value}
    assert metrics["evaluations"][-1] == {"step": 12, "bits_per_dim": value}
    assert metrics["train"] == {"loss": pytest.approx(sum(result.losses) / 12)}
    assert metrics["images_per_second"] == result.examples_per_second > 0
    assert [e["step"] for e in metrics["evaluations"]] == [4, 8, 12]
    assert metrics["config"]["batch_size"] == 8 and metrics["versions"]["torch"] == torch.__version__
    assert losses_of(out) == result.losses and len(result.losses) == 12

    # The averaged weights were evaluated, are the model's now, and are what a run gives back.
    model, read, state, notes = load_model(out)
    assert read["model"]["name"] == "tiny" and state["step"] == 12 and notes == [] and not model.training
    assert same(weights(model), weights(result.model))
    assert not same(weights(model), state["model"]), "the trained weights are kept beside the averaged ones"
    assert evaluate(model, bundle.test, batch_size=8, seed=0) == result.held_out


def test_curves_and_pictures_are_logged_and_a_resume_does_not_double_them(tmp_path, registered):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    bundle = images()
    fit(model_for(bundle), bundle, config(eval_every=4, checkpoint_every=5), out=tmp_path / "run", quiet=True)
    for step in (12, 11):  # as if killed after step 12, with the checkpoint of step 10 the newest
        ckpt.step_path(tmp_path / "run" / "checkpoints", step).unlink(missing_ok=True)
    fit(model_for(bundle), bundle, config(eval_every=4), out=tmp_path / "run", resume=True, quiet=True)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 13))
    assert [e.step for e in events.Scalars("held_out/bits_per_dim")] == [4, 8, 12]
    told = {"train/lr", "train/examples_per_second", "train/grad_norm"}
    assert events.Tags()["images"] == ["samples"] and told <= set(events.Tags()["scalars"])


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = fit(model_for(points()), points(), config(), quiet=True)
    assert list(tmp_path.iterdir()) == [] and result.out is None and list(result.held_out) == ["nats"]
    assert len(result.losses) == 12 and list(result.history) == ["loss"]


def test_it_says_nothing_but_its_own(tmp_path, capfd, caplog):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
        fit(model_for(images()), images(), config(eval_every=6), out=tmp_path / "run")
    out, err = capfd.readouterr()
    assert out == "" and [str(w.message) for w in caught] == [] and caplog.records == []
    assert logging.getLogger("lightning.pytorch").level == logging.INFO, "put back"
    lines = err.splitlines()
    assert lines[0] == "Tiny, 440 parameters, on tiny: noise; cpu, step 0 of 12"
    assert lines[1].startswith("  8% 1/12  ") and "images/s  loss " in lines[1]
    assert any(line.startswith("step 6: held out ") and line.endswith(" bits/dim  (best)") for line in lines)
    assert all(line.split()[0] in ("8%", "100%", "step") for line in lines[1:]), err


def test_packages_that_only_show_things_may_be_missing(tmp_path, monkeypatch, capfd):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    fit(model_for(points()), points(), config(max_steps=2), out=tmp_path / "run")
    assert "no sample sheets: matplotlib is not installed: pip install" in capfd.readouterr().err
    assert (tmp_path / "run" / "metrics.json").exists() and not (tmp_path / "run" / "tensorboard").exists()


def test_global_generators_are_left_alone():
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    before = random.getstate()[1][:5], np.random.get_state()[1][:5].tolist(), torch.get_rng_state().tolist()
    fit(model_for(images(), seed=3), images(), config(max_steps=2), quiet=True)
    torch.manual_seed(3)  # model_for seeds torch
    assert before == (random.getstate()[1][:5], np.random.get_state()[1][:5].tolist(), torch.get_rng_state().tolist())


def test_evaluations_do_not_change_the_losses():
    runs = [fit(model_for(images()), images(), config(eval_every=e), quiet=True).losses for e in (0, 1, 5)]
    assert runs[0] == runs[1] == runs[2]
    assert fit(model_for(images()), images(), config(seed=1), quiet=True).losses != runs[0]


class Interrupted(Tiny):
    """Sends its own process a signal in the midst of a step."""

    at, number = 7, signal.SIGINT

    def loss(self, x, y=None):
        value = super().loss(x, y)
        if self.calls == self.at:
            os.kill(os.getpid(), self.number)
        return value


def interrupted_for(bundle, number=signal.SIGINT):
    torch.manual_seed(0)
    model = Interrupted(shape=bundle.form.shape, grey_levels=bundle.form.grey_levels)
    model.number = number
    return model


@pytest.mark.parametrize(("number", "at"), [(signal.SIGINT, 7), (signal.SIGTERM, 7), (signal.SIGINT, 8)])
def test_an_interrupted_run_goes_on_to_the_same_losses(tmp_path, capfd, register, monkeypatch, number, at):
    bundle = images()
    settings = config(eval_every=4, ema=0.9, schedule="cosine")
    register("tiny", Tiny)
    whole = fit(model_for(bundle), bundle, settings, out=tmp_path / "whole", quiet=True)
    out = tmp_path / "cut"
    register("tiny", Interrupted)
    monkeypatch.setattr(Interrupted, "at", at)
    first = fit(interrupted_for(bundle, number), bundle, settings, out=out)
    assert first.interrupted and first.signal == number and first.steps == at
    assert first.checkpoint == ckpt.step_path(out / "checkpoints", at) and not (out / "metrics.json").exists()
    assert "finishing this step, then saving" in capfd.readouterr().err
    monkeypatch.setattr(Interrupted, "at", None)
    second = fit(interrupted_for(bundle), bundle, settings, out=out, resume=True, quiet=True)
    assert second.losses == whole.losses == losses_of(out)
    assert same(weights(second.model), weights(whole.model)) and second.evaluations == whole.evaluations
    kept = [ckpt.read_checkpoint(ckpt.step_path(run / "checkpoints", 12)) for run in (tmp_path / "whole", out)]
    assert same(kept[0]["model"], kept[1]["model"]) and same(*(k["average"]["model"]["weights"] for k in kept))
    states = [[value["exp_avg_sq"] for value in k["optimizers"]["model"]["state"].values()] for k in kept]
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    class Twice(Tiny):
        def loss(self, x, y=None):
            value = super().loss(x, y)
            if self.calls == 5:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
            return value

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(Twice(shape=(1, 4, 4), grey_levels=5), images(), config(), out=tmp_path / "run", quiet=True)
    assert signal.getsignal(signal.SIGINT) is handler
    left = ckpt.list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name for path in left] == ["step-00000000.ckpt"], "no half-finished step was saved"


def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, registered, capfd):
    bundle, out = images(), tmp_path / "run"
    whole = fit(model_for(bundle), bundle, config(checkpoint_every=6), out=out, quiet=True)
    newest = ckpt.step_path(out / "checkpoints", 12)
    newest.write_bytes(newest.read_bytes()[:-100])
    (out / "checkpoints" / "step-00000012.ckpt.x.tmp").write_bytes(b"killed while it wrote")
    result = fit(model_for(bundle), bundle, config(checkpoint_every=6), out=out, resume=True)
    assert result.losses == whole.losses and result.steps == 12
    error = capfd.readouterr().err
    assert f"genkernels: checkpoint {newest} is cut short" in error
    assert f"going on from {out / 'checkpoints' / 'step-00000006.ckpt'} instead" in error
    left = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert left == ["step-00000006.ckpt", "step-00000012.ckpt", "step-00000012.ckpt.damaged"]
    (out / "best.ckpt").write_bytes(b"")
    _, _, state, notes = load_model(out)
    assert state["step"] == 12 and "best.ckpt is cut short" in notes[0]


def test_a_run_that_lost_every_checkpoint_says_so(tmp_path, registered):
    bundle, out = images(), tmp_path / "run"
    fit(model_for(bundle), bundle, config(), out=out, quiet=True)
    for path in [out / "best.ckpt", *ckpt.list_checkpoints(out / "checkpoints")]:
        path.write_bytes(b"")
    with pytest.raises(UsageError, match="cut short"):
        load_model(out)
    with pytest.raises(UsageError, match="cut short"):
        fit(model_for(bundle), bundle, config(), out=out, resume=True, quiet=True)


def test_killed_before_the_first_checkpoint_or_before_the_results(tmp_path, registered, capfd):
    bundle, out = images(), tmp_path / "run"
    whole = fit(model_for(bundle), bundle, config(), out=out, quiet=True)
    (out / "metrics.json").unlink()
    finished = fit(model_for(bundle), bundle, config(), out=out, resume=True, quiet=True)
    assert finished.losses == whole.losses and finished.held_out == whole.held_out and finished.examples_per_second > 0
    assert json.loads((out / "metrics.json").read_text())["held_out"] == {
        name: estimate.to_dict() for name, estimate in whole.held_out.items()
    }
    for path in ckpt.list_checkpoints(out / "checkpoints"):
        path.unlink()
    again = fit(model_for(bundle), bundle, config(), out=out, resume=True)
    assert again.losses == whole.losses == losses_of(out)
    assert "stopped before its first checkpoint: starting at step 0" in capfd.readouterr().err


def test_a_finished_run_can_be_made_longer(tmp_path, registered):
    bundle = images()
    whole = fit(model_for(bundle), bundle, config(max_steps=12), quiet=True)
    fit(model_for(bundle), bundle, config(max_steps=7), out=tmp_path / "run", quiet=True)
    longer = fit(model_for(bundle), bundle, config(max_steps=12), out=tmp_path / "run", resume=True, quiet=True)
    assert longer.losses == whole.losses
    assert RunDirectory(tmp_path / "run").read_config()["train"]["max_steps"] == 12


def test_what_a_resume_cannot_change(tmp_path, registered):
    bundle, out = images(), tmp_path / "run"
    fit(model_for(bundle), bundle, config(), out=out, quiet=True)
    before = (out / "config.json").read_bytes()
    for changes, sentence in (
        ({"batch_size": 4}, "begun with batch_size 8, which a resume cannot change, got 4"),
        ({"seed": 1}, "begun with seed 0"),
        ({"ema": 0.5}, "begun with ema 0.999"),
    ):
        with pytest.raises(UsageError, match=sentence):
            fit(model_for(bundle), bundle, config(**changes), out=out, resume=True, quiet=True)
    with pytest.raises(UsageError, match="begun with hparams"):
        fit(model_for(bundle, width=4), bundle, config(), out=out, resume=True, quiet=True)
    with pytest.raises(UsageError, match=r"begun with data shape \[1, 4, 4\]"):
        other = images(shape=(1, 2, 2))
        model = model_for(bundle)
        fit(model, other, config(), out=out, resume=True, quiet=True)
    with pytest.raises(UsageError, match="no run to resume"):
        fit(model_for(bundle), bundle, config(), out=tmp_path / "none", resume=True, quiet=True)
    with pytest.raises(UsageError, match="give out"):
        fit(model_for(bundle), bundle, config(), resume=True, quiet=True)
    assert (out / "config.json").read_bytes() == before and not (tmp_path / "none").exists()


def test_a_run_is_not_overwritten_unasked_and_nothing_else_is_removed(tmp_path, registered):
    bundle, out = images(), tmp_path / "run"
    fit(model_for(bundle), bundle, config(max_steps=2), out=out, quiet=True)
    with pytest.raises(
        UsageError, match="already holds a run: continue it with --resume or replace it with --overwrite"
    ):
        fit(model_for(bundle), bundle, config(max_steps=1), out=out, quiet=True)
    assert len(losses_of(out)) == 2
    (out / "notes.txt").write_text("mine")
    fit(model_for(bundle), bundle, config(max_steps=1), out=out, overwrite=True, quiet=True)
    assert len(losses_of(out)) == 1 and (out / "notes.txt").read_text() == "mine"
    assert [ckpt.step_of(path) for path in ckpt.list_checkpoints(out / "checkpoints")] == [1, 0]

    foreign = tmp_path / "home"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="is not empty and holds no run"):
            fit(model_for(bundle), bundle, config(), out=foreign, overwrite=overwrite, quiet=True)
    assert [p.name for p in foreign.iterdir()] == ["thesis.tex"]
    with pytest.raises(UsageError, match="must be a folder, it is a file"):
        fit(model_for(bundle), bundle, config(), out=foreign / "thesis.tex", quiet=True)
    with pytest.raises(UsageError, match="cannot be written"):
        fit(model_for(bundle), bundle, config(), out=foreign / "thesis.tex" / "below", quiet=True)


def test_two_processes_cannot_train_one_run(tmp_path, registered):
    pytest.importorskip("fcntl")
    bundle, out = images(), tmp_path / "run"
    other = RunDirectory(out)
    other.prepare()
    other.write_config(model={}, data={}, train={})
    with pytest.raises(UsageError, match="is being trained by another process"):
        fit(model_for(bundle), bundle, config(), out=out, overwrite=True, quiet=True)
    other.release()
    assert fit(model_for(bundle), bundle, config(max_steps=1), out=out, overwrite=True, quiet=True).steps == 1


def test_nan_stops_the_run_and_names_the_last_good_checkpoint(tmp_path, registered):
    bundle, out = images(), tmp_path / "run"
    with pytest.raises(TrainingError) as error:
        fit(model_for(bundle, poison_at=8), bundle, config(checkpoint_every=3), out=out, quiet=True)
    saved = out / "checkpoints" / "step-00000006.ckpt"
    assert str(error.value).startswith(f"the loss became nan in step 7; the last good checkpoint is {saved}")
    assert ckpt.list_checkpoints(out / "checkpoints")[0] == saved and not (out / "metrics.json").exists()
    assert math.isnan(losses_of(out)[7]) and len(losses_of(out)) == 8


def test_nan_is_dated_right_when_looks_are_rare(tmp_path):
    bundle = images()
    with pytest.raises(TrainingError, match="the loss became nan in step 7; no checkpoint was written"):
        fit(model_for(bundle, poison_at=8), bundle, config(log_every=10), quiet=True)


class NanGradient(Tiny):
    def loss(self, x, y=None):
        value = super().loss(x, y)
        return value + (self.shift - self.shift).abs().sqrt().sum()  # 0, with a gradient of 0 · ∞


@pytest.mark.parametrize(
    ("clip", "words"), [(1.0, "the gradient norm became nan in step 0"), (0.0, "loss became nan in step 1")]
)
def test_a_gradient_that_is_nan_is_caught_with_and_without_clipping(clip, words):
    model = NanGradient(shape=(1, 4, 4), grey_levels=5)
    with pytest.raises(TrainingError, match=words):
        fit(model, images(), config(clip=clip), quiet=True)


def test_broken_weights_are_never_saved(tmp_path):
    model = NanGradient(shape=(1, 4, 4), grey_levels=5)
    with pytest.raises(TrainingError, match="the weights are no longer finite after step 1"):
        fit(model, images(), config(clip=0.0, checkpoint_every=1), out=tmp_path / "run", quiet=True)
    assert [ckpt.step_of(path) for path in ckpt.list_checkpoints(tmp_path / "run" / "checkpoints")] == [0]


def test_data_with_nan_is_refused_before_training_and_named_by_the_guard(tmp_path, monkeypatch):
    bundle = points()
    bundle.train.x[17, 1] = math.nan
    with pytest.raises(UsageError, match="every value must be finite, train example 17 holds NaN"):
        fit(model_for(bundle), bundle, config(), out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr("genkernels.training.loop.check_data", lambda bundle: None)
    with pytest.raises(TrainingError, match=r"in step \d+ \(training example 17 holds a value that is not finite\)"):
        fit(model_for(bundle), bundle, config(), quiet=True)


def test_an_empty_part_is_refused():
    bundle = images(held_out=0)
    with pytest.raises(UsageError, match="the test part must hold at least 1 example, got 0"):
        fit(model_for(bundle), bundle, config(), quiet=True)


def test_a_full_disk_stops_with_the_last_good_checkpoint_named(tmp_path, monkeypatch):
    save = torch.save

    def full(value, file):
        if value.get("step") == 8 and "optimizers" in value:
            raise OSError(28, "No space left on device")
        save(value, file)

    monkeypatch.setattr(torch, "save", full)
    out = tmp_path / "run"
    with pytest.raises(
        TrainingError, match=r"00000008.ckpt cannot be written: No space left.*good checkpoint is .*00000004"
    ):
        fit(model_for(images()), images(), config(checkpoint_every=4), out=out, quiet=True)
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-00000000.ckpt", "step-00000004.ckpt"]


def test_memory_that_runs_out_is_told_in_a_sentence():
    class Greedy(Tiny):
        def loss(self, x, y=None):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(TrainingError, match="memory ran out in step 0: choose a smaller --batch-size"):
        fit(Greedy(shape=(2,)), points(), config(), quiet=True)


def test_a_reversible_flow_that_cannot_be_undone_is_told_in_a_sentence():
    """Started from 3 points; torch's generator is seeded, the start draws of them."""
    torch.manual_seed(3)
    model = Glow(shape=(2,), steps=16, hidden=8, reversible=True)
    model.initialize(torch.randn(3, 2))
    with pytest.raises(TrainingError, match=r"step 0 has no gradient with --reversible: .* use reversible=False"):
        fit(model, points(), config(), quiet=True)


def test_some_held_out_images_judge_the_run_and_all_of_them_the_result(tmp_path, registered):
    bundle = images(held_out=40)
    settings = config(eval_every=4, eval_examples=7, lr=0.05)
    result = fit(model_for(bundle), bundle, settings, out=tmp_path / "run", quiet=True)
    assert result.held_out["bits_per_dim"].examples == 40
    model = load_model(tmp_path / "run", "last")[0]
    some = torch.utils.data.Subset(bundle.test, [0, 5, 11, 17, 22, 28, 34])
    judged = evaluate(model, some, batch_size=8)["bits_per_dim"].value
    assert judged == result.evaluations[-1][1] != result.held_out["bits_per_dim"].value
    assert evaluate(model, bundle.test, batch_size=8) == result.held_out


def test_samples_that_overflow_are_counted(tmp_path, capfd):
    class Wild(Tiny):
        def sample(self, n, **settings):
            x = super().sample(n, **settings)
            x[1] = math.nan
            return x

    fit(Wild(shape=(1, 4, 4), grey_levels=5), images(), config(max_steps=2), out=tmp_path / "run")
    assert "step 2: 1 of 4 samples are not finite" in capfd.readouterr().err


def test_early_stopping_keeps_the_best(tmp_path, registered):
    bundle = images(n=6)
    settings = config(max_steps=400, lr=0.1, warmup=0, eval_every=4, patience=2, ema=0.0, batch_size=6)
    result = fit(model_for(bundle), bundle, settings, out=tmp_path / "run", quiet=True)
    assert result.stopped_early and result.steps < 400
    values = [value for _, value in result.evaluations]
    assert result.best[1] == min(values) and result.steps == result.best[0] + 8
    model, _, state, _ = load_model(tmp_path / "run")
    assert state["step"] == result.best[0]
    assert evaluate(model, bundle.test, batch_size=6)["bits_per_dim"].value == result.best[1]
    assert load_model(tmp_path / "run", "last")[2]["step"] == result.steps
    with pytest.raises(UsageError, match="load_model: which must be best, last or a step, got 'tenth'"):
        load_model(tmp_path / "run", "tenth")


def test_early_stopping_remembers_across_a_resume(tmp_path, registered):
    bundle = images(n=6)
    settings = config(max_steps=400, lr=0.1, warmup=0, eval_every=4, patience=3, ema=0.0, batch_size=6)
    whole = fit(model_for(bundle), bundle, settings, quiet=True)
    part = settings.changed(max_steps=whole.best[0] + 4)
    fit(model_for(bundle), bundle, part, out=tmp_path / "run", quiet=True)
    rest = fit(model_for(bundle), bundle, settings, out=tmp_path / "run", resume=True, quiet=True)
    assert rest.best == whole.best and rest.steps == whole.steps and rest.evaluations == whole.evaluations
    assert load_model(tmp_path / "run")[2]["step"] == whole.best[0]


def test_labels_reach_a_model_that_has_classes():
    bundle = images()
    model = model_for(bundle, num_classes=3)
    before = model.classes.weight.clone()
    fit(model, bundle, config(ema=0.0), quiet=True)
    assert not torch.equal(before, model.classes.weight)


def test_mixed_precision_trains_and_evaluates_in_fp32(monkeypatch):
    seen = []

    class Watched(Tiny):
        def log_prob(self, x, y=None):
            seen.append((self.training, self.net(torch.zeros(1, 16)).dtype))
            return super().log_prob(x, y)

    bundle = images()
    torch.manual_seed(0)
    result = fit(Watched(shape=(1, 4, 4), grey_levels=5), bundle, config(precision="bf16-mixed"), quiet=True)
    assert {dtype for training, dtype in seen if training} == {torch.bfloat16}
    assert {dtype for training, dtype in seen if not training} == {torch.float32}
    assert all(math.isfinite(loss) for loss in result.losses) and next(result.model.parameters()).dtype == torch.float32


def test_the_backend_is_forced_for_the_run_alone():
    seen = []

    class Watched(Tiny):
        def loss(self, x, y=None):
            seen.append(current_backend())
            return super().loss(x, y)

    result = fit(Watched(shape=(2,)), points(), config(max_steps=2, backend="reference"), quiet=True)
    assert seen == ["reference"] * 2 and result.backend == "reference" and current_backend() == "auto"
    with pytest.raises(UsageError, match="did you mean reference"):
        fit(Watched(shape=(2,)), points(), config(backend="referenc"), quiet=True)


def test_wishes_this_machine_cannot_meet():
    bundle = images()
    with pytest.raises(UsageError, match="precision 16-mixed needs a GPU"):
        fit(model_for(bundle), bundle, config(precision="16-mixed"), quiet=True)
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="accelerator gpu needs an NVIDIA GPU"):
            fit(model_for(bundle), bundle, config(accelerator="gpu"), quiet=True)


def test_a_model_of_ones_own_trains_and_says_that_it_cannot_be_rebuilt(tmp_path):
    out = tmp_path / "run"
    fit(model_for(images()), images(), config(max_steps=2), out=out, quiet=True)
    with pytest.raises(UsageError, match="trained Tiny, a class of your own"):
        load_model(out)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": 3}'])
def test_a_damaged_configuration_is_refused(tmp_path, text):
    with pytest.raises(UsageError, match="no such folder"):
        load_model(tmp_path / "none")
    with pytest.raises(UsageError, match="has no config.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match="cannot be read|is damaged"):
        load_model(tmp_path)


def test_batches_larger_than_the_data(tmp_path):
    bundle = images(n=3, held_out=1)
    result = fit(model_for(bundle), bundle, config(batch_size=8, max_steps=3), quiet=True)
    assert result.held_out["bits_per_dim"].examples == 1 and len(result.losses) == 3


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ("operator torchvision::nms does not exist", "installed torchvision was built for another torch"),
        ("undefined symbol: foo", "Lightning cannot be imported: RuntimeError: undefined symbol"),
    ],
)
def test_a_lightning_that_cannot_be_imported_is_told_in_a_sentence(monkeypatch, message, sentence):
    def broken(name):
        raise RuntimeError(message)

    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(UsageError, match=sentence) as error:
        fit(model_for(points()), points(), config(), quiet=True)
    assert "\n" not in str(error.value)


def test_a_lightning_that_is_missing_names_the_extra(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'lightning'", name="lightning")

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(UsageError, match=r"not installed: pip install 'genkernels\[train\]'"):
        fit(model_for(points()), points(), config(), quiet=True)


def test_unreadable_data_in_the_midst_of_a_run(tmp_path):
    from genkernels.data import DataError

    class Broken(Pairs):
        def __getitem__(self, i):
            if i == 30:
                raise DataError("folder:x: picture 30 cannot be read (cut short)")
            return super().__getitem__(i)

    bundle = images()
    object.__setattr__(bundle, "train", Broken(bundle.train.x, bundle.train.y))
    for workers in (0, 1):
        with pytest.raises(
            TrainingError, match=r"could not be read in step \d+: folder:x: picture 30 cannot be read"
        ) as error:
            fit(model_for(bundle), bundle, config(workers=workers), quiet=True)
        assert "\n" not in str(error.value)


def test_a_result_says_what_came_of_it_in_three_lines(tmp_path):
    result = fit(
        model_for(images()), images(), TrainConfig(max_steps=3, batch_size=4), out=tmp_path / "run", quiet=True
    )
    speed, held, out = str(result).splitlines()
    assert speed.startswith("3 steps, ") and " images/s (median step), 0:0" in speed
    assert held == f"held out: {result.held_out['bits_per_dim']} over 13 images; best {result.best[1]:.4f} at step 3"
    assert out.startswith(f"{tmp_path / 'run'}: metrics.json") and out.endswith(
        f"tensorboard --logdir {tmp_path / 'run'}"
    )
    assert repr(result) == str(result)
    quiet = fit(
        model_for(images()), images(), TrainConfig(max_steps=1, batch_size=4, tensorboard=False, threads=1), quiet=True
    )
    assert str(quiet).splitlines()[2] == "nothing was written"
