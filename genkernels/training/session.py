"""A run under way: its players, what watches, reports, judges, draws and keeps it, and what is due after a step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from genkernels._config import TrainConfig
from genkernels._interrupt import Interrupt
from genkernels._seeds import derive_seed, seed_everything
from genkernels._words import notice
from genkernels.data.batches import fetch
from genkernels.training.average import Average
from genkernels.training.judge import Judge
from genkernels.training.keep import Keeper
from genkernels.training.order import Order
from genkernels.training.report import Report
from genkernels.training.resume import stopped_early
from genkernels.training.rundir import RunDirectory
from genkernels.training.sampling import Sheets
from genkernels.training.watch import Watch, check_terms

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from genkernels.data import DataBundle
    from genkernels.models import Model, Player

SAVE_SECONDS = 300.0  # what a killed run may lose at most, where checkpoint_every is left open


@dataclass
class Due:
    """What is to be done after `step` steps; ``interrupted``: a signal came before the run had all of them."""

    step: int
    evaluate: bool = False
    draw: bool = False
    save: bool = False
    stop: bool = False
    interrupted: bool = False


@dataclass(eq=False)
class Session:
    """One run under way: `config` leaves nothing open, `run` is where to write, or None, `state` a checkpoint to go on
    from, empty at the beginning; `interrupt` is asked after each step whether to stop."""

    fabric: Fabric
    model: Model
    bundle: DataBundle
    config: TrainConfig
    run: RunDirectory | None
    state: InitVar[dict]
    interrupt: Interrupt
    quiet: InitVar[bool]
    interrupted: bool = False
    notes: list[str] = field(default_factory=list)

    def __post_init__(self, state: dict, quiet: bool) -> None:
        fabric, model, bundle, config = self.fabric, self.model, self.bundle, self.config
        self.start = self.step = state.get("step", 0)
        wanted = config.total_steps(len(bundle.train), fabric.world_size)
        early = self.start < wanted and stopped_early(config, state)
        self.total = self.start if early else max(self.start, wanted)
        fabric.to_device(model)
        players = model.players()
        if not self.start:
            self._begin(players)
        self.players = {name: Moving(fabric, model, name, player, config) for name, player in players.items()}
        self.judge = Judge(self, state, early)
        self.keeper = Keeper(self, state)
        self.report, self.watch = Report(self, self.start, quiet), Watch(self)
        if self.start == self.total:
            self.watch.clock.seconds = self.report.seconds
        self.report.note(
            f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters, on {bundle.name}: "
            f"{bundle.description}; {fabric.device}, step {self.start:,} of {self.total:,}"
        )
        self.sheets = Sheets(self)
        # a step is shown before what is due after it
        self.report.bar.ahead = lambda done: config.pauses(done - 1, self.total, len(bundle.test))

    @property
    def averages(self) -> list[tuple[nn.Module, Average | None]]:
        return [(player.module, player.average) for player in self.players.values()]

    def tell(self, sentence: str) -> None:  # what must not be kept from the user, of a quiet run neither
        self.notes.append(sentence)
        if self.fabric.is_global_zero:
            notice(sentence)

    def column(self, player: str, term: str) -> str:
        """What a term is called in files and on the bar: by itself where there is one player."""
        return f"{player}/{term}" if len(self.players) > 1 else term

    def order(self, rank: int) -> Order:
        c = self.config
        return Order(len(self.bundle.train), c.batch_size, c.seed, self.start, self.total, rank, self.fabric.world_size)

    def due(self, step: int) -> Due | None:
        """What the settings ask for after `step` steps; None where there is nothing, not even a look at the losses."""
        c, last = self.config, step == self.total
        every = [last or bool(n) and step % n == 0 for n in (c.eval_every, c.sample_every, c.checkpoint_every)]
        due = Due(step, *every)
        due.save = due.save or (c.checkpoint_every is None and due.evaluate)
        alone = self.fabric.world_size == 1  # else all of them must agree, which they do where all of them look
        return due if any(every) or self.watch.record.full or (alone and self.interrupt) else None

    def pause(self, kind: str, act: Callable[[Due], None], due: Due) -> None:
        """Does what is due beside the steps, and lets the bar know how long it took."""
        began = time.monotonic()
        act(due)
        if getattr(due, kind):
            self.report.bar.pause(kind, time.monotonic() - began)

    def hear(self, due: Due) -> None:
        """Whether a signal came in one of the processes: all stop and save at the same step. And the five minutes."""
        agree = self.fabric.strategy.reduce_boolean_decision  # of what one process wishes
        wish = agree(bool(self.interrupt), all=False)
        due.stop, due.interrupted = due.stop or wish, due.interrupted or (wish and due.step < self.total)
        late = time.monotonic() - self.keeper.saved_at > SAVE_SECONDS
        due.save = due.save or due.stop or (self.config.checkpoint_every is None and agree(late, all=False))

    def _begin(self, players: dict[str, Player]) -> None:
        if begin := getattr(self.model, "begin", None):
            batches = map(self.order(0).batch, range(min(-(-1000 // self.config.batch_size), self.total)))
            x_and_y = zip(*(fetch(self.bundle.train, rows) for rows in batches), strict=True)
            begin(*self.fabric.to_device(tuple(map(torch.cat, x_and_y))))
        if self.fabric.world_size > 1:  # ActNorm sets itself on its first batch: one for all, before DDP compares
            seed_everything(derive_seed(self.config.seed, "initialise"))
            for name in players:
                self.model.losses(name, *self.fabric.to_device(fetch(self.bundle.train, self.order(0).batch(0))), 0)


class Moving:
    """A player on the move: its optimiser, its average, and its share of the model's losses.

    While it moves, other players' parameters ask for no gradient: none is computed for them, and none is left behind.
    """

    def __init__(self, fabric: Fabric, model: Model, name: str, player: Player, config: TrainConfig) -> None:
        self.name, self.module, self.every, self.lr = name, player.module, player.every, player.lr
        self.average = Average(player.module, config.ema) if config.ema and player.averaged else None
        self._fabric, self._model, self._clip, self._terms = fabric, model, config.clip, set()
        own = dict.fromkeys(player.module.parameters())
        self._others = [p for p in model.parameters() if p.requires_grad and p not in own]
        self._losses = fabric.strategy.setup_module(_Losses(model, name, set(self._others)))
        # The fused step applies the loss scale of 16-mixed by itself, which hides the true gradients from clipping.
        settings = {"lr": config.lr, "betas": config.betas, "fused": config.precision != "16-mixed"}
        kind = torch.optim.AdamW if config.weight_decay else torch.optim.Adam
        trained = [(name, p) for name, p in player.module.named_parameters() if p.requires_grad]
        optimizer = kind(trained, weight_decay=config.weight_decay, **settings)
        self.optimizer = fabric.setup_optimizers(optimizer)

    def losses(self, x: Tensor, y: Tensor, step: int) -> dict[str, Tensor]:
        """The terms of a step, in the run's precision."""
        for parameter in self._others:
            parameter.requires_grad_(False)
        try:
            with self._fabric.autocast():
                terms = self._losses(x, y, step)
        finally:
            for parameter in self._others:
                parameter.requires_grad_(True)
        if not isinstance(terms, dict) or not self._terms.issuperset(terms):
            check_terms(self._model, self.name, terms)
            self._terms |= set(terms)
        return terms

    def step(self, lr: float) -> Tensor | None:
        """Clips, moves, averages; the gradients' norm, on the device, where it clips."""
        norm = None
        if self._clip:  # of this player's parameters alone, after their gradients are unscaled
            limits = {"max_norm": self._clip, "error_if_nonfinite": False}
            norm = self._fabric.clip_gradients(self.module, self.optimizer, **limits)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * self.lr
        self.optimizer.step()
        if self.average:
            self.average.update_parameters(self.module)
        return norm


class _Losses(nn.Module):
    """A player's losses as the forward pass that DDP wraps; it averages the gradients of this player alone."""

    def __init__(self, model: Model, player: str, others: set[Tensor]) -> None:
        super().__init__()
        self.model, self.player = model, player
        names = [name for name, p in self.named_parameters(remove_duplicate=False) if p in others]
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, names)

    def forward(self, x: Tensor, y: Tensor, step: int) -> dict[str, Tensor]:
        return self.model.losses(self.player, x, y, step)
