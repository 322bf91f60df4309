"""Training: `fit` a model, `evaluate` it, `sample` from it, and rebuild it from a run's folder.

In Python as on the command line::

    import genkernels as gk

    model, bundle = gk.models.NICE.from_preset("digits"), gk.data.load("digits")
    config = gk.training.TrainConfig(max_steps=1000, batch_size=64)  # each field is a flag of genkernels train
    result = gk.training.fit(model, bundle, config, out="runs/nice")  # resume=True goes on with it
    print(result)
    gk.training.evaluate(model, bundle.test)  # estimates by name, each with its standard error
    gk.training.sample(model, 64, temperature=0.7)  # [64, 1, 8, 8] in [0, 1]
    model, config, state, notes = gk.training.load_model("runs/nice")  # the best weights, by held-out examples

A model says what it minimises and who is trained (`genkernels.models.Model`); `fit` adds what makes a run safe to stop,
to watch and to repeat. A model needs none of it. In a plain loop::

    import torch
    from genkernels import models

    model = models.NICE(shape=(2,), hidden=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step, x in enumerate(torch.randn(20, 64, 2)):
        terms = model.losses("model", x, torch.zeros(64, dtype=torch.int64), step)
        optimizer.zero_grad()
        terms["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

and in a Lightning module of one's own::

    import lightning.pytorch as pl
    import torch
    from genkernels import models

    class Density(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = models.NICE(shape=(2,), hidden=8)

        def training_step(self, batch, batch_idx):
            x, y = batch
            terms = self.model.losses("model", x, y, self.global_step)
            self.log_dict(terms)
            return terms["loss"]

        def configure_optimizers(self):
            return torch.optim.Adam(self.model.parameters(), lr=1e-3)

    pairs = torch.utils.data.TensorDataset(torch.randn(640, 2), torch.zeros(640, dtype=torch.int64))
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(Density(), torch.utils.data.DataLoader(pairs, batch_size=64))

A model with several players, a GAN, moves one optimiser after the other: ``model.players()`` names them, and
``model.losses(player, x, y, step)["loss"]`` is what each of them minimises.

Lightning is imported when `fit` is called, not before: it takes seconds.
"""

from genkernels._config import TrainConfig
from genkernels._words import UsageError
from genkernels.training.average import Average
from genkernels.training.checkpoint import CheckpointError, TrainingError, read_checkpoint, write_checkpoint
from genkernels.training.judge import evaluate
from genkernels.training.loop import fit
from genkernels.training.results import Result
from genkernels.training.rundir import RunDirectory, load_model
from genkernels.training.sampling import sample

__all__ = ["Average", "CheckpointError", "Result", "RunDirectory", "TrainConfig", "TrainingError", "UsageError"]
__all__ += ["evaluate", "fit", "load_model", "read_checkpoint", "sample", "write_checkpoint"]
