"""Training: `fit` a model, `evaluate` it, `sample` from it, and rebuild it from a run's folder.

Lightning is imported when `fit` is called, not before: it takes seconds.
"""

from genkernels._words import UsageError
from genkernels.pictures import draw, save_png, scatter, tile
from genkernels.training.checkpoint import CheckpointError, read_checkpoint, write_checkpoint
from genkernels.training.config import TrainConfig
from genkernels.training.ema import EMA
from genkernels.training.errors import TrainingError
from genkernels.training.evaluate import HeldOut, evaluate
from genkernels.training.loop import fit
from genkernels.training.results import Result
from genkernels.training.rundir import RunDirectory, load_model
from genkernels.training.sampling import inpaint, known_region, sample

__all__ = [
    "EMA",
    "CheckpointError",
    "HeldOut",
    "Result",
    "RunDirectory",
    "TrainConfig",
    "TrainingError",
    "UsageError",
    "draw",
    "evaluate",
    "fit",
    "inpaint",
    "known_region",
    "load_model",
    "read_checkpoint",
    "sample",
    "save_png",
    "scatter",
    "tile",
    "write_checkpoint",
]
