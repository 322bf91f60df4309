"""Training and evaluation mode: what training needs while it lasts, and each module's own again afterwards."""

import pytest
import torch
from torch import nn

from genkernels.cli.inpaint import inpaint
from genkernels.models import PixelCNN
from genkernels.nn._modes import in_mode
from genkernels.training import TrainConfig, TrainingError, evaluate, fit, sample
from tests.training.tiny import Tiny, images


def config(**changes) -> TrainConfig:
    small = {"max_steps": 5, "batch_size": 8, "accelerator": "cpu", "eval_every": 2, "samples": 4}
    return TrainConfig(**{**small, **changes})


class Moody(Tiny):
    """Has two parts that differ between the modes, and counts in which mode the first was called."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.dropout, self.norm, self.seen = nn.Dropout(0.5), nn.BatchNorm1d(16), []

    def log_prob(self, x, y=None):
        self.norm(self.dropout(x.flatten(1).float()))
        if torch.is_grad_enabled():
            self.seen.append((self.training, self.dropout.training))
        return super().log_prob(x, y)


def moody():
    torch.manual_seed(0)
    return Moody(shape=(1, 4, 4), grey_levels=5)


def modes(model) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("evaluation", [False, True])
def test_fit_trains_in_training_mode_however_often_and_gives_the_modes_back(evaluation):
    pytest.importorskip("lightning")
    model = moody().train(not evaluation)
    before, losses = modes(model), []
    for _ in range(2):
        model.seen.clear()
        losses.append(fit(model, images(), config(), quiet=True).losses)
        assert model.seen == [(True, True)] * 5 and modes(model) == before
    assert int(model.norm.num_batches_tracked) == 10
    assert losses[0] == fit(moody(), images(), config(), quiet=True).losses


def test_a_part_that_is_frozen_in_evaluation_mode_stays_so():
    pytest.importorskip("lightning")
    model, bundle = moody(), images()
    model.norm.eval(), model.dropout.eval()
    before = modes(model)
    fit(model, bundle, config(), quiet=True)
    assert model.seen == [(True, False)] * 5 and int(model.norm.num_batches_tracked) == 0 and modes(model) == before
    evaluate(model, bundle.test), sample(model, 2)
    assert modes(model) == before


def test_the_modes_come_back_after_an_error_and_an_interruption():
    pytest.importorskip("lightning")
    for broken in (TrainingError, KeyboardInterrupt):
        model = moody().eval()
        model.norm.train()
        before = modes(model)

        def fail(*_, broken=broken):
            raise broken

        model.net.register_forward_hook(fail)
        with pytest.raises(broken):
            fit(model, images(), config(), quiet=True)
        assert modes(model) == before
        with pytest.raises(broken):
            evaluate(model, images().test)
        assert modes(model) == before


def test_completing_images_gives_the_modes_back():
    model = PixelCNN(shape=(1, 4, 4), grey_levels=5, width=4, layers=1, dropout=0.5)
    model.dropout.eval()
    before = modes(model)
    inpaint(model, images().test.x[:2], torch.ones(4, 4, dtype=torch.bool).triu())
    assert modes(model) == before


class Merged(nn.Module):
    """Does something when its mode changes, as layers do that fold themselves for evaluation."""

    folded = False

    def train(self, mode=True):
        self.folded = not mode
        return super().train(mode)


def test_a_layer_that_acts_on_the_change_hears_of_it():
    model = nn.Sequential(Merged(), nn.Sequential(Merged(), nn.Dropout()))
    model[1].eval()
    for _ in range(2):
        with in_mode(model, training=False):
            assert model[0].folded and model[1][0].folded and not any(modes(model))
        assert not model[0].folded and model[1][0].folded
        assert modes(model) == [True, True, False, False, False]
        with in_mode(model, training=True):
            assert modes(model) == [True, True, False, False, False]


def test_a_part_of_two_modules_gets_its_own_mode_back():
    part = nn.Dropout()
    model = nn.ModuleList([nn.Sequential(part), nn.Sequential(part)])
    model[0].eval(), part.eval()
    for mine in (True, False):
        part.train(mine)
        with in_mode(model, training=False):
            pass
        assert (model.training, model[0].training, model[1].training, part.training) == (True, False, True, mine)
