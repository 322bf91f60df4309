"""The model as Lightning sees it. Importing this file imports Lightning, so `genkernels.training.fit` does it when it
is called."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from genkernels._seeds import derive_seed, seed_everything
from genkernels.training.config import TrainConfig
from genkernels.training.order import Order, fetch, make_loader


class TrainingModule(pl.LightningModule):
    """Loss, optimiser, clipping, and a step that is a function of (seed, step, process).

    Args:
        model: has ``loss(x, y=None)``.
        dataset: gives ``(x, y)``.
        config: how to train.
        start, total: the first step, and the number of steps in all.
        optimizer_state: to go on with.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset,
        config: TrainConfig,
        start: int,
        total: int,
        optimizer_state: dict | None = None,
    ) -> None:
        super().__init__()
        self.model, self.dataset, self.config = model, dataset, config
        self.start, self.total, self.optimizer_state = start, total, optimizer_state
        self.step_loss: Tensor | None = None
        self.grad_norm: Tensor | None = None
        self.lr_now = config.lr

    def order(self, rank: int, world_size: int) -> Order:
        c = self.config
        return Order(len(self.dataset), c.batch_size, c.seed, self.start, self.total, rank, world_size)

    def train_dataloader(self) -> DataLoader:
        order = self.order(self.trainer.global_rank, self.trainer.world_size)
        pin = self.trainer.strategy.root_device.type == "cuda"
        return make_loader(self.dataset, order, workers=self.config.workers, pin_memory=pin)

    def setup(self, stage: str) -> None:
        if self.trainer.world_size == 1 or self.start:
            return
        # ActNorm sets itself on the first batch that it sees. Each process sees another batch, so all of them are given
        # the first process's now, before DDP makes sure that they begin with the same weights.
        seed_everything(derive_seed(self.config.seed, "initialise"))
        with torch.no_grad():
            x, y = fetch(self.dataset, self.order(0, self.trainer.world_size).batch(0))
            self.model.train()
            self.model.loss(x, y if self.config.class_conditional else None)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        c = self.config
        # The fused step applies the loss scale of 16-mixed by itself, which hides the true gradients from clipping.
        fused = c.precision != "16-mixed"
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        kind = torch.optim.AdamW if c.weight_decay else torch.optim.Adam
        return kind(parameters, lr=c.lr, betas=c.betas, weight_decay=c.weight_decay, fused=fused)

    def on_fit_start(self) -> None:
        if self.optimizer_state is not None:
            self.optimizers(use_pl_optimizer=False).load_state_dict(self.optimizer_state)
            self.optimizer_state = None

    def on_train_batch_start(self, batch, batch_idx: int) -> None:
        step = self.start + batch_idx
        self.lr_now = self.config.lr_at(step, self.total)
        for group in self.optimizers(use_pl_optimizer=False).param_groups:
            group["lr"] = self.lr_now
        seed_everything(derive_seed(self.config.seed, "step", step, self.global_rank))

    def training_step(self, batch, batch_idx: int) -> Tensor:
        x, y = batch
        loss = self.model.loss(x, y if self.config.class_conditional else None)
        self.step_loss = loss.detach()
        return loss

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        # Here gradients are unscaled under every precision. The norm stays on the device.
        if self.config.clip:
            self.grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
