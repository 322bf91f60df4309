"""What all models share: one vocabulary, their list, presets with their training, and the record of old runs."""

import copy
import importlib
import inspect
import json
import pickle
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from genkernels import models
from genkernels._words import UsageError
from genkernels.data import Form
from genkernels.models._registry import hparams_of_format_1
from genkernels.training import TrainConfig

OLD_RUNS = json.loads((Path(__file__).parent / "runs_of_format_1.json").read_text())
VOCABULARY = {"shape", "grey_levels", "num_classes", "scales"}
FORMER = {"image_shape", "image_size", "features", "channels", "levels", "data_levels"}


# --- the list -----------------------------------------------------------------------------------------------------


def test_names_and_classes_come_from_one_list():
    listed = {kind.__name__ for kind in models.MODELS.values()}
    assert listed <= set(models.__all__) <= set(dir(models))
    assert all(issubclass(kind, models.Model) for kind in models.MODELS.values())
    assert all(getattr(models, name) is not None for name in models.__all__)
    assert models.Glow is models.MODELS["glow"] is models.model_class("glow")
    with pytest.raises(AttributeError, match="no attribute 'Glwo'"):
        _ = models.Glwo


def test_every_model_with_presets_has_its_line():
    """Without one it could not be trained from the command line."""
    written = set()
    for module in pkgutil.walk_packages(models.__path__, "genkernels.models."):
        for thing in vars(importlib.import_module(module.name)).values():
            if isinstance(thing, type) and issubclass(thing, models.Model) and thing.presets:
                written.add(thing)
    assert written == set(models.MODELS.values())


def test_names_alone_import_nothing():
    code = "import sys, genkernels.models as m; print(*m.MODELS, 'glow' in m.MODELS, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [*models.MODELS, "True", "False"]


class Toy(models.LikelihoodModel):
    """A model of a user's own, without an annotation."""

    def __init__(self, shape, width=3, **options):
        super().__init__(shape)
        self.options = options
        self.scale = torch.nn.Parameter(torch.ones(width))


def test_a_model_of_ones_own_takes_part_under_its_name(monkeypatch):
    monkeypatch.setitem(models.MODELS, "toy", Toy)
    toy = models.build("toy", shape=[2], depth=4)
    assert toy.hparams == {"shape": (2,), "width": 3, "depth": 4} and toy.options == {"depth": 4} and toy.dim == 2
    monkeypatch.setitem(models.MODELS, "elsewhere", "collections:OrderedDict")
    assert models.build("elsewhere", a=1) == {"a": 1}
    with pytest.raises(TypeError, match=r"must be a class or 'package.module:Class', got 3"):
        models.MODELS["third"] = 3
    monkeypatch.undo()
    assert "toy" not in models.MODELS
    with pytest.raises(UsageError, match="unknown model 'toy'"):
        models.build("toy")


# --- constructors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", models.MODELS)
def test_every_constructor_speaks_the_vocabulary(name):
    parameters = inspect.signature(models.MODELS[name]).parameters
    assert {"shape", "grey_levels", "num_classes"} <= set(parameters) and not FORMER & set(parameters)
    assert parameters["shape"].default is inspect.Parameter.empty
    for preset in models.MODELS[name].presets.values():
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())  # and passes it on
        assert "shape" in preset.sizes and (takes_any or set(preset.sizes) <= set(parameters))


def test_the_outermost_constructor_is_the_one_recorded():
    class Wide(models.NICE):
        def __init__(self, factor: int = 2, hidden: int | None = None):
            super().__init__(shape=(2,), hidden=4 * factor if hidden is None else hidden - 8, layers=1)

    class Same(Wide):
        pass

    assert Wide().hparams == Same().hparams == {"factor": 2, "hidden": None}
    assert Same(3).hparams == {"factor": 3, "hidden": None}
    assert Wide(3).state_dict()["flows.0.1.net.last.weight"].shape == (1, 12)
    with pytest.raises(ValueError, match="Same: factor must be an integer, got 2.5"):
        Same(2.5)
    with pytest.raises(ValueError, match="Wide: hidden must be at least 1, got -4"):  # what it hands on is checked too
        Wide(hidden=4)


@pytest.mark.parametrize("name", models.MODELS)
def test_a_constructor_stays_one(name):
    kind = models.MODELS[name]
    assert list(inspect.signature(kind.__init__).parameters)[0] == "self" and kind.__init__.__name__ == "__init__"
    model = kind.from_preset("digits" if "digits" in kind.presets else "two_photos32")
    twins = [copy.deepcopy(model)]
    if name != "sngan":  # torch pickles no layer whose weight is parametrised
        twins.append(pickle.loads(pickle.dumps(model)))
    for twin in twins:
        assert twin.hparams == model.hparams and twin.hparams is not model.hparams
        assert list(twin.state_dict()) == list(model.state_dict())
    assert kind(**json.loads(json.dumps(model.hparams))).hparams == model.hparams


