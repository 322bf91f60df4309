"""Lightning's import, which takes seconds and can fail for reasons of its own, and its silence.

Fabric is all that is used. It is no lighter to import: ``lightning/__init__.py`` imports the Trainer first.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Iterator

from genkernels._words import UsageError

INSTALL = "pip install 'genkernels[train]'"


def import_lightning() -> None:
    """Imports Lightning Fabric; where that fails, a UsageError says what to do."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own dependencies' deprecations
            importlib.import_module("lightning.fabric")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "lightning":
            raise UsageError(f"training needs Lightning, which is not installed: {INSTALL}") from None
        raise UsageError(f"Lightning cannot be imported: {error}; {INSTALL}") from error
    except Exception as error:
        text = " ".join(str(error).split())
        if "torchvision" in text:  # torchmetrics imports it wherever it is installed
            import torch

            raise UsageError(
                "Lightning cannot be imported because the installed torchvision was built for another torch than "
                f"{torch.__version__} ({text[:120]}): install the torchvision that belongs to it, or "
                "pip uninstall torchvision"
            ) from error
        raise UsageError(f"Lightning cannot be imported: {type(error).__name__}: {text[:200]}") from error


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Holds back Fabric's advice: this package sets what the advice is about, and has a progress line of its own."""
    logger = logging.getLogger("lightning.fabric")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning(\.|$)")
            warnings.filterwarnings("ignore", "This DataLoader will create .* worker processes")
            yield
    finally:
        logger.setLevel(level)
