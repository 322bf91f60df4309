"""What happens around the steps: losses are looked at, the model is evaluated, drawn and saved. Imports Lightning."""

from __future__ import annotations

import math
import time
from pathlib import Path

import lightning.pytorch as pl
import torch

from genkernels._seeds import derive_seed
from genkernels.pictures import draw, save_png, why_not
from genkernels.training import checkpoint as ckpt
from genkernels.training.config import TrainConfig
from genkernels.training.curves import Curves
from genkernels.training.ema import EMA, averaged
from genkernels.training.errors import TrainingError
from genkernels.training.evaluate import UNITS, HeldOut, evaluate, metric_of, spread
from genkernels.training.interrupt import Interrupt
from genkernels.training.module import TrainingModule
from genkernels.training.order import fetch
from genkernels.training.progress import Progress, StepClock, rate_text
from genkernels.training.record import LossFile, LossRecord, first_bad, weights_are_finite
from genkernels.training.rundir import RunDirectory
from genkernels.training.sampling import sample, unusable

KEPT = 2
SMOOTH = 20  # losses that the one shown is the mean of
LOGGED = 1000  # points of a TensorBoard curve
SAVE_SECONDS = 300.0  # what a killed run may lose at most, where checkpoint_every is left open


class Conductor(pl.Callback):
    """Calls everything at its step, in one fixed order: average, look, evaluate, draw, save, stop.

    Args:
        bundle: the data.
        config: how to train, with every interval resolved.
        ema: the averaged weights, or None.
        run: where to write; None writes nothing.
        state: what a checkpoint said about evaluations so far.
        heading: the first line of the progress.
        interrupt: asked after each step whether to stop.
        quiet: shows no progress.
    """

    def __init__(
        self,
        bundle,
        config: TrainConfig,
        ema: EMA | None,
        run: RunDirectory | None,
        state: dict,
        heading: str,
        interrupt: Interrupt,
        quiet: bool,
    ) -> None:
        self.bundle, self.config, self.ema, self.run, self.interrupt, self.quiet = (
            bundle,
            config,
            ema,
            run,
            interrupt,
            quiet,
        )
        self.heading = heading
        self.metric = metric_of(bundle.levels)
        self.unit = UNITS[self.metric]
        self.evaluations: list[list] = [list(pair) for pair in state.get("evaluations", [])]
        self.best: list | None = state.get("best")
        self.stale = state.get("stale", 0)
        self.held_out: HeldOut | None = None
        self.saved: Path | None = None
        self.saved_step = -1
        self.stopped_early = self.interrupted = False
        self.step = 0
        self.losses: list[float] = []
        self._file: LossFile | None = None
        self._curves = Curves()
        self._recent: list[float] = []
        self._logged = 0

    # Lightning's hooks

    def on_train_start(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        self.trainer, self.module, self.model = trainer, module, module.model
        self.device, self.world_size = trainer.strategy.root_device, trainer.world_size
        self.main, self.step = trainer.is_global_zero, module.start
        self.record = LossRecord(self.config.log_every, self.device)
        self.clock = StepClock(self.device)
        self.progress = Progress(module.total, module.start, quiet=self.quiet or not self.main)
        if self.run and self.main:
            self._file = LossFile(self.run.losses, module.start)
            self.losses = self._file.losses
            self._curves = Curves(self.run.tensorboard, module.start)
        self.progress.note(self.heading)
        self._undrawn = why_not(points=self.metric == "nats") if self.run else None
        if self._undrawn:
            self.progress.note(f"no sample sheets: {self._undrawn}")
        self.interrupt.listen()  # Lightning has just taken SIGTERM for itself
        self._saved_at = time.monotonic()
        missing = self.step and _due(self.step, self.config.eval_every) and self.step not in dict(self.evaluations)
        if missing:  # Ctrl-C came at a step that was to be evaluated
            self._evaluate()
        self.clock.restart()

    def on_train_batch_end(self, trainer, module: TrainingModule, outputs, batch, batch_idx: int) -> None:
        if self.ema:
            self.ema.update(self.model)
        self.record.add(module.step_loss, module.grad_norm)
        self.clock.tick()
        self.step = step = module.start + batch_idx + 1
        c, last = self.config, module.total
        evaluating = step == last or _due(step, c.eval_every)
        drawing = step == last or _due(step, c.sample_every)
        saving = step == last or _due(step, c.checkpoint_every) or (c.checkpoint_every is None and evaluating)
        if not (self.record.full or evaluating or drawing or saving or (self.interrupt and self.world_size == 1)):
            return
        self._look()
        stop = self._agree(bool(self.interrupt))
        self.interrupted = stop and step < last
        saving = (
            saving
            or stop
            or (c.checkpoint_every is None and self._agree(time.monotonic() - self._saved_at > SAVE_SECONDS))
        )
        if not (evaluating or drawing or saving):
            return
        if not weights_are_finite(self.model):
            self._refuse(step - 1, "weights", f"the weights are no longer finite after step {step}")
        if evaluating and not self.interrupted:
            finished = self._evaluate()
            wish = self._agree(bool(self.interrupt))
            self.interrupted = not finished or (wish and step < last)
            stop = stop or wish or self.stopped_early
        if (drawing or self.stopped_early) and not self.interrupted:
            self._draw()
        if saving or stop:
            self._save()
        if stop:
            trainer.should_stop = True
        self.clock.restart()

    def on_exception(self, trainer, module, exception) -> None:
        self.close()

    def close(self) -> None:
        if hasattr(self, "progress"):
            self.progress.close()
        self._curves.close()
        if self._file:
            self._file.close()
            self._file = None

    # The parts of a look

    def _look(self) -> None:
        """Reads the losses since the last look, checks and records them. The one place where a GPU is waited for."""
        first = self.step - len(self.record)
        rows = self.record.read(self._mean if self.world_size > 1 else None)
        seconds = self.clock.read()
        # Under 16-mixed an infinite gradient is no fault: the step is skipped and the loss scale halved.
        bad = first_bad(rows, check_norm=self.config.precision != "16-mixed")
        for i, (loss, norm) in enumerate(rows[: bad[0] + 1] if bad else rows):
            if self._file:
                lr = self.config.lr_at(first + i, self.module.total)
                self._file.append(first + i, loss, norm, lr, seconds[i] if i < len(seconds) else 0.0)
            elif self.main:
                self.losses.append(loss)
        if self._file:
            self._file.flush()
        if bad:
            i, what, loss, norm = bad
            value = loss if what == "loss" else norm
            beside = "" if what == "loss" else f" (the loss was {loss:.6g})"
            self._refuse(first + i, what, f"the {what} became {value} in step {first + i}{beside}")
        if rows:
            self._show([loss for loss, _ in rows])

    def _show(self, losses: list[float]) -> None:
        self._recent += losses
        del self._recent[: -max(SMOOTH, len(losses))]
        loss = sum(self._recent) / len(self._recent)

        def text() -> str:
            held = f"  held out {self.evaluations[-1][1]:.3f}" if self.evaluations else ""
            noun = "points" if self.metric == "nats" else "images"
            return f"{rate_text(self._rate(), noun)}  {loss:.3f} {self.unit}{held}"

        self.progress.update(self.step, text)
        if self.step - self._logged >= self.module.total / LOGGED or self.step == self.module.total:
            self._logged = self.step
            values = {f"train__{self.metric}": loss, "train__lr": self.module.lr_now}
            self._curves.scalars(self.step, **values, train__examples_per_second=self._rate())

    def _rate(self) -> float | None:
        return self.clock.rate(self.config.batch_size * self.world_size, last=100)

    def _refuse(self, step: int, what: str, sentence: str) -> None:
        where = self._bad_example(step) if what != "weights" else ""
        if self.saved or (self.run and ckpt.list_checkpoints(self.run.checkpoints)):
            kept = self.saved or ckpt.list_checkpoints(self.run.checkpoints)[0]
            advice = f"the last good checkpoint is {kept}: go on from it with --resume and a smaller --lr or --clip"
        else:
            advice = "no checkpoint was written before it: start again with a smaller --lr or --clip"
        raise TrainingError(f"{sentence}{where}; {advice}")

    def _bad_example(self, step: int) -> str:
        """Names an example of that step's batch that is not finite: which batch it was follows from the seed and the
        step."""
        for rank in range(self.world_size):
            indices = self.module.order(rank, self.world_size).batch(step)
            x, _ = fetch(self.bundle.train, indices)
            if x.is_floating_point() and not (fine := x.isfinite().flatten(1).all(1)).all():
                return f" (training example {indices[int((~fine).nonzero()[0])]} holds a value that is not finite)"
        return ""

    def _evaluate(self) -> bool:
        """Evaluates, keeps the best weights, and decides on stopping early; False where Ctrl-C broke it off.

        The same few examples under the same noise judge every step of the run, so that differences between steps are
        sharper than either value. The result at the end is over all examples.
        """
        everything = self.bundle.test
        few = spread(everything, self.config.eval_examples)
        with averaged(self.ema, self.model):
            result = self._measure(few)
            if result is None:
                return False
            better = math.isfinite(result.value) and (self.best is None or result.value < self.best[1])
            self.best, self.stale = ([self.step, result.value], 0) if better else (self.best, self.stale + 1)
            patience, last = self.config.patience, self.step == self.module.total
            self.stopped_early = bool(patience) and self.stale >= patience and not last
            final = last or self.stopped_early
            whole = self._measure(everything) if final and few is not everything else result
        self.evaluations.append([self.step, result.value])
        if better and self.run and self.main:
            ckpt.write_checkpoint(self.run.best, self._weights())
        self._barrier()
        mark = "  (best)" if better else f"  (best {self.best[1]:.4f} at step {self.best[0]})" if self.best else ""
        part = f" ({len(few):,} of {len(everything):,})" if few is not everything else ""
        self.progress.note(f"step {self.step}: held out{part} {result.value:.4f} {self.unit}{mark}")
        if self.stopped_early:
            self.progress.note(f"stopping early: no new best in {self.stale} evaluations")
        self._curves.scalars(self.step, **{f"held_out__{self.metric}": result.value})
        if final:
            self.held_out = whole
        return whole is not None

    def _measure(self, dataset) -> HeldOut | None:
        c = self.config
        return evaluate(
            self.model,
            dataset,
            levels=self.bundle.levels,
            batch_size=c.eval_batch_size or c.batch_size,
            seed=c.seed,
            class_conditional=c.class_conditional,
            rank=self.trainer.global_rank,
            world_size=self.world_size,
            reduce=self._sum if self.world_size > 1 else None,
            stop=self.interrupt.__bool__ if self.world_size == 1 else None,
        )

    def _draw(self) -> None:
        if self.run and self.main and not self._undrawn:
            with averaged(self.ema, self.model):
                images = sample(
                    self.model,
                    self.config.samples,
                    temperature=self.config.temperature,
                    seed=derive_seed(self.config.seed, "sheet"),
                    num_classes=self._classes(),
                )
            real = self.bundle.take("test", len(images))[0] if self.metric == "nats" else None
            if broken := unusable(images):
                self.progress.note(f"step {self.step}: {broken} of {len(images)} samples are not finite")
            pixels = draw(images, real)
            save_png(self.run.samples / f"step-{self.step:08d}.png", pixels)
            self._curves.image(self.step, "samples", pixels)
        self._barrier()

    def _classes(self) -> int | None:
        return self.bundle.num_classes if self.config.class_conditional else None

    def _weights(self) -> dict:
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "evaluations": self.evaluations,
            "best": self.best,
            "stale": self.stale,
        }

    def _save(self) -> None:
        if self.run and self.main and self.saved_step != self.step:
            self._file.flush(to_disk=True)  # the checkpoint must not be ahead of the losses
            path = ckpt.step_path(self.run.checkpoints, self.step)
            optimizer = self.trainer.optimizers[0].state_dict()
            scaler = self.trainer.precision_plugin.state_dict()
            try:
                ckpt.write_checkpoint(path, {**self._weights(), "optimizer": optimizer, "precision": scaler})
            except OSError as error:
                kept = f"the last good checkpoint is {self.saved}" if self.saved else "none was written before it"
                raise TrainingError(
                    f"checkpoint {path} cannot be written: {error.strerror or error}; {kept}"
                ) from error
            ckpt.keep_newest(self.run.checkpoints, KEPT)
            self.saved = path
        self.saved_step, self._saved_at = self.step, time.monotonic()
        self._barrier()

    # Between processes

    def _sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.trainer.strategy.reduce(tensor, reduce_op="sum")

    def _mean(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.trainer.strategy.reduce(tensor, reduce_op="mean")

    def _agree(self, wish: bool) -> bool:
        """What all processes do where one of them wishes it: they leave the loop and save at the same step."""
        return self.trainer.strategy.reduce_boolean_decision(wish, all=False) if self.world_size > 1 else wish

    def _barrier(self) -> None:
        if self.world_size > 1:
            self.trainer.strategy.barrier()


def _due(step: int, every: int | None) -> bool:
    return bool(every) and step % every == 0
