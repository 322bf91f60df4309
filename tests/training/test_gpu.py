"""What only a GPU shows: that steps do not wait for it, that loss scaling and resuming work there."""

import math
import warnings
from pathlib import Path

import pytest
import torch
from torch.optim import swa_utils

from genkernels import training
from genkernels.training import TrainConfig, TrainingError, fit
from tests.training.tiny import images, model_for

pytest.importorskip("lightning")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def config(**changes) -> TrainConfig:
    small = {"max_steps": 45, "batch_size": 8, "accelerator": "gpu", "eval_every": 0, "warmup": 3, "samples": 4}
    return TrainConfig(**{**small, **changes})


def test_steps_between_two_looks_do_not_wait_for_the_device(monkeypatch):
    from genkernels.training.watch import Watch

    look = Watch.look

    def watched_look(self, due):
        torch.cuda.set_sync_debug_mode("default")
        look(self, due)
        if due.step < 40:
            torch.cuda.set_sync_debug_mode("warn")

    monkeypatch.setattr(Watch, "look", watched_look)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(model_for(images()), images(), config(log_every=20), quiet=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # also those that torch's averaging would have on this package's behalf
    homes = str(Path(training.__file__).parent), swa_utils.__file__
    waits = [f"{w.filename}:{w.lineno}" for w in caught if "synchronizing" in str(w.message)]
    assert not [w for w in waits if w.startswith(homes)], waits


def test_two_runs_have_the_same_losses():
    runs = [fit(model_for(images()), images(), config(), quiet=True) for _ in range(2)]
    assert runs[0].losses == runs[1].losses and runs[0].device.startswith("cuda")
    assert next(runs[0].model.parameters()).is_cuda and runs[0].examples_per_second > 0
    assert len(runs[0].losses) == 45 and runs[0].losses[-1] < runs[0].losses[0]


def test_a_stopped_run_goes_on_to_the_same_losses(tmp_path):
    whole = fit(model_for(images()), images(), config(precision="bf16-mixed"), quiet=True)
    fit(model_for(images()), images(), config(precision="bf16-mixed", max_steps=17), out=tmp_path / "run", quiet=True)
    rest = fit(
        model_for(images()), images(), config(precision="bf16-mixed"), out=tmp_path / "run", resume=True, quiet=True
    )
    assert rest.losses == pytest.approx(whole.losses, rel=1e-6)


def test_loss_scaling_survives_a_resume_and_clips_true_gradients(tmp_path):
    settings = {"precision": "16-mixed", "clip": 0.5}
    whole = fit(model_for(images()), images(), config(**settings), quiet=True)
    fit(model_for(images()), images(), config(**settings, max_steps=17), out=tmp_path / "run", quiet=True)
    rest = fit(model_for(images()), images(), config(**settings), out=tmp_path / "run", resume=True, quiet=True)
    assert all(math.isfinite(loss) for loss in whole.losses) and rest.losses == pytest.approx(whole.losses, rel=1e-6)
    exact = fit(model_for(images()), images(), config(clip=0.5), quiet=True)
    assert whole.losses == pytest.approx(exact.losses, rel=2e-2)


def test_nan_is_dated_to_its_step():
    with pytest.raises(TrainingError, match="the loss became nan in step 7"):
        fit(model_for(images(), poison_at=8), images(), config(), quiet=True)