def test_points_have_no_grey_levels_and_continuous_images_none_either():
    assert models.MAF(shape=(2,)).hparams["grey_levels"] is None
    assert models.MAF(shape=(2,)).grey_levels is None and models.MAF(shape=[1, 2, 2]).grey_levels == 256
    model = models.MAF(shape=(1, 2, 2), grey_levels=None)
    assert model.dequantize is None and model.log_prob(torch.randn(3, 1, 2, 2)).shape == (3,)


# --- data and presets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", models.MODELS)
def test_what_follows_from_the_data(name):
    kind, sizes = models.MODELS[name], {}
    image, points = Form((2, 4, 4), 17, 10), Form((2,), None, 2)
    classes = {"num_classes": 10} if name == "hybridflow" else {}  # of the others it is the user's to say
    assert kind.fit_to(image) == {"shape": (2, 4, 4), "grey_levels": 17, **classes}
    if "points" in kind.takes:
        sizes = kind.fit_to(points)
        assert sizes == {"shape": (2,), "grey_levels": None, **({"num_classes": 2} if classes else {})}
        assert kind(**sizes).sample(3).shape == (3, 2)
        return
    *some, last = models._registry.names_taking("points")
    others = f"{', '.join(some)} or {last}"
    with pytest.raises(UsageError, match=f"{kind.__name__} is a model of images, the data are points: try {others}$"):
        kind.fit_to(points)


@pytest.mark.parametrize("name", models.MODELS)
def test_two_domains_are_one_image_to_no_model_but_those_of_domains(name):
    kind, form = models.MODELS[name], Form((2, 4, 4), 17, domains=2)
    if kind.domains == 2:
        assert kind.fit_to(form)["shape"] == (2, 4, 4)
        return
    with pytest.raises(
        UsageError, match=f"^{kind.__name__} is a model of one image a datum, .* 2 domains: try cyclegan$"
    ):
        kind.fit_to(form)


def test_arguments_that_a_model_does_not_have_do_not_follow():
    class OfPoints(models.Model):
        takes = ("points",)

        def __init__(self, shape):
            super().__init__(shape)

    assert OfPoints.fit_to(Form((3,))) == {"shape": (3,)}
    assert models.Model.fit_to(Form((1, 2, 2), 4)) == {"shape": (1, 2, 2), "grey_levels": 4}
    with pytest.raises(UsageError, match="OfPoints is a model of points, the data are images: try .*pixelcnn"):
        OfPoints.fit_to(Form((1, 2, 2), 4))
    with pytest.raises(ValueError, match=r"OfPoints: shape must be \(D,\), integers of at least 1, got \(1, 2, 2\)"):
        OfPoints((1, 2, 2))


@pytest.mark.parametrize("name", models.MODELS)
def test_a_preset_trains_as_the_command_line_can(name):
    """Its training names settings of `TrainConfig` and departs from their defaults; those of likelihoods of
    this library's own data leave the defaults alone, but where a measurement says otherwise."""
    measured = {("residualflow", "points")}
    defaults = TrainConfig().to_dict()
    for preset, content in models.MODELS[name].presets.items():
        assert isinstance(content, models.Preset)
        config = TrainConfig(**content.training).to_dict()
        assert all(config[key] != defaults[key] for key in content.training), (preset, content.training)
        departs = preset == "cifar10" or (name, preset) in measured
        assert departs or not content.training or not issubclass(models.MODELS[name], models.LikelihoodModel)


# --- runs of before -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", OLD_RUNS, ids=lambda run: run["directory"])
def test_a_run_of_before_is_rebuilt(run):
    """``config.json`` as the code of format 1 wrote it, and the names and shapes of the weights beside it, in order: an
    optimiser's state goes by it."""
    name, old = run["model"]["name"], run["model"]["hparams"]
    assert FORMER & set(old)
    hparams = hparams_of_format_1(name, old)
    assert not FORMER & set(hparams) and hparams_of_format_1(name, hparams) == hparams
    model = models.build(name, **hparams)
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == run["state_dict"]
    assert list(model.state_dict()) == list(run["state_dict"])
    assert sum(p.numel() for p in model.parameters()) == run["model"]["parameters"]
    assert list(model.shape) == run["data"]["shape"] and model.grey_levels == run["data"]["levels"]
    same = set(old) - FORMER
    recorded = {key: old[key] for key in same}
    if run["data"]["levels"] is None and "logit" in same:
        recorded["logit"] = 0.0  # data without grey levels have none, which the record now says
    assert {key: model.hparams[key] for key in same} == recorded
    if "scales" in model.hparams:
        assert model.hparams["scales"] == old["levels"]


def test_arguments_of_a_users_model_are_left_alone():
    mine = {"features": 2, "levels": 3}
    assert hparams_of_format_1("mine", mine) is mine and hparams_of_format_1(None, mine) is mine
