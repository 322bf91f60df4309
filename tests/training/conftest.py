import pytest
import tiny


@pytest.fixture
def registered(monkeypatch):
    """Makes the stand-in one of the package's models, so that runs name it and rebuild it."""
    from genkernels import models

    monkeypatch.setitem(models.MODELS, "tiny", tiny.Tiny)
    return tiny.Tiny
