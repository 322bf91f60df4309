import pytest

from tests.training import tiny, toys


@pytest.fixture
def register(monkeypatch):
    """Makes a class one of the package's models, so that runs name it and rebuild it."""
    from genkernels import models

    return lambda name, kind: monkeypatch.setitem(models.MODELS, name, kind)


@pytest.fixture
def registered(register):
    register("tiny", tiny.Tiny)
    return tiny.Tiny


@pytest.fixture
def toys_registered(register):
    register("toygan", toys.ToyGAN)
    register("toyvae", toys.ToyVAE)
